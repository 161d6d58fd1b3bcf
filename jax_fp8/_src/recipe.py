"""Recipes: what is scaled how, for each operand of a product."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jax_fp8._src.scaled_array import BLOCK, Granularity, check_fp8_dtype, check_granularity


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand is quantized.

    Attributes:
      dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
      granularity: ``"tensor"``, ``"row"``, ``(1, 128)`` or ``(128, 128)``.
    """

    dtype: Any = jnp.dtype(jnp.float8_e4m3fn)
    granularity: Granularity = "tensor"

    def __post_init__(self) -> None:
        dtype = check_fp8_dtype("Operand", "dtype", self.dtype)
        object.__setattr__(self, "dtype", dtype)
        granularity = check_granularity("Operand", self.granularity)
        object.__setattr__(self, "granularity", granularity)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the operands of a product are quantized, from the values at hand.

    Attributes:
      activation: the wide operand of ``matmul``; None leaves it as it is, 16 bits wide.
      weight: the operand that is quantized ahead.
    """

    activation: Operand | None = Operand()
    weight: Operand = Operand()

    def __post_init__(self) -> None:
        for name, none in (("activation", " or None"), ("weight", "")):
            operand = getattr(self, name)
            if not (isinstance(operand, Operand) or (none and operand is None)):
                raise TypeError(
                    f"Recipe: {name} must be an Operand{none}, got {type(operand).__name__}"
                )


RECIPES = {
    "tensorwise": Recipe(),
    "rowwise": Recipe(Operand(granularity="row"), Operand(granularity="row")),
    "blockwise": Recipe(Operand(granularity=(1, BLOCK)), Operand(granularity=(BLOCK, BLOCK))),
    "weight_only": Recipe(None, Operand(granularity="row")),
}


def get_recipe(op: str, recipe: str | Recipe) -> Recipe:
    """Returns the recipe of that name, or ``recipe`` itself if it is one.

    Raises:
      ValueError: for a name that is none of the recipes'.
      TypeError: for anything that is neither a name nor a Recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"{op}: recipe must be a name or a Recipe, got {type(recipe).__name__}")
    if recipe not in RECIPES:
        raise ValueError(f"{op}: unknown recipe {recipe!r}; named ones are {', '.join(RECIPES)}")
    return RECIPES[recipe]
