"""ScalingState: what static and delayed scaling remember of an operand's magnitudes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src.numerics import absolute_max, dynamic_scale
from jax_fp8._src.recipe import Operand, Recipe, get_recipe
from jax_fp8._src.scaled_array import describe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScalingState:
    """The amaxes that static and delayed scales come from, as a pytree.

    Attributes:
      activation: float32 ``(H,)``, the newest first, or None where the recipe has a dynamic scale.
        ``H`` is 1 for static scaling and the recipe's ``history`` for delayed.
      weight: likewise.

    It is an input and a result of ``dot_general``, and no parameter: keep it apart from what an
    optimizer, clipping or an average of gradients works on.
    """

    activation: Any = None
    weight: Any = None


def _length(recipe: Recipe, operand: Operand) -> int:
    return recipe.history if operand.scaling == "delayed" else 1


def _operands(recipe: Recipe) -> dict[str, Operand | None]:
    """The operands by their names in a ScalingState, None where no amax is kept."""
    both = {"activation": recipe.activation, "weight": recipe.weight}
    return {
        name: operand if operand and operand.scaling != "dynamic" else None
        for name, operand in both.items()
    }


def amax_of(x: Any) -> jax.Array:
    """The amax of a wide array, a float32 scalar."""
    return absolute_max(jnp.asarray(x).astype(jnp.float32))


def init_scaling(
    recipe: str | Recipe, *, activation: Any = None, weight: Any = None
) -> ScalingState:
    """The state that a static or delayed recipe starts from.

    Args:
      recipe: a recipe with static or delayed scaling of an operand.
      activation: a wide array whose amax is the first that the state knows, or None. Without one, a
        delayed scale starts at 1, and a static one is NaN, and with it all that depends on it,
        until ``calibrate`` has seen values.
      weight: likewise.

    Raises:
      ValueError: for a recipe that keeps no state.
    """
    recipe = get_recipe("init_scaling", recipe)
    if not recipe.has_state:
        raise ValueError(f"init_scaling: {recipe} has dynamic scales alone, and keeps no state")
    given = {"activation": activation, "weight": weight}

    def start(name: str, operand: Operand | None) -> Any:
        if operand is None:
            return None
        unknown = 0.0 if operand.scaling == "delayed" else jnp.nan
        amaxes = jnp.full((_length(recipe, operand),), unknown, jnp.float32)
        return amaxes if given[name] is None else amaxes.at[0].set(amax_of(given[name]))

    return ScalingState(**{name: start(name, o) for name, o in _operands(recipe).items()})


def calibrate(
    recipe: str | Recipe, state: ScalingState, *, activation: Any = None, weight: Any = None
) -> ScalingState:
    """Takes values into account that static scales must hold.

    Args:
      recipe: the recipe that ``state`` was made for.
      state: as ``init_scaling`` or an earlier ``calibrate`` gave it.
      activation: a wide array, or None. Not finite amaxes are left out.
      weight: likewise.

    Returns:
      A state whose static amaxes are the largest seen so far. Delayed ones are as they were.

    Raises:
      ValueError: for a state that is not this recipe's.
    """
    recipe = get_recipe("calibrate", recipe)
    check_state("calibrate", recipe, state)
    given = {"activation": activation, "weight": weight}

    def seen(name: str, operand: Operand | None) -> Any:
        amaxes = getattr(state, name)
        if operand is None or operand.scaling != "static" or given[name] is None:
            return amaxes
        new = amax_of(given[name])
        largest = jnp.where(jnp.isnan(amaxes), new, jnp.maximum(amaxes, new))
        return jnp.where(jnp.isfinite(new), largest, amaxes)

    return ScalingState(**{name: seen(name, o) for name, o in _operands(recipe).items()})


def check_state(op: str, recipe: Recipe, state: Any) -> None:
    """Raises where ``state`` is not what the recipe needs."""
    if not recipe.has_state:
        if state is not None:
            raise ValueError(f"{op}: the recipe has dynamic scales alone, and takes no state")
        return
    if not isinstance(state, ScalingState):
        raise TypeError(
            f"{op}: the recipe keeps amaxes from step to step: state must be a ScalingState of"
            f" init_scaling, got {describe(state)}"
        )
    for name, operand in _operands(recipe).items():
        amaxes = getattr(state, name)
        want = None if operand is None else (_length(recipe, operand),)
        got = None if amaxes is None else tuple(jnp.shape(amaxes))
        if got != want or (want is not None and jnp.result_type(amaxes) != jnp.float32):
            expected = "None" if want is None else f"float32{list(want)}"
            raise ValueError(
                f"{op}: state.{name} does not fit the recipe, which takes {expected}, got"
                f" {'None' if amaxes is None else describe(amaxes)}"
            )


def scale_from(recipe: Recipe, operand: Operand, amaxes: jax.Array) -> jax.Array:
    """The scale of an operand, a float32 scalar, from the amaxes of its state."""
    amax = amaxes[0] if recipe.update == "most_recent" else jnp.max(amaxes)
    amax = lax.stop_gradient(amax) * jnp.float32(2.0**recipe.margin)
    return dynamic_scale(amax, operand.dtype, operand.power_of_two)


def updated(
    recipe: Recipe, state: ScalingState, activation_amax: jax.Array, weight_amax: jax.Array
) -> ScalingState:
    """The state after a step with these amaxes.

    One that is not finite shows in the results of its own step. It is kept as 0, so that it does
    not spoil the steps that follow.
    """
    new = {"activation": activation_amax, "weight": weight_amax}

    def shift(name: str, operand: Operand | None) -> Any:
        amaxes = getattr(state, name)
        if operand is None or operand.scaling != "delayed":
            return amaxes
        amax = lax.stop_gradient(new[name])
        amax = jnp.where(jnp.isfinite(amax), amax, 0.0).reshape(1)
        return jnp.concatenate([amax, lax.stop_gradient(amaxes)[:-1]])

    return ScalingState(**{name: shift(name, o) for name, o in _operands(recipe).items()})
