"""dot_general: plain arrays in and out, FP8 between, differentiable."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src.axes import View, view_of
from jax_fp8._src.cast_transpose import key_words
from jax_fp8._src.health import HealthProbe
from jax_fp8._src.layouts import keeps_rows
from jax_fp8._src.placement import (
    Outcome,
    outcome,
    placement,
    placement_of_product,
    reshape,
)
from jax_fp8._src.prepared import PreparedWeight
from jax_fp8._src.product import ProductConfig, Side, product
from jax_fp8._src.quantize import WIDE_DTYPES
from jax_fp8._src.recipe import Recipe, get_recipe
from jax_fp8._src.scaled_array import ScaledArray, check_scaled_array, describe
from jax_fp8._src.scaled_matmul import IMPLEMENTATIONS, precision_is_fast
from jax_fp8._src.scaling import ScalingState, check_state, scale_from, updated

DimensionNumbers = Any


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    recipe: str | Recipe = "tensorwise",
    state: ScalingState | None = None,
    key: Any = None,
    probe: HealthProbe | None = None,
    implementation: str | None = None,
) -> Any:
    """``jax.lax.dot_general`` with FP8 products, forward and backward.

    The operands of each of the three products, this one and those of the two gradients, are
    quantized as the recipe says. The gradients have the dtypes of ``lhs`` and ``rhs``, which may
    differ: with ``lhs`` bfloat16 and ``rhs`` float32, the gradient of ``rhs`` is the float32 sum as
    it is. They are always accumulated precisely, and have no derivatives of their own.

    Args:
      lhs: the activation: float32, bfloat16 or float16, or a ScaledArray that contracts its last
        axis and has its batch axes in front.
      rhs: the weight: likewise, or a PreparedWeight.
      dimension_numbers: as in ``jax.lax.dot_general``:
        ``((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))``.
      precision: None and DEFAULT accumulate the forward product fast; HIGH and HIGHEST in float32.
        Of a pair the more precise one counts; an algorithm of lax is refused.
      preferred_element_type: of the result: float32, bfloat16 or float16. None is what the dtypes
        of the wide operands promote to, bfloat16 where there are none.
      out_sharding: as in ``jax.lax.dot_general``.
      recipe: ``"tensorwise"``, ``"rowwise"``, ``"blockwise"``, ``"static"``, ``"delayed"``,
        ``"weight_only"`` (bfloat16 and float16 activations alone), ``"wide"`` (no FP8 at all), or a
        ``Recipe``. A granularity is meant for the operand as (batch, free, contracted) axes: its
        rows are what stays after the product.
      state: the ScalingState of static and delayed recipes.
      key: the JAX key of recipes with stochastic rounding, of threefry2x32.
      probe: a HealthProbe, whose gradient will be the statistics of the operands.
      implementation: of all three products, as in ``scaled_matmul``.

    Returns:
      An array of batch, free ``lhs`` and free ``rhs`` axes; with ``state``, (array, ScalingState),
      the state of the next step.

    Raises:
      TypeError: for dtypes other than these, and for dimension numbers that do not fit.
      ValueError: for an unknown recipe, precision or implementation, a state or key that the recipe
        needs or has no use for, a PreparedWeight of another recipe or other axes, or a ScaledArray
        whose axes would have to move.
      NotImplementedError: for what the named implementation cannot do on any device, and for second
        derivatives.

    >>> import jax, jax.numpy as jnp, jax_fp8
    >>> x, w = jnp.ones((4, 32), jnp.bfloat16), jnp.ones((32, 8), jnp.bfloat16)
    >>> def loss(w):
    ...     dims = (((1,), (0,)), ((), ()))
    ...     return jax_fp8.dot_general(x, w, dims, recipe="rowwise").sum()
    >>> jax.grad(loss)(w)[0, :3].tolist()
    [4.0, 4.0, 4.0]
    """
    return dot_general_of(
        "dot_general",
        lhs,
        rhs,
        dimension_numbers,
        precision,
        preferred_element_type,
        out_sharding=out_sharding,
        recipe=recipe,
        state=state,
        key=key,
        probe=probe,
        implementation=implementation,
    )


def dot_general_of(
    op: str,
    lhs: Any,
    rhs: Any,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    recipe: str | Recipe = "tensorwise",
    state: ScalingState | None = None,
    key: Any = None,
    probe: HealthProbe | None = None,
    implementation: str | None = None,
) -> Any:
    """``dot_general`` as a part of ``op``, the operation that errors name."""
    recipe = get_recipe(op, recipe)
    lhs, rhs = check_operand(op, "lhs", lhs), check_operand(op, "rhs", rhs)
    (contract, batch), shape = _check_dimensions(op, lhs, rhs, dimension_numbers)
    views = (view_of(lhs.ndim, contract[0], batch[0]), view_of(rhs.ndim, contract[1], batch[1]))
    out_dtype = _out_dtype(op, lhs, rhs, preferred_element_type)
    _check_recipe(op, recipe, lhs, rhs)
    check_state(op, recipe, state)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; accepted are {IMPLEMENTATIONS}"
        )
    if not isinstance(probe, HealthProbe | None):
        raise TypeError(f"{op}: probe must be a HealthProbe or None, got {describe(probe)}")
    apart = keeps_rows(recipe, tuple(lhs.shape[axis] for axis in views[0].free))
    sides = (_side(op, "lhs", lhs, views[0], apart=apart), _side(op, "rhs", rhs, views[1]))
    config = ProductConfig(
        op=op,
        recipe=recipe,
        contract_last=(views[0].contract_last, views[1].contract_last),
        dtypes=(_dtype_of(sides[0]), _dtype_of(sides[1])),
        out_dtype=out_dtype,
        precision="default" if precision_is_fast(op, precision) else "highest",
        implementation=implementation,
        placements=(_placement_of(sides[0]), _placement_of(sides[1])),
        outcome=_outcome(lhs, views, out_sharding, len(shape), apart),
    )
    y, amaxes = product(config)(
        *sides, _scales(recipe, state, sides), _raw_key(op, recipe, key), probe
    )
    spec = None if config.outcome else _result_spec(lhs, rhs, contract, batch)
    y = reshape(y, shape, spec)
    if out_sharding is not None:
        y = jax.sharding.reshard(y, out_sharding)
    if state is None:
        return y
    known = [amax if amax is not None else jnp.zeros((), jnp.float32) for amax in amaxes]
    return y, updated(recipe, state, *known)


def check_operand(op: str, name: str, x: Any) -> Any:
    """Returns an operand that has the type of one, a wide array as a jax.Array."""
    if isinstance(x, ScaledArray):
        return check_scaled_array(op, name, x)
    if isinstance(x, PreparedWeight):
        if name == "rhs":
            return x
        raise TypeError(f"{op}: a PreparedWeight is a right operand, got one as {name}")
    x = jnp.asarray(x)  # Of float64 a float32, as in lax, where jax_enable_x64 is off.
    if x.dtype not in WIDE_DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16 or float16, or a ScaledArray, got"
            f" {describe(x)}"
        )
    return x


def _check_dimensions(op: str, lhs: Any, rhs: Any, dimension_numbers: Any) -> Any:
    """The dimension numbers as tuples, contracted axes in the order of lhs; the result's shape."""
    dtype = jnp.bfloat16  # Of shapes alone is the question.
    try:
        (contract_l, contract_r), (batch_l, batch_r) = dimension_numbers
        shape = jax.eval_shape(
            lambda a, b: lax.dot_general(a, b, dimension_numbers),
            *(jax.ShapeDtypeStruct(x.shape, dtype) for x in (lhs, rhs)),
        ).shape
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{op}: dimension_numbers {dimension_numbers} do not fit lhs {describe(lhs)} and rhs"
            f" {describe(rhs)}: {error}"
        ) from error
    pairs = sorted(zip(map(int, contract_l), map(int, contract_r), strict=True))
    contract = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    batch = tuple(map(int, batch_l)), tuple(map(int, batch_r))
    return (contract, batch), shape


