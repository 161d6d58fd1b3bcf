"""Recipes: what is scaled how, for each operand of a product and of its two gradients."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from jax_fp8._src.scaled_array import BLOCK, Granularity, check_fp8_dtype, check_granularity

E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
SCALINGS = ("dynamic", "static", "delayed")
ROUNDINGS = ("nearest", "stochastic")
UPDATES = ("max", "most_recent")


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand is quantized.

    Attributes:
      dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
      granularity: ``"tensor"``, ``"row"``, ``(1, 128)`` or ``(128, 128)``.
      scaling: ``"dynamic"`` takes the scale from the values at hand; ``"static"`` from a
        calibration and ``"delayed"`` from the steps before, both of a ScalingState and with the
        granularity ``"tensor"`` alone.
      power_of_two: rounds a scale up to a power of two, so that scaling rounds nothing.
      rounding: ``"nearest"`` (to even), or ``"stochastic"`` for gradients: up or down with
        probabilities whose mean is the value.
    """

    dtype: Any = E4M3
    granularity: Granularity = "tensor"
    scaling: Literal["dynamic", "static", "delayed"] = "dynamic"
    power_of_two: bool = False
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        dtype = check_fp8_dtype("Operand", "dtype", self.dtype)
        object.__setattr__(self, "dtype", dtype)
        granularity = check_granularity("Operand", self.granularity)
        object.__setattr__(self, "granularity", granularity)
        for name, accepted in (("scaling", SCALINGS), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"Operand: unknown {name} {getattr(self, name)!r}; accepted are {accepted}"
                )
        if not isinstance(self.power_of_two, bool):
            raise TypeError(f"Operand: power_of_two must be a bool, got {self.power_of_two!r}")
        if self.scaling != "dynamic" and granularity != "tensor":
            raise ValueError(
                f"Operand: {self.scaling} scaling has one scale for a tensor, got granularity"
                f" {granularity!r}"
            )


#: The operands of a gradient's product: the gradient, and the operand of the forward product. A
#: gradient of None stays wide, which only FP8 weights can be multiplied by.
Backward = tuple[Operand | None, Operand]

#: What the forward product's operands ask for.
_DEFAULT: Any = "default"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the operands of a product ``y = x @ w.T`` and of its gradients are quantized.

    Attributes:
      activation: ``x``; None leaves it as it is, 16 bits wide.
      weight: ``w``; None, with an activation of None, makes all products wide.
      dgrad: (gradient, weight) of ``dx = dy @ w``; None multiplies wide values. The default
        quantizes the gradient to E5M2 (E4M3 where the weight is E5M2) with the activation's
        granularity, and the weight as in the forward product.
      wgrad: (gradient, activation) of ``dw = dy.T @ x``, likewise.
      history: with delayed scaling, of how many steps the amax is kept.
      update: with delayed scaling, whether the scale comes from the ``"max"`` of that history or
        from the ``"most_recent"`` step.
      margin: static and delayed scales are larger by ``2 ** margin``.

    An operand with static or delayed scaling is quantized once, so in ``dgrad`` and ``wgrad`` it is
    the same as in the forward product. Gradients have dynamic scales.
    """

    activation: Operand | None = Operand()
    weight: Operand | None = Operand()
    dgrad: Backward | None = _DEFAULT
    wgrad: Backward | None = _DEFAULT
    history: int = 16
    update: Literal["max", "most_recent"] = "max"
    margin: int = 0

    def __post_init__(self) -> None:
        for name in ("activation", "weight"):
            operand = getattr(self, name)
            if not isinstance(operand, Operand | None):
                raise TypeError(
                    f"Recipe: {name} must be an Operand or None, got {type(operand).__name__}"
                )
        if self.weight is None and self.activation is not None:
            raise ValueError("Recipe: weight must be an Operand where activation is one, got None")
        if self.dgrad == _DEFAULT:
            pair = self.weight and (_default_gradient(self.activation, self.weight), self.weight)
            object.__setattr__(self, "dgrad", pair)
        if self.wgrad == _DEFAULT:
            gradient = self.activation and _default_gradient(self.activation, self.activation)
            object.__setattr__(self, "wgrad", gradient and (gradient, self.activation))
        _check_forward(self)
        _check_backward("dgrad", "weight", self.dgrad, self.weight)
        _check_backward("wgrad", "activation", self.wgrad, self.activation)
        if self.update not in UPDATES:
            raise ValueError(f"Recipe: unknown update {self.update!r}; accepted are {UPDATES}")
        if not isinstance(self.history, int) or self.history < 1:
            raise ValueError(f"Recipe: history must be an int >= 1, got {self.history!r}")
        if not isinstance(self.margin, int):
            raise TypeError(f"Recipe: margin must be an int, got {self.margin!r}")
        if not -64 <= self.margin <= 64:  # Beyond, scales of usual amaxes leave float32's range.
            raise ValueError(f"Recipe: margin must be from -64 to 64, got {self.margin}")
        _check_scaling(self)

    @property
    def has_state(self) -> bool:
        """Whether an operand's scale comes from a ScalingState."""
        return any(o is not None and o.scaling != "dynamic" for o in (self.activation, self.weight))

    @property
    def needs_key(self) -> bool:
        """Whether gradients are rounded stochastically."""
        products = (self.dgrad, self.wgrad)
        return any(p and p[0] and p[0].rounding == "stochastic" for p in products)


