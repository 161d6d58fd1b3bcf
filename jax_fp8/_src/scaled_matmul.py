"""scaled_matmul: the product of two ScaledArrays."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src import ffi, plans
from jax_fp8._src.batching import batch_product
from jax_fp8._src.definition import CallConfig, finish, reference
from jax_fp8._src.epilogue import with_gradients
from jax_fp8._src.folding import fold
from jax_fp8._src.numerics import as_rounded, inverse
from jax_fp8._src.partition import Axes, all_max, axes_of, partition
from jax_fp8._src.placement import placement
from jax_fp8._src.product_rule import product_rule, summed_factors
from jax_fp8._src.quantize import WIDE_DTYPES
from jax_fp8._src.scaled_array import (
    BLOCK,
    FP8_DTYPES,
    ScaledArray,
    block_shape,
    check_scaled_array,
)
from jax_fp8._src.undifferentiable import undifferentiable

IMPLEMENTATIONS = (None, "cublaslt", "small_m", "decode", "naive", "xla")
ACTIVATIONS = (None, "relu", "gelu")
_FAST = {
    None: True,
    "default": True,
    "fastest": True,
    "high": False,
    "float32": False,
    "highest": False,
}


FP8_HAS_NO_GRADIENT = "an FP8 result has no gradient; ask for a wide one and quantize that"

#: The compute capability that calls pretend (as 89 for 8.9), 0 for the device's own. Tests set it
#: to run the branches of other GPUs; it goes into CallConfig, and so into the key of every cache.
_forced_capability = 0


def _pad(array: jax.Array, rows: int, columns: int) -> jax.Array:
    """Appends zeros to (B, R, C) until R and C are multiples of ``rows`` and ``columns``."""
    add = [(0, 0), (0, -array.shape[1] % rows), (0, -array.shape[2] % columns)]
    return jnp.pad(array, add) if any(more for _, more in add) else array


def _kernel(config: CallConfig, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The handler. What cublasLt wants of N and K is static, so it is settled here, by padding.

    cublasLt reads K in steps of 16 bytes and writes rows of D that start at multiples of 16
    bytes. Zeros appended to K add nothing to the sums; columns appended to N are cut off again,
    and so are rows appended to M, of which block scales want 4.
    """
    x, x_scale, w, w_scale, bias, inverse_out_scale = operands
    m, n = x.shape[1], w.shape[1]
    nothing = jnp.zeros((0,), jnp.float32)
    is_wide = x.dtype not in FP8_DTYPES
    cublaslt = config.implementation in (None, "cublaslt") and not is_wide
    if cublaslt and 0 not in (x.shape[1], n, x.shape[2]):
        align_n = 16 // config.out_dtype.itemsize
        if config.implementation == "cublaslt" and config.has_blocks:
            least_m = max(m, 4)
            x = jnp.pad(x, ((0, 0), (0, least_m - m), (0, 0)))
            if config.x_granularity in ("row", (1, BLOCK)):
                x_scale = jnp.pad(x_scale, ((0, 0), (0, least_m - m), (0, 0)))
        x, w = _pad(x, 1, 16), _pad(w, align_n, 16)
        added = w.shape[1] - n
        if added and config.has_bias:
            bias = jnp.pad(bias, (0, added))
        if added and config.w_granularity in ("row", (1, BLOCK)):
            w_scale = jnp.pad(w_scale, ((0, 0), (0, added), (0, 0)))
    data, amax, _ = ffi.scaled_matmul(
        (
            *(x, x_scale, w, w_scale),
            bias if config.has_bias else nothing,
            inverse_out_scale if config.is_fp8 else nothing,
        ),
        out_dtype=config.out_dtype,
        blocks=(block_shape(config.x_granularity), block_shape(config.w_granularity)),
        activation=config.activation or "none",
        fast=config.fast,
        implementation=config.implementation or "",
        capability=config.capability,
        workspace=cublaslt,
    )
    return data[:, :m, :n], amax if config.is_fp8 else inverse_out_scale


def _xla(config: CallConfig, *operands: jax.Array) -> Any:
    x, _, w, *_ = operands
    plans.record_traced(
        "scaled_matmul",
        platform="any" if config.implementation == "xla" else "cpu",
        shape=(x.shape[0], x.shape[1], w.shape[1], x.shape[2]),
        dtypes=(x.dtype.name, w.dtype.name, config.out_dtype.name),
        granularity=(config.x_granularity, config.w_granularity),
    )
    results = reference(config, *operands)
    return as_rounded(results, config.implementation) if config.is_fp8 else results


