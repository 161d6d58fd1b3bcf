"""quantize and dequantize: wide arrays to ScaledArrays and back."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src import ffi, plans
from jax_fp8._src.batching import with_axis
from jax_fp8._src.numerics import (
    absolute_max,
    as_rounded,
    dynamic_scale,
    inverse,
    round_saturate,
    round_stochastic,
)
from jax_fp8._src.partition import Axes, Rule, all_max, axes_of, in_units, name_of, partition
from jax_fp8._src.scaled_array import (
    Granularity,
    ScaledArray,
    block_shape,
    check_fp8_dtype,
    check_granularity,
    check_rank,
    check_scaled_array,
    expand_scale,
    scale_shape,
)
from jax_fp8._src.undifferentiable import undifferentiable

WIDE_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
IMPLEMENTATIONS = (None, "kernel", "xla")


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """The static part of a call: everything but the arrays."""

    dtype: jnp.dtype
    granularity: Granularity
    static: bool
    amax: bool
    implementation: str | None
    #: Leading axes that vmap put in front: each entry is quantized as if it were alone.
    batch_dims: int = 0
    #: Whether dynamic scales are rounded up to a power of two.
    power_of_two: bool = False

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of an operand of ``shape``, the leading batch axes included."""
        batch = shape[: self.batch_dims]
        return (*batch, *scale_shape(shape[self.batch_dims :], self.granularity))


def amax_of(x: jax.Array, granularity: Granularity) -> jax.Array:
    """The amax under each scale."""
    rows, columns = block_shape(granularity)
    if granularity == "tensor":
        return absolute_max(x, keepdims=True)
    if granularity == "row":
        return absolute_max(x, axis=-1, keepdims=True)
    shape = scale_shape(x.shape, granularity)
    padding = [(0, 0)] * x.ndim
    padding[-1] = (0, shape[-1] * columns - x.shape[-1])
    if rows > 1:
        padding[-2] = (0, shape[-2] * rows - x.shape[-2])
    x = jnp.pad(x, padding)
    tiles = (*shape[:-2], shape[-2], rows, shape[-1], columns) if x.ndim > 1 else (*shape, columns)
    return absolute_max(x.reshape(tiles), axis=(-3, -1) if x.ndim > 1 else -1)