def _check_scaling(recipe: Recipe) -> None:
    """Refuses options of scalings that no operand has."""
    scalings = {o.scaling for o in (recipe.activation, recipe.weight) if o is not None}
    if "delayed" not in scalings and (
        recipe.history != Recipe.history or recipe.update != Recipe.update
    ):
        raise ValueError(
            f"Recipe: history and update are of delayed scaling, which no operand has; got"
            f" history {recipe.history} and update {recipe.update!r}"
        )
    if not recipe.has_state and recipe.margin != Recipe.margin:
        raise ValueError(
            "Recipe: margin is of static and delayed scaling, which no operand has; got margin"
            f" {recipe.margin}"
        )


def _default_gradient(activation: Operand | None, other: Operand) -> Operand | None:
    """The gradient that goes with ``other``; wide where the activation is."""
    if activation is None:
        return None
    dtype = E4M3 if other.dtype == E5M2 else E5M2  # FP8 GEMMs take at most one E5M2 operand.
    return Operand(dtype, activation.granularity, power_of_two=activation.power_of_two)


def _check_forward(recipe: Recipe) -> None:
    for name in ("activation", "weight"):
        operand = getattr(recipe, name)
        if operand and operand.rounding != "nearest":
            raise ValueError(f"Recipe: stochastic rounding is for gradients, not for the {name}")
    activation, weight = recipe.activation, recipe.weight
    if activation and weight and activation.dtype == weight.dtype == E5M2:
        raise ValueError(
            "Recipe: the activation and the weight cannot both be float8_e5m2: FP8 tensor cores'"
            " GEMM takes at most one"
        )


def _check_backward(name: str, what: str, pair: Any, forward: Operand | None) -> None:
    """Checks dgrad or wgrad; ``forward`` is what their other operand was in the forward product."""
    if pair is None:
        return
    is_pair = isinstance(pair, tuple) and len(pair) == 2
    if not is_pair or not all(isinstance(o, Operand | None) for o in pair) or pair[1] is None:
        raise TypeError(
            f"Recipe: {name} must be None or (gradient, {what}), Operands of which the gradient"
            f" may be None, got {pair!r}"
        )
    gradient, other = pair
    if other.rounding != "nearest":
        raise ValueError(f"Recipe: stochastic rounding is for gradients, not for {name}'s {what}")
    if other.scaling != "dynamic" and other != forward:
        raise ValueError(
            f"Recipe: {name}'s {what} has {other.scaling} scaling, so it must be the same as in"
            f" the forward product, {forward}; got {other}"
        )
    if gradient is None:
        if name == "wgrad":
            raise ValueError(
                "Recipe: wgrad with a wide gradient and an FP8 activation has no product; None"
                " multiplies both wide"
            )
        return
    if gradient.scaling != "dynamic":
        raise ValueError(f"Recipe: gradients have dynamic scales, got {name} {gradient.scaling}")
    if gradient.dtype == other.dtype == E5M2:
        raise ValueError(
            f"Recipe: {name}'s gradient and {what} cannot both be float8_e5m2: FP8 tensor cores'"
            " GEMM takes at most one"
        )


