"""cast_transpose: a wide array and its transpose to FP8, from one read."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src import ffi, plans
from jax_fp8._src.numerics import random_bits
from jax_fp8._src.partition import partition
from jax_fp8._src.quantize import (
    IMPLEMENTATIONS,
    WIDE_DTYPES,
    QuantizeConfig,
    reference,
    static_scale,
)
from jax_fp8._src.scaled_array import (
    Granularity,
    ScaledArray,
    block_shape,
    check_fp8_dtype,
    check_granularity,
    scale_shape,
)


@dataclasses.dataclass(frozen=True)
class CastTransposeConfig:
    """The static part of a call: everything but the arrays."""

    dtype: jnp.dtype
    granularity: Granularity
    static: bool
    power_of_two: bool
    stochastic: bool
    straight: bool
    transposed: bool
    amax: bool
    implementation: str | None
    #: Leading axes that vmap put in front: each entry is cast as if it were alone.
    batch_dims: int = 0

    @property
    def layouts(self) -> tuple[str, ...]:
        """Those that are asked for."""
        return ("straight",) * self.straight + ("transposed",) * self.transposed


def _reference(
    config: CastTransposeConfig, x: jax.Array, scale: jax.Array, key: jax.Array
) -> tuple[jax.Array, ...]:
    """The definition in plain JAX: the oracle of the tests, and what the CPU runs.

    Its results, as those of the kernel: data and scale of each layout asked for, and the amax.
    """
    if config.batch_dims:
        inner = dataclasses.replace(config, batch_dims=config.batch_dims - 1)
        return jax.vmap(functools.partial(_reference, inner))(x, scale, key)
    quantized = QuantizeConfig(
        config.dtype,
        config.granularity,
        config.static,
        config.amax,
        config.implementation,
        power_of_two=config.power_of_two,
    )
    bits = random_bits(key, x.shape) if config.stochastic else None
    results: list[jax.Array] = []
    amax: jax.Array | None = None
    if config.straight:
        *straight, amax = reference(quantized, x, scale, bits)
        results += straight
    if config.transposed:
        turned = None if bits is None else jnp.swapaxes(bits, -1, -2)
        *transposed, amax = reference(quantized, jnp.swapaxes(x, -1, -2), scale, turned)
        results += transposed
    assert amax is not None
    return (*results, amax) if config.amax else tuple(results)


def _kernel(
    config: CastTransposeConfig, x: jax.Array, scale: jax.Array, key: jax.Array
) -> tuple[jax.Array, ...]:
    """The handler, which knows (batch, rows, columns) only."""
    batch, own = x.shape[: config.batch_dims], x.shape[config.batch_dims :]
    count = math.prod(batch)
    rows, columns = own[-2:]
    shape3 = (count * math.prod(own[:-2]), rows, columns)
    turned3 = (shape3[0], columns, rows)
    if config.granularity == "tensor":
        scale_shapes: Any = ((count, 1, 1),) * 2
    else:
        scale_shapes = tuple(scale_shape(one, config.granularity) for one in (shape3, turned3))
    data, turned, data_scale, turned_scale, amax = ffi.cast_transpose(
        x.reshape(shape3),
        scale.reshape(count, 1, 1) if config.static else None,
        key.reshape(count, 2) if config.stochastic else None,
        entries=count,
        dtype=config.dtype,
        block=block_shape(config.granularity),
        scale_shapes=scale_shapes,
        layouts=(config.straight, config.transposed),
        power_of_two=config.power_of_two,
        amax=config.amax,
    )
    results: list[jax.Array] = []
    if config.straight:
        results += [
            data.reshape(x.shape),
            data_scale.reshape(*batch, *scale_shape(own, config.granularity)),
        ]
    if config.transposed:
        shape = (*own[:-2], columns, rows)
        results += [
            turned.reshape(*batch, *shape),
            turned_scale.reshape(*batch, *scale_shape(shape, config.granularity)),
        ]
    if config.amax:
        results.append(amax.reshape(*batch, *(1,) * len(own)))
    return tuple(results)


def _xla(config: CastTransposeConfig, *operands: jax.Array) -> tuple[jax.Array, ...]:
    x = operands[0]
    plans.record_traced(
        "cast_transpose",
        platform="any" if config.implementation == "xla" else "cpu",
        shape=x.shape,
        dtypes=(x.dtype.name, config.dtype.name),
        granularity=config.granularity,
        layouts=config.layouts,
    )
    return _reference(config, *operands)


def _local(config: CastTransposeConfig, *operands: jax.Array) -> Any:
    """Runs on the operands of one device, whatever mesh they came from."""
    xla, kernel = functools.partial(_xla, config), functools.partial(_kernel, config)
    if config.implementation == "xla":
        return xla(*operands)
    if config.implementation == "kernel":
        return kernel(*operands)
    return lax.platform_dependent(*operands, cpu=xla, cuda=kernel)


@functools.cache
def _operation(config: CastTransposeConfig) -> Any:
    """custom_vjp -> custom_vmap -> partition -> platform, for one configuration."""
    batched = jax.custom_batching.custom_vmap(
        partition("cast_transpose", functools.partial(_local, config))
    )

    @batched.def_vmap
    def _vmap(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> Any:
        deeper = dataclasses.replace(config, batch_dims=config.batch_dims + 1)
        out = _operation(deeper)(
            *(
                array if is_batched else jnp.broadcast_to(array, (axis_size, *array.shape))
                for array, is_batched in zip(operands, in_batched, strict=True)
            )
        )
        return out, (True,) * len(out)

    differentiable = jax.custom_vjp(batched)

    def forward(*operands: jax.Array) -> Any:
        raise NotImplementedError(
            "cast_transpose: it cannot be differentiated; put jax.lax.stop_gradient around its"
            " operands"
        )

    differentiable.defvjp(forward, lambda residuals, cotangents: cotangents)
    return jax.jit(differentiable, inline=True)


def key_words(op: str, key: Any) -> jax.Array:
    """The two words of a threefry key, or raises a TypeError."""
    accepted = "a jax.random.key of impl 'threefry2x32', or the uint32[2] of one"
    if not hasattr(key, "dtype") or not hasattr(key, "shape"):
        raise TypeError(f"{op}: key must be {accepted}, got a {type(key).__name__}")
    seen = f"{key.dtype}{tuple(key.shape)}"
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if str(jax.random.key_impl(key)) != "threefry2x32" or key.shape != ():
            raise TypeError(f"{op}: key must be {accepted}, got {seen}")
        return jax.random.key_data(key)
    if key.dtype != jnp.uint32 or tuple(key.shape) != (2,):
        raise TypeError(f"{op}: key must be {accepted}, got {seen}")
    return jnp.asarray(key)


def cast_transpose(
    x: jax.Array,
    *,
    dtype: Any = jnp.float8_e4m3fn,
    granularity: Granularity = "tensor",
    scale: Any = None,
    power_of_two: bool = False,
    key: Any = None,
    straight: bool = True,
    transposed: bool = True,
    return_amax: bool = False,
    implementation: str | None = None,
) -> Any:
    """Quantizes a wide array and its transpose: both operands that training makes of it.

    ``quantize`` says what becomes of the values. The transpose is quantized on its own: with
    ``"row"`` it has a scale for each column of ``x``, its blocks of ``(1, 128)`` run down the
    columns, and only with ``"tensor"`` and ``(128, 128)`` do both have the same codes.

    Args:
      x: ``(..., R, C)``; float32, bfloat16 or float16.
      dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
      granularity: what shares a scale, as in ``quantize``.
      scale: None for dynamic scaling; else, with ``"tensor"``, the float32 scale to use.
      power_of_two: rounds dynamic scales up to a power of two.
      key: None rounds to nearest even. A threefry key of ``jax.random`` rounds stochastically: up
        or down, with 16 random bits, so that the mean is the value. Both layouts use the same bits
        for an element of ``x``, and under ``jax.vmap`` each entry has those it has alone.
      straight: whether ``x`` itself is wanted.
      transposed: whether the transpose is.
      return_amax: also return the amax of ``x``, float32 of shape ``(1, ...)``; with ``"tensor"``.
      implementation: ``"kernel"`` (this library's handler, on the GPU and on the CPU), ``"xla"``
        (plain JAX), or None: the kernel on a GPU and XLA on a CPU. All give the same bits, but
        that XLA's CPU backend takes subnormal float32 values as zero.

    Returns:
      (ScaledArray of ``x``'s shape, ScaledArray of ``(..., C, R)``), None for one that is not
      wanted; and the amax as a third.

    Raises:
      TypeError: for dtypes or a key other than the above.
      ValueError: for an unknown granularity or implementation, a rank below 2, a scale that does
        not fit, one together with ``power_of_two``, an amax of another granularity than
        ``"tensor"``, or no layout at all.
      NotImplementedError: under differentiation, or for an operand that is sharded over an
        explicit mesh.

    >>> import jax.numpy as jnp, jax_fp8
    >>> xq, xt = jax_fp8.cast_transpose(jnp.array([[1.0, -2.0], [4.0, 0.5]]), granularity="row")
    >>> jax_fp8.dequantize(xt).tolist(), (xt.scale * 448).tolist()
    ([[1.0, 4.0], [-2.0, 0.5]], [[4.0], [2.0]])
    """
    op = "cast_transpose"
    x = jnp.asarray(x)
    if x.dtype not in WIDE_DTYPES:
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16, got {x.dtype}{x.shape}")
    dtype = check_fp8_dtype(op, "dtype", dtype)
    granularity = check_granularity(op, granularity)
    if x.ndim < 2:
        raise ValueError(f"{op}: x must have rows and columns, got rank {x.ndim}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; accepted are {IMPLEMENTATIONS}"
        )
    if not (straight or transposed):
        raise ValueError(f"{op}: at least one of straight and transposed must be asked for")
    for what, asked in (("a static scale is", scale is not None), ("an amax is", return_amax)):
        if asked and granularity != "tensor":
            raise ValueError(f"{op}: {what} for granularity 'tensor', got {granularity!r}")
    if scale is not None and power_of_two:
        raise ValueError(f"{op}: power_of_two is for dynamic scales, and scale is given")
    config = CastTransposeConfig(
        dtype,
        granularity,
        scale is not None,
        bool(power_of_two),
        key is not None,
        bool(straight),
        bool(transposed),
        bool(return_amax),
        implementation,
    )
    # Placeholders, so that there is one signature to batch and partition.
    given = jnp.zeros((), jnp.float32)
    if scale is not None:
        given = static_scale(op, scale, x.shape, granularity)
    words = jnp.zeros((2,), jnp.uint32) if key is None else key_words(op, key)
    results = list(_operation(config)(x, given, words))
    layouts = [
        ScaledArray(results.pop(0), results.pop(0), granularity) if asked else None
        for asked in (straight, transposed)
    ]
    return (*layouts, results[0]) if return_amax else tuple(layouts)
