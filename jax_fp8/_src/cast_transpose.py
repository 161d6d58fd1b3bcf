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
from jax_fp8._src.cast_transpose_rule import (
    CastTransposeConfig,
    cast_transpose_rule,
    rows_apart,
    rows_together,
    shared_factors,
)
from jax_fp8._src.numerics import as_rounded, dynamic_scale, random_bits
from jax_fp8._src.partition import Axes, all_max, axes_of, partition
from jax_fp8._src.quantize import (
    IMPLEMENTATIONS,
    WIDE_DTYPES,
    QuantizeConfig,
    amax_of_wide,
    over_entries,
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
from jax_fp8._src.undifferentiable import undifferentiable


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
    config: CastTransposeConfig,
    x: jax.Array,
    scale: jax.Array,
    key: jax.Array,
    known: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The handler, which knows (batch, rows, columns) only; ``known`` as ``ffi`` has it."""
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
        known=known,
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
    _record(config, operands[0])
    return as_rounded(_reference(config, *operands), config.implementation)


def _record(config: CastTransposeConfig, x: jax.Array) -> None:
    plans.record_traced(
        "cast_transpose",
        platform="any" if config.implementation == "xla" else "cpu",
        shape=x.shape,
        dtypes=(x.dtype.name, config.dtype.name),
        granularity=config.granularity,
        layouts=config.layouts,
    )


def _local(
    config: CastTransposeConfig, x: jax.Array, scale: jax.Array, key: jax.Array, *, axes: Axes
) -> Any:
    """Runs on the operands of one device, whatever mesh they came from."""
    if config.row_axes > 1:
        one = dataclasses.replace(config, row_axes=1)
        together, scale, axes = rows_together(config, x, scale, axes)
        return rows_apart(config, x.shape, _local(one, together, scale, key, axes=axes))
    entries = [f"d{i}" for i in range(config.batch_dims)]
    within = axes_of([factor for factor in axes if factor not in entries], axes)
    if config.stochastic and within:
        # Each part of an entry has bits of its own, and so not those that the whole would have.
        key = _fold_in(key, lax.axis_index(within))
    if not config.static:
        across = {
            name: axes_of(shared_factors(config, name, x.ndim), axes) for name in config.layouts
        }
        if any(across.values()):
            if config.granularity == "row":
                return _rows_across(config, x, key, across)
            amax = all_max(over_entries(config, amax_of_wide)(x), across[config.layouts[0]])
            scale = dynamic_scale(amax, config.dtype, config.power_of_two)
            static = dataclasses.replace(config, static=True, power_of_two=False, amax=False)
            results = _run(static, x, scale, key)
            return (*results, amax) if config.amax else results
    results = _run(config, x, scale, key)
    if config.amax and within:
        results = (*results[:-1], all_max(results[-1], within))
    return results


def _run(config: CastTransposeConfig, *operands: jax.Array) -> Any:
    return _by_platform(config, (_xla, _kernel), *operands)


def _by_platform(config: CastTransposeConfig, pair: tuple[Any, Any], *operands: jax.Array) -> Any:
    """Runs plain JAX or the kernel, as the configuration says or else the platform."""
    xla, kernel = (functools.partial(function, config) for function in pair)
    if config.implementation == "xla":
        return xla(*operands)
    if config.implementation == "kernel":
        return kernel(*operands)
    return lax.platform_dependent(*operands, cpu=xla, cuda=kernel)


def _rows_across(
    config: CastTransposeConfig, x: jax.Array, key: jax.Array, across: dict[str, tuple[str, ...]]
) -> tuple[jax.Array, ...]:
    """Row scales where one layout's rows, or both's, are spread over devices.

    The kernel's two reads, with the maximum over devices between them.
    """
    amaxes = dict(zip(("straight", "transposed"), _by_platform(config, _LINES, x), strict=True))
    wanted = [
        all_max(amaxes[name], across[name]) if across[name] else amaxes[name]
        for name in config.layouts
    ]
    return tuple(_by_platform(config, _KNOWN, x, key, *wanted))


def _lines_xla(config: CastTransposeConfig, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The amaxes of the rows of each layout, (..., R, 1) and (..., C, 1)."""
    amax_of = over_entries(config, amax_of_wide)
    return amax_of(x), amax_of(x.mT)


def _lines_kernel(config: CastTransposeConfig, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    *leading, rows, columns = x.shape
    amaxes = ffi.line_amaxes(x.reshape(math.prod(leading), rows, columns))
    count = math.prod(leading) * rows
    return amaxes[:count].reshape(*leading, rows, 1), amaxes[count:].reshape(*leading, columns, 1)


def _known_xla(
    config: CastTransposeConfig, x: jax.Array, key: jax.Array, *amaxes: jax.Array
) -> tuple[jax.Array, ...]:
    """Data and scale of each layout, given the amaxes of its rows."""
    _record(config, x)
    results: list[jax.Array] = []
    for name, amax in zip(config.layouts, amaxes, strict=True):
        scale = dynamic_scale(amax, config.dtype, config.power_of_two)
        cast = over_entries(config, functools.partial(_cast_known, name))
        results += [cast(x, scale, key), scale]
    return tuple(results)


def _cast_known(
    name: str, config: CastTransposeConfig, x: jax.Array, scale: jax.Array, key: jax.Array
) -> jax.Array:
    bits = random_bits(key, x.shape) if config.stochastic else None
    if name == "transposed":
        x, bits = x.mT, None if bits is None else bits.mT
    alone = dataclasses.replace(config.given, batch_dims=0)
    return reference(alone, x, scale, bits)[0]


def _known_kernel(
    config: CastTransposeConfig, x: jax.Array, key: jax.Array, *amaxes: jax.Array
) -> tuple[jax.Array, ...]:
    *leading, rows, columns = x.shape
    counts = (("straight", rows), ("transposed", columns))
    lines = {name: jnp.zeros(math.prod(leading) * each) for name, each in counts}
    lines |= {name: amax.reshape(-1) for name, amax in zip(config.layouts, amaxes, strict=True)}
    return _kernel(config, x, x, key, known=jnp.concatenate(list(lines.values())))


#: What the CPU runs, and the kernel.
_LINES, _KNOWN = (_lines_xla, _lines_kernel), (_known_xla, _known_kernel)


def _fold_in(key: jax.Array, index: jax.Array) -> jax.Array:
    """The words of as many keys, each for a part of its own."""
    words = key.reshape(-1, 2)
    folded = jax.vmap(
        lambda one: jax.random.key_data(
            jax.random.fold_in(jax.random.wrap_key_data(one, impl="threefry2x32"), index)
        )
    )(words)
    return folded.reshape(key.shape)


@functools.cache
def _operation(config: CastTransposeConfig) -> Any:
    """custom_vjp -> custom_vmap -> partition -> platform, for one configuration."""
    batched = jax.custom_batching.custom_vmap(
        partition(functools.partial(_local, config), functools.partial(cast_transpose_rule, config))
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

    return undifferentiable(
        batched,
        "cast_transpose: it cannot be differentiated; put jax.lax.stop_gradient around its"
        " operands",
    )


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


def cast_layouts(
    config: CastTransposeConfig, x: jax.Array, scale: Any, words: jax.Array | None
) -> Any:
    """What ``cast_transpose`` returns, of checked operands; ``words`` are those of a key."""
    # Placeholders, so that there is one signature to batch and partition.
    given = jnp.zeros((), jnp.float32)
    if scale is not None:
        given = static_scale("cast_transpose", scale, x.shape, config.granularity)
    words = jnp.zeros((2,), jnp.uint32) if words is None else words
    results = list(_operation(config)(x, given, words))
    layouts = [
        ScaledArray(results.pop(0), results.pop(0), config.granularity) if asked else None
        for asked in (config.straight, config.transposed)
    ]
    return (*layouts, results[0]) if config.amax else tuple(layouts)


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
      NotImplementedError: under differentiation.

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
    words = None if key is None else key_words(op, key)
    return cast_layouts(config, x, scale, words)