def _rowwise() -> Recipe:
    """A row of a gradient needs no more range than E4M3 has, whose third bit its loss shows."""
    row = Operand(granularity="row")
    return Recipe(row, row, dgrad=(row, row), wgrad=(row, row))


def _scaled(scaling: Literal["static", "delayed"], of_weight: Literal["dynamic", "delayed"]) -> Any:
    return Recipe(Operand(scaling=scaling), Operand(scaling=of_weight))


RECIPES = {
    "tensorwise": Recipe(),
    "rowwise": _rowwise(),
    "blockwise": Recipe(Operand(granularity=(1, BLOCK)), Operand(granularity=(BLOCK, BLOCK))),
    "static": _scaled("static", "dynamic"),
    "delayed": _scaled("delayed", "delayed"),
    "weight_only": Recipe(None, Operand(granularity="row")),
    "wide": Recipe(None, None),  # No FP8 at all: what the others are compared with.
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


def named_recipe(
    name: str,
    *,
    gradient_dtype: Any = None,
    wide_wgrad: bool = False,
    power_of_two: bool = False,
    stochastic_rounding: bool = False,
    history: int | None = None,
    update: Literal["max", "most_recent"] | None = None,
    margin: int | None = None,
) -> Recipe:
    """A named recipe with the options that recipes share.

    Args:
      name: ``"tensorwise"``, ``"rowwise"``, ``"blockwise"``, ``"static"``, ``"delayed"``,
        ``"weight_only"`` or ``"wide"``.
      gradient_dtype: of the gradients, ``float8_e5m2`` or ``float8_e4m3fn``; None is E4M3 for
        ``"rowwise"`` and E5M2 for the others.
      wide_wgrad: multiplies the weight gradient's operands as they are, 16 or 32 bits wide.
      power_of_two: all scales are powers of two.
      stochastic_rounding: gradients are rounded stochastically, which takes a JAX key.
      history: as in Recipe; None is its default.
      update: likewise.
      margin: likewise.

    Raises:
      ValueError: for an unknown name, or an option that this recipe has no use for.

    >>> import jax.numpy as jnp, jax_fp8
    >>> recipe = jax_fp8.named_recipe("rowwise", gradient_dtype=jnp.float8_e5m2)
    >>> recipe.dgrad[0].dtype.name, recipe.dgrad[0].granularity
    ('float8_e5m2', 'row')
    """
    op = "named_recipe"
    base = get_recipe(op, name)
    keeps_amaxes = base.has_state
    if any(option is not None for option in (history, update)) and name != "delayed":
        raise ValueError(f"{op}: history and update are of delayed scaling, not of {name!r}")
    if margin is not None and not keeps_amaxes:
        raise ValueError(f"{op}: margin is of static and delayed scaling, not of {name!r}")
    if base.wgrad is None and wide_wgrad:
        raise ValueError(f"{op}: the weight gradient of {name!r} is wide, wide_wgrad or not")
    if base.weight is None and power_of_two:
        raise ValueError(f"{op}: {name!r} has no scales; it has no use for power_of_two")
    if base.activation is None and (gradient_dtype is not None or stochastic_rounding):
        raise ValueError(f"{op}: {name!r} leaves gradients wide; it has no use for these options")

    def changed(pair: Any) -> Any:
        if pair is None:
            return None
        gradient, other = pair
        if gradient is not None:
            gradient = dataclasses.replace(
                gradient,
                dtype=gradient.dtype if gradient_dtype is None else gradient_dtype,
                rounding="stochastic" if stochastic_rounding else "nearest",
                power_of_two=power_of_two,
            )
        return gradient, dataclasses.replace(other, power_of_two=power_of_two)

    return Recipe(
        base.activation and dataclasses.replace(base.activation, power_of_two=power_of_two),
        base.weight and dataclasses.replace(base.weight, power_of_two=power_of_two),
        dgrad=changed(base.dgrad),
        wgrad=None if wide_wgrad else changed(base.wgrad),
        history=base.history if history is None else history,
        update=base.update if update is None else update,
        margin=base.margin if margin is None else margin,
    )