def _out_dtype(op: str, lhs: Any, rhs: Any, preferred: Any) -> jnp.dtype:
    if preferred is None:
        wide = [x.dtype for x in (lhs, rhs) if not isinstance(x, ScaledArray)]
        return jnp.dtype(jnp.result_type(*wide) if wide else jnp.bfloat16)
    if jnp.dtype(preferred) not in WIDE_DTYPES:
        raise TypeError(
            f"{op}: preferred_element_type must be float32, bfloat16 or float16, got"
            f" {jnp.dtype(preferred).name}"
        )
    return jnp.dtype(preferred)


def _check_recipe(op: str, recipe: Recipe, lhs: Any, rhs: Any) -> None:
    wide_lhs = None if isinstance(lhs, ScaledArray) else lhs
    if recipe.weight is None:
        for name, x in (("lhs", lhs), ("rhs", rhs)):
            if isinstance(x, ScaledArray | PreparedWeight):
                raise TypeError(
                    f"{op}: the recipe multiplies wide values, got {name} {describe(x)}"
                )
        return
    wide_gradient = recipe.dgrad is not None and recipe.dgrad[0] is None
    needs_16_bits = recipe.activation is None or wide_gradient
    if needs_16_bits and wide_lhs is not None and wide_lhs.dtype == jnp.float32:
        raise TypeError(
            f"{op}: the recipe multiplies 16-bit values by FP8 weights, and takes lhs of bfloat16"
            f" or float16, got {describe(lhs)}; cast it, or take another recipe"
        )
    if isinstance(rhs, PreparedWeight) and rhs.recipe != recipe:
        raise ValueError(f"{op}: rhs was prepared for {rhs.recipe}, not for {recipe}")