def reference(
    config: QuantizeConfig, x: jax.Array, scale: jax.Array, bits: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The definition in plain JAX: the oracle of the tests, and what the CPU runs.

    ``bits`` of ``round_stochastic`` take the place of rounding to nearest; not with batch_dims.
    """
    if config.batch_dims:
        inner = dataclasses.replace(config, batch_dims=config.batch_dims - 1)
        return jax.vmap(functools.partial(reference, inner))(x, scale)
    wide = x.astype(jnp.float32)
    amax = amax_of(wide, config.granularity)
    if not config.static:
        scale = dynamic_scale(amax, config.dtype, config.power_of_two)
    factor = expand_scale(inverse(scale), x.shape, config.granularity)
    if bits is not None:
        return round_stochastic(wide, factor, bits, config.dtype), scale, amax
    return round_saturate(wide, factor, config.dtype), scale, amax


def _kernel(
    config: QuantizeConfig, x: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The handler, which knows (batch, rows, columns) only."""
    out_shape = config.scale_shape(x.shape)
    batch, own = x.shape[: config.batch_dims], x.shape[config.batch_dims :]
    count = math.prod(batch)
    if config.granularity == "tensor":
        shape3: tuple[int, ...] = (count, 1, math.prod(own))
        scale3: tuple[int, ...] = (count, 1, 1)
    else:
        leading = math.prod(own[:-2])
        rows, columns = (own[-2] if len(own) > 1 else 1), own[-1]
        if block_shape(config.granularity)[0] == 1:  # rows know nothing of each other
            shape3 = (1, count * leading * rows, columns)
        else:
            shape3 = (count * leading, rows, columns)
        scale3 = scale_shape(shape3, config.granularity)
    data, new_scale, amax = ffi.quantize(
        x.reshape(shape3),
        scale.reshape(scale3) if config.static else None,
        dtype=config.dtype,
        block=block_shape(config.granularity),
        scale_shape=scale3,
        amax=config.amax,
        power_of_two=config.power_of_two,
    )
    amax = amax.reshape(out_shape) if amax.size == new_scale.size else new_scale.reshape(out_shape)
    return data.reshape(x.shape), new_scale.reshape(out_shape), amax


def _xla(config: QuantizeConfig, x: jax.Array, scale: jax.Array) -> Any:
    plans.record_traced(
        "quantize",
        platform="any" if config.implementation == "xla" else "cpu",
        shape=x.shape,
        dtypes=(x.dtype.name, config.dtype.name),
        granularity=config.granularity,
    )
    return as_rounded(reference(config, x, scale), config.implementation)


def quantize_local(config: QuantizeConfig, x: jax.Array, scale: jax.Array, *, axes: Axes) -> Any:
    """Runs on the operands of one device, whatever mesh they came from."""
    across = axes_of(shared_factors(config, x.ndim), axes)
    if across and not config.static:
        amax = all_max(over_entries(config, amax_of_wide)(x), across)
        scale = dynamic_scale(amax, config.dtype, config.power_of_two)
        static = dataclasses.replace(config, static=True, amax=False, power_of_two=False)
        data, scale, _ = quantize_local(static, x, scale, axes={})
        return data, scale, amax
    xla, kernel = functools.partial(_xla, config), functools.partial(_kernel, config)
    if config.implementation == "xla":
        found = xla(x, scale)
    elif config.implementation == "kernel":
        found = kernel(x, scale)
    else:
        found = lax.platform_dependent(x, scale, cpu=xla, cuda=kernel)
    if across and config.amax:
        found = (*found[:2], all_max(found[2], across))
    return found


def amax_of_wide(config: Any, x: jax.Array) -> jax.Array:
    return amax_of(x.astype(jnp.float32), config.granularity)


def over_entries(config: Any, function: Any) -> Any:
    """The function of one entry, over the batch axes."""
    run = functools.partial(function, config)
    for _ in range(config.batch_dims):
        run = jax.vmap(run)
    return run


def shared_factors(config: Any, ndim: int) -> tuple[str, ...]:
    """The factors of ``quantize_rule`` along which more than a block shares a scale."""
    if config.granularity == "tensor":
        return tuple(f"d{i}" for i in range(config.batch_dims, ndim))
    return (f"d{ndim - 1}",) if config.granularity == "row" else ()


def quantize_rule(config: QuantizeConfig, x: Any, scale: Any) -> Rule:
    """Every axis can be divided, but for one whose blocks do not come out even."""
    dimensions: list[str | None] = [f"d{i}" for i in range(x.ndim)]
    sizes = {f"d{i}": size for i, size in enumerate(x.shape)}
    units: dict[str, int] = {}
    if config.granularity == "tensor":
        of_scale = dimensions[: config.batch_dims] + [None] * (x.ndim - config.batch_dims)
    else:
        of_scale = list(dimensions)
        for axis, block in zip((-2, -1), block_shape(config.granularity), strict=True):
            if block == 0:
                of_scale[axis] = None
            elif block > 1:
                in_units(dimensions, axis, block, sizes, units)
                of_scale[axis] = name_of(dimensions[axis])
    data, scales = tuple(dimensions), tuple(of_scale)
    given = scales if config.static else data[: config.batch_dims]
    return Rule((data, given), (data, scales, scales), sizes, units)


@functools.cache
def _operation(config: QuantizeConfig) -> Any:
    """custom_vjp -> custom_vmap -> partition -> platform, for one configuration."""
    batched = jax.custom_batching.custom_vmap(
        partition(
            functools.partial(quantize_local, config),
            functools.partial(quantize_rule, config),
        )
    )

    @batched.def_vmap
    def _vmap(axis_size: int, in_batched: list[bool], x: jax.Array, scale: jax.Array) -> Any:
        deeper = dataclasses.replace(config, batch_dims=config.batch_dims + 1)
        front = functools.partial(with_axis, size=axis_size)
        out = _operation(deeper)(front(x, in_batched[0]), front(scale, in_batched[1]))
        return out, (True, True, True)

    return undifferentiable(
        batched,
        "quantize: it cannot be differentiated; dot_general, einsum and matmul can, or put"
        " jax.lax.stop_gradient around its operand",
    )


def static_scale(
    op: str, scale: Any, shape: tuple[int, ...], granularity: Granularity
) -> jax.Array:
    """Returns a given scale as float32 in the shape that data of ``shape`` needs, or raises."""
    scale = jnp.asarray(scale)
    if not jnp.issubdtype(scale.dtype, jnp.floating) or scale.dtype.itemsize > 4:
        raise TypeError(f"{op}: scale must be float32, got {scale.dtype}")
    want = scale_shape(shape, granularity)
    if scale.shape != want and not (granularity == "tensor" and scale.size == 1):
        raise ValueError(
            f"{op}: scale of shape {scale.shape} does not fit x of shape {shape} with"
            f" granularity {granularity!r}, which takes {want}"
        )
    return scale.astype(jnp.float32).reshape(want)


def quantize(
    x: jax.Array,
    *,
    dtype: Any = jnp.float8_e4m3fn,
    granularity: Granularity = "tensor",
    scale: Any = None,
    power_of_two: bool = False,
    return_amax: bool = False,
    implementation: str | None = None,
) -> Any:
    """Quantizes a wide array to FP8 with float32 scales.

    The scale is ``max(amax / max, 2^-126)``, 1 where the amax is 0, with max the largest finite
    value of ``dtype`` (448 or 57344); the data is ``x * (1 / scale)`` in float32, rounded to
    nearest even and saturated. NaN stays NaN, an infinity becomes NaN, and a NaN or an infinity
    among the values that a dynamic scale is taken from makes that scale and its data NaN.

    Of an ``x`` that is sharded over a mesh the amax is that of all devices, and the values are
    those of one device; inside ``jax.shard_map`` it is that of the part at hand.

    Args:
      x: ``(..., R, K)``; float32, bfloat16 or float16.
      dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
      granularity: what shares a scale: ``"tensor"`` (all of ``x``), ``"row"`` (each vector along
        the last axis), ``(1, 128)`` or ``(128, 128)`` (blocks of the last one or two axes).
      scale: None for dynamic scaling; else the float32 scale to use, of the shape that
        ``ScaledArray`` states (a scalar will do for ``"tensor"``).
      power_of_two: rounds dynamic scales up to a power of two.
      return_amax: also return the amax of ``x`` under each scale, float32 in ``scale``'s shape.
      implementation: ``"kernel"`` (this library's handler, on the GPU and on the CPU), ``"xla"``
        (plain JAX), or None: the kernel on a GPU and XLA on a CPU. All give the same bits, but
        that XLA's CPU backend takes subnormal float32 values as zero.

    Returns:
      A ScaledArray, or (ScaledArray, amax).

    Raises:
      TypeError: for dtypes other than the above.
      ValueError: for an unknown granularity or implementation, a rank without such blocks, a
        scale that does not fit, or one together with ``power_of_two``.
      NotImplementedError: under differentiation.

    >>> import jax.numpy as jnp, jax_fp8
    >>> xq = jax_fp8.quantize(jnp.array([[1.0, -3.5]]))
    >>> float(xq.scale[0, 0]), jax_fp8.dequantize(xq).tolist()
    (0.0078125, [[1.0, -3.5]])
    """
    x = jnp.asarray(x)
    if x.dtype not in WIDE_DTYPES:
        raise TypeError(f"quantize: x must be float32, bfloat16 or float16, got {x.dtype}{x.shape}")
    dtype = check_fp8_dtype("quantize", "dtype", dtype)
    granularity = check_granularity("quantize", granularity)
    check_rank("quantize", "x", x.ndim, granularity)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"quantize: unknown implementation {implementation!r}; accepted are {IMPLEMENTATIONS}"
        )
    if scale is not None and power_of_two:
        raise ValueError("quantize: power_of_two is for dynamic scales, and scale is given")
    config = QuantizeConfig(
        dtype,
        granularity,
        scale is not None,
        return_amax,
        implementation,
        power_of_two=bool(power_of_two),
    )
    if scale is None:  # a placeholder, so that there is one signature to batch and partition
        given = jnp.zeros((), jnp.float32)
    else:
        given = static_scale("quantize", scale, x.shape, granularity)
    data, new_scale, amax = _operation(config)(x, given)
    quantized = ScaledArray(data, new_scale, granularity)
    return (quantized, amax) if return_amax else quantized


def dequantize(x: ScaledArray, dtype: Any = jnp.float32) -> jax.Array:
    """The values ``data * scale``, multiplied in float32 and rounded to ``dtype``.

    Args:
      x: a ScaledArray of any granularity.
      dtype: float32, bfloat16 or float16.

    Returns:
      An array of ``x``'s shape.

    Raises:
      TypeError: when ``x`` is no ScaledArray or ``dtype`` is none of these.
      ValueError: when the scale does not fit the data.
    """
    check_scaled_array("dequantize", "x", x)
    if jnp.dtype(dtype) not in WIDE_DTYPES:
        raise TypeError(f"dequantize: dtype must be float32, bfloat16 or float16, got {dtype}")
    values = x.data.astype(jnp.float32) * expand_scale(x.scale, x.shape, x.granularity)
    return values.astype(dtype)