def on_device(config: CallConfig, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The product on one device, of operands of any rank, by what knows three axes."""
    x_data, x_scale, w_data, w_scale, *rest = operands
    batch, count = w_data.shape[: config.batch_dims], config.contracted
    shape = (*x_data.shape[:-count], w_data.shape[-1 - count])
    x = fold(x_data, x_scale, config.x_granularity, batch, count)
    w = fold(w_data, w_scale, config.w_granularity, batch, count)
    config = dataclasses.replace(
        config,
        x_granularity=x.granularity,
        w_granularity=w.granularity,
        batch_dims=1,
        contracted=1,
    )
    xla, kernel = functools.partial(_xla, config), functools.partial(_kernel, config)
    folded = (x.data, x.scale, w.data, w.scale, *rest)
    if config.implementation == "xla":
        y, amax = xla(*folded)
    elif config.implementation is None:
        y, amax = lax.platform_dependent(*folded, cpu=xla, cuda=kernel)
    else:
        y, amax = kernel(*folded)
    return y.reshape(shape), amax


def _local(config: CallConfig, *operands: jax.Array, axes: Axes) -> Any:
    """Runs on the operands of one device, whatever mesh they came from."""
    summed = summed_factors(config)
    across = axes_of(summed, axes)
    if not across:
        y, amax = on_device(config, *operands)
    else:
        # Each device has a part of every sum. They travel in the dtype of the result, but in
        # float32 where something is still to be done to them.
        is_unfinished = config.has_bias or config.activation is not None or config.is_fp8
        dtype = jnp.dtype(jnp.float32) if is_unfinished else config.out_dtype
        sums = dataclasses.replace(config, out_dtype=dtype, has_bias=False, activation=None)
        *factors, bias, inverse_out_scale = operands
        placeholders = jnp.zeros((1,), jnp.float32), jnp.ones((1,), jnp.float32)
        y, amax = on_device(sums, *factors, *placeholders)
        y = lax.psum(y, across)
        if is_unfinished:
            y, amax = finish(config, y, bias, inverse_out_scale)
    others = axes_of([factor for factor in axes if factor not in summed], axes)
    return y, all_max(amax, others) if config.is_fp8 and others else amax


@functools.cache
def _operation(config: CallConfig) -> Any:
    """custom_vjp -> custom_vmap -> partition -> platform, for one configuration."""
    batched = jax.custom_batching.custom_vmap(
        partition(functools.partial(_local, config), functools.partial(product_rule, config))
    )

    @batched.def_vmap
    def _vmap(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> Any:
        return batch_product(_operation, config, axis_size, in_batched, operands)

    return undifferentiable(batched, "scaled_matmul: its FP8 operands cannot be differentiated")


def precision_is_fast(op: str, precision: Any) -> bool:
    """Whether ``precision`` lets sums be fast; of a pair, whether both do."""
    is_pair = isinstance(precision, tuple | list) and len(precision) == 2
    names = [
        one.name if isinstance(one, lax.Precision) else one
        for one in (precision if is_pair else (precision,))
    ]
    names = [name.lower() if isinstance(name, str) else name for name in names]
    if not all(isinstance(name, str | None) and name in _FAST for name in names):
        raise ValueError(
            f"{op}: unknown precision {precision!r}; accepted are None, DEFAULT, HIGH, HIGHEST or a"
            " pair of them, but no algorithm, which names other arithmetic than FP8 products have"
        )
    return all(_FAST[name] for name in names)


def check_shapes(op: str, x: Any, w: ScaledArray) -> int:
    """Returns the number of batch axes, or raises a ValueError that names both shapes."""
    shapes = f"x {x.shape} and w {w.shape}"
    if x.ndim < 1 or w.ndim < 2:
        raise ValueError(
            f"{op}: needs x of rank >= 1 and w of rank >= 2, (..., M, K) and (N, K); got {shapes}"
        )
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"{op}: contracts the last axis of both operands, (..., M, K) and (N, K); got {shapes}"
        )
    batch = w.shape[:-2]
    if batch and x.shape[:-2] != batch:
        raise ValueError(f"{op}: leading batch axes must be the same on both sides; got {shapes}")
    return len(batch)


def _check_bias(op: str, bias: Any, n: int) -> jax.Array:
    if bias is None:
        return jnp.zeros((1,), jnp.float32)
    bias = jnp.asarray(bias)
    if bias.dtype not in WIDE_DTYPES:
        raise TypeError(f"{op}: bias must be float32, bfloat16 or float16, got {bias.dtype}")
    if bias.shape != (n,):
        raise ValueError(f"{op}: bias must have the shape (N,) = ({n},), got {bias.shape}")
    return bias


def _check_supported(op: str, config: CallConfig, x: ScaledArray, w: ScaledArray) -> None:
    """Refuses what a named implementation cannot do whatever the device."""
    named = config.implementation
    if named not in ("cublaslt", "small_m"):
        return
    reason = None
    blocks = isinstance(config.x_granularity, tuple) or isinstance(config.w_granularity, tuple)
    if named == "cublaslt" and x.dtype not in FP8_DTYPES:
        reason = "cublasLt has no product of 16-bit by FP8 values"
    elif named == "cublaslt" and x.dtype == w.dtype == jnp.float8_e5m2:
        reason = "cublasLt has no product of E5M2 with E5M2"
    elif named == "small_m" and blocks:
        reason = "it has no block scales"
    elif named == "small_m" and math.prod(x.shape[-config.contracted :]) % 16:
        reason = "it reads K in steps of 16"
    if reason:
        raise NotImplementedError(
            f"{op}: implementation {named!r} cannot multiply x {x.dtype.name}{x.shape} with"
            f" granularity {x.granularity!r} by w {w.dtype.name}{w.shape} with granularity"
            f" {w.granularity!r}: {reason}"
        )


def multiply(
    op: str,
    x: ScaledArray,
    w: ScaledArray,
    *,
    batch_dims: int,
    contracted: int = 1,
    bias: Any,
    activation: str | None,
    preferred_element_type: Any,
    precision: Any,
    output_scale: Any,
    return_amax: bool,
    implementation: str | None,
) -> Any:
    """``scaled_matmul`` of checked operands; ``x.data`` may be 16 bits wide, with a scale of 1.

    ``x`` is ``(*batch, ..., M, *contracted)``, ``w`` ``(*batch, N, *contracted)``.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}; accepted are {ACTIVATIONS}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; accepted are {IMPLEMENTATIONS}"
        )
    out_dtype = jnp.dtype(preferred_element_type)
    is_fp8 = out_dtype in FP8_DTYPES
    if out_dtype not in (*WIDE_DTYPES, *FP8_DTYPES):
        raise TypeError(
            f"{op}: preferred_element_type must be float32, bfloat16, float16, float8_e4m3fn or"
            f" float8_e5m2, got {out_dtype.name}"
        )
    if is_fp8 != (output_scale is not None):
        given = "no output_scale" if output_scale is None else "an output_scale"
        raise ValueError(
            f"{op}: output_scale goes with an FP8 preferred_element_type and with no other;"
            f" got {out_dtype.name} and {given}"
        )
    if return_amax and not is_fp8:
        raise ValueError(f"{op}: return_amax needs an FP8 result, got {out_dtype.name}")
    has_bias = bias is not None
    bias = _check_bias(op, bias, w.shape[batch_dims])
    inverse_out_scale = jnp.ones((1,), jnp.float32)
    if is_fp8:
        output_scale = jnp.asarray(output_scale, jnp.float32)
        if output_scale.size != 1:
            raise ValueError(f"{op}: output_scale must be a scalar, got {output_scale.shape}")
        inverse_out_scale = inverse(output_scale).reshape(1)

    config = CallConfig(
        out_dtype=out_dtype,
        x_granularity=x.granularity,
        w_granularity=w.granularity,
        has_bias=has_bias,
        activation=activation,
        fast=precision_is_fast(op, precision),
        implementation=implementation,
        batch_dims=batch_dims,
        contracted=contracted,
        capability=_forced_capability,
    )
    _check_supported(op, config, x, w)
    data, amax = _operation(config)(x.data, x.scale, w.data, w.scale, bias, inverse_out_scale)
    if not is_fp8:
        return data
    result = ScaledArray(data, output_scale.reshape((1,) * data.ndim), "tensor")
    return (result, amax.reshape(())) if return_amax else result