def _side(op: str, name: str, x: Any, view: View, *, apart: bool = False) -> Side:
    """The operand with three axes, or with several of rows that stay ``apart``."""
    if isinstance(x, PreparedWeight):
        if x.view != view:
            raise ValueError(
                f"{op}: {name} was prepared for contracting its axes {x.view.contract} with batch"
                f" axes {x.view.batch}, not {view.contract} and {view.batch}"
            )
        return x.side()
    if not isinstance(x, ScaledArray):
        return Side(view.apply(x, apart=apart))
    return Side(forward=view.apply_scaled(op, name, x, apart=apart))


def _dtype_of(side: Side) -> Any:
    return None if side.wide is None else side.wide.dtype


def _placement_of(side: Side) -> Any:
    return None if side.wide is None else placement(side.wide)


def _outcome(
    lhs: Any, views: tuple[View, View], out_sharding: Any, ndim: int, apart: bool
) -> Outcome | None:
    """How the result is to lie; None where that was not said, or it has other axes than y."""
    left, right = views
    if out_sharding is None or len(left.batch) > 1 or len(right.free) != 1:
        return None
    if not (apart or len(left.free) == 1):
        return None
    given = getattr(out_sharding, "spec", out_sharding)
    spec = (*given, *(None,) * (ndim - len(given)))
    spec = spec if left.batch else (None, *spec)
    return outcome(getattr(lhs, "data", lhs), left.free, left.contract, spec)


def _result_spec(lhs: Any, rhs: Any, contract: Any, batch: Any) -> Any:
    """How the result lies on an explicit mesh, or None."""
    values = [getattr(x, "data", getattr(x, "wide", x)) for x in (lhs, rhs)]
    if any(value is None for value in values):
        return None
    where = placement_of_product(values[0], values[1], contract, batch)
    return None if where is None else where.spec


def _scales(recipe: Recipe, state: ScalingState | None, sides: tuple[Side, Side]) -> Any:
    """The scales that are not dynamic, of operands that are still to be quantized."""

    def scale(operand: Any, amaxes: Any, side: Side) -> Any:
        if operand is None or operand.scaling == "dynamic" or side.forward is not None:
            return None
        return scale_from(recipe, operand, amaxes)

    if state is None:
        return None, None
    return (
        scale(recipe.activation, state.activation, sides[0]),
        scale(recipe.weight, state.weight, sides[1]),
    )


def _raw_key(op: str, recipe: Recipe, key: Any) -> Any:
    if recipe.needs_key and key is None:
        raise ValueError(f"{op}: the recipe rounds gradients stochastically: key must be given")
    if key is not None and not recipe.needs_key:
        raise ValueError(f"{op}: the recipe rounds nothing stochastically, and takes no key")
    return None if key is None else key_words(op, key)
