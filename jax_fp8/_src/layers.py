"""What the layers of linen and of nnx share: recipes as a layer changes them, and bad arguments."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jax_fp8._src.health import HealthProbe, summarize
from jax_fp8._src.recipe import Operand, Recipe


def require_flax(module: str) -> None:
    """Raises an ImportError that says how to get Flax, where it is not installed."""
    if importlib.util.find_spec("flax") is None:
        raise ImportError(f"{module} needs Flax, which is not installed: pip install jax-fp8[flax]")


def with_dynamic_scales(recipe: Recipe, *, activation: bool = True, weight: bool = True) -> Recipe:
    """The recipe with the scales of these operands taken from the values at hand."""

    def change(operand: Any, wanted: bool) -> Any:
        return dataclasses.replace(operand, scaling="dynamic") if operand and wanted else operand

    def change_pair(pair: Any, wanted: bool) -> Any:
        return pair and (pair[0], change(pair[1], wanted))

    operands = change(recipe.activation, activation), change(recipe.weight, weight)
    scalings = {operand.scaling for operand in operands if operand}
    # Recipes refuse options that none of their operands has a use for.
    is_delayed, keeps_amaxes = "delayed" in scalings, bool(scalings - {"dynamic"})
    return dataclasses.replace(
        recipe,
        activation=operands[0],
        weight=operands[1],
        dgrad=change_pair(recipe.dgrad, weight),
        wgrad=change_pair(recipe.wgrad, activation),
        history=recipe.history if is_delayed else Recipe.history,
        update=recipe.update if is_delayed else Recipe.update,
        margin=recipe.margin if keeps_amaxes else Recipe.margin,
    )


def without_key(recipe: Recipe) -> Recipe:
    """The recipe with gradients rounded to nearest, for products that have none."""

    def change(pair: Any) -> Any:
        return pair and (pair[0] and dataclasses.replace(pair[0], rounding="nearest"), pair[1])

    return dataclasses.replace(recipe, dgrad=change(recipe.dgrad), wgrad=change(recipe.wgrad))


def scalings(recipe: Recipe) -> dict[str, str]:
    """How the operands of the forward product are scaled, by their names in a ScalingState."""

    def scaling(operand: Operand | None) -> str:
        return "dynamic" if operand is None else operand.scaling

    return {"activation": scaling(recipe.activation), "weight": scaling(recipe.weight)}


def refuse_options(op: str, options: Mapping[str, Any], **allowed: Any) -> None:
    """Raises a ValueError if an option that the recipe stands for is given another value."""
    for name, default in allowed.items():
        if options.get(name) not in (None, default):
            raise ValueError(
                f"{op}: {name} and recipe both say how to multiply; give {name} to Flax's own"
                f" layer, or leave it out here"
            )


def summarize_all(found: Mapping[str, HealthProbe]) -> dict[str, dict[str, dict[str, float]]]:
    """Plain numbers by the path of each product; of stacked layers, by path and index."""
    summaries = {}
    for path, stats in found.items():
        for index in np.ndindex(np.shape(jax.tree.leaves(stats)[0])):
            one = jax.tree.map(lambda leaf, index=index: leaf[index], stats)
            summaries[path + "".join(f"[{i}]" for i in index)] = summarize(one)
    return summaries