def scaled_matmul(
    x: ScaledArray,
    w: ScaledArray,
    *,
    bias: Any = None,
    activation: str | None = None,
    preferred_element_type: Any = jnp.bfloat16,
    precision: Any = None,
    output_scale: Any = None,
    return_amax: bool = False,
    implementation: str | None = None,
) -> Any:
    """Multiplies two ScaledArrays: ``activation(x @ w.T + bias)``, accumulated in float32.

    Differentiable in the bias. ``jax.vmap`` means a loop over the entries, and runs one product:
    with one ``w`` for all, the entries' rows become its rows (for ``"small_m"``, 64 at most); with
    one for each, it is a batch. Only ``"naive"`` gives the bits of the loop.

    Scales must leave both operands' values, and the product of two scales, within the range of
    float32, as dynamic scales do; beyond it some implementations give an infinity or NaN.

    Args:
      x: ``(..., M, K)``, E4M3 or E5M2, of any granularity.
      w: ``(N, K)``, or ``(*batch, N, K)`` for an ``x`` of ``(*batch, M, K)``; likewise.
      bias: ``(N,)`` float32, bfloat16 or float16, or None. Added in float32. In the output's
        16-bit type (bfloat16 for float32 output) it costs nothing; otherwise the GEMM goes
        through a second kernel on a GPU.
      activation: None, ``"relu"`` or ``"gelu"`` (the tanh approximation; cublasLt takes the GPU's
        own tanh, which is off by up to 2^-11 of its value).
      preferred_element_type: of the result: bfloat16, float16, float32, or an FP8 type.
      precision: None and DEFAULT accumulate fast, in the tensor cores' own accumulator, whose
        error grows with K; HIGH and HIGHEST promote the sums to float32. Of a pair the more
        precise one counts; an algorithm of lax is refused. It is read by Ada and Hopper GPUs;
        elsewhere sums are always precise.
      output_scale: the float32 scalar ``s`` for FP8 output, whose data is the result divided by
        ``s``. Needed for an FP8 result and for no other.
      return_amax: also return the amax of an FP8 result before it is divided and rounded. An
        infinite sum may leave it not finite even where relu made a finite value of that.
      implementation: ``"cublaslt"``, ``"small_m"`` (for M <= 64 and K % 16 == 0, on compute
        capability 9.0 to 11; reads ``w`` once), ``"decode"`` (16-bit tensor cores), ``"naive"``,
        ``"xla"``, or None for the best that the device and the shapes support. A named one runs
        or raises.

    Returns:
      ``(..., M, N)`` of ``preferred_element_type``, a ScaledArray (granularity ``"tensor"``) for
      FP8; with ``return_amax`` also the float32 amax, a scalar.

    Raises:
      TypeError: for operands that are no ScaledArrays, or unsupported dtypes; when a ScaledArray
        is differentiated.
      ValueError: for shapes, scales or options that do not fit.
      NotImplementedError: for what the named implementation cannot do on any device, when an FP8
        result is differentiated, and for second derivatives.
      jax.errors.JaxRuntimeError: for what the named implementation cannot do on this device.

    >>> import jax.numpy as jnp, jax_fp8
    >>> x = jax_fp8.quantize(jnp.ones((2, 16)))
    >>> w = jax_fp8.quantize(2 * jnp.ones((3, 16)))
    >>> jax_fp8.scaled_matmul(x, w, activation="relu").tolist()
    [[32.0, 32.0, 32.0], [32.0, 32.0, 32.0]]
    """
    op = "scaled_matmul"
    check_scaled_array(op, "x", x)
    check_scaled_array(op, "w", w)
    batch_dims = check_shapes(op, x, w)

    def run(
        activation: str | None, x: ScaledArray, w: ScaledArray, bias: Any, output_scale: Any
    ) -> Any:
        return multiply(
            op,
            x,
            w,
            batch_dims=batch_dims,
            bias=bias,
            activation=activation,
            preferred_element_type=preferred_element_type,
            precision=precision,
            output_scale=output_scale,
            return_amax=return_amax,
            implementation=implementation,
        )

    refusal = None if output_scale is None else FP8_HAS_NO_GRADIENT
    bias = None if bias is None else jnp.asarray(bias)
    placements = None, None if bias is None else placement(bias)
    differentiable = with_gradients(op, run, activation, refusal=refusal, placements=placements)
    return differentiable(x, w, bias, output_scale)
