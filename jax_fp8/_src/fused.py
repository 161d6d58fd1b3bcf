"""Norms and activations with quantization in one: what comes before a product, as a ScaledArray."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fp8._src import ffi, plans
from jax_fp8._src.numerics import dynamic_scale
from jax_fp8._src.partition import Axes, Rule, all_max, axes_of, name_of, partition
from jax_fp8._src.quantize import (
    IMPLEMENTATIONS,
    WIDE_DTYPES,
    QuantizeConfig,
    amax_of,
    quantize_rule,
    reference,
    shared_factors,
    static_scale,
)
from jax_fp8._src.scaled_array import (
    BLOCK,
    Granularity,
    ScaledArray,
    block_shape,
    check_fp8_dtype,
    check_granularity,
    scale_shape,
)


@dataclasses.dataclass(frozen=True)
class FusedConfig:
    """The static part of a call: everything but the arrays."""

    producer: str
    eps: float
    dtype: jnp.dtype
    granularity: Granularity
    static: bool
    residual: bool
    implementation: str | None
    #: Leading axes that vmap put in front: each entry is quantized as if it were alone.
    batch_dims: int = 0
    #: Whether the weight and the bias have them too.
    batched_weight: bool = False

    @property
    def op(self) -> str:
        """The public name of the operation."""
        return f"{self.producer}_quantize"

    @property
    def norm(self) -> bool:
        """Whether there is a weight."""
        return self.producer.endswith("norm")

    @property
    def quantize(self) -> QuantizeConfig:
        """How the values of one entry are quantized."""
        return QuantizeConfig(self.dtype, self.granularity, self.static, False, self.implementation)

    def data_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the result for ``x`` of ``shape``."""
        return (*shape[:-1], shape[-1] // 2) if self.producer == "swiglu" else shape


# --- The definitions ------------------------------------------------------------------------------


def _row_sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, in two steps: so no more than 128 + K / 128 roundings add up."""
    count = math.ceil(x.shape[-1] / BLOCK)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, count * BLOCK - x.shape[-1])]
    blocks = jnp.pad(x, padding).reshape(*x.shape[:-1], count, BLOCK)
    return lax.optimization_barrier(blocks.sum(-1)).sum(-1, keepdims=True)


def _factor(x: jax.Array, eps: float) -> jax.Array:
    """``1 / sqrt(mean(x^2) + eps)``; NaN where the sum of squares is not finite."""
    moment = _row_sum(x * x) / max(x.shape[-1], 1)
    return jnp.where(jnp.isfinite(moment), lax.rsqrt(moment + jnp.float32(eps)), jnp.nan)


def _rms_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return x * weight * _factor(x, eps)


def _layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    centered = x - _row_sum(x) / max(x.shape[-1], 1)
    return centered * weight * _factor(centered, eps) + bias


def _swiglu(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    gate, up = jnp.split(x, 2, axis=-1)
    return gate / (1 + jnp.exp(-gate)) * up


def _gelu(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    # x * (1 + tanh(z)) / 2 = x / (1 + exp(-2z)), which loses no digits where tanh is near -1.
    two_z = x * jnp.float32(2 * math.sqrt(2 / math.pi)) * (1 + jnp.float32(0.044715) * (x * x))
    return x / (1 + jnp.exp(-two_z))


_PRODUCERS: dict[str, Callable[..., jax.Array]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "swiglu": _swiglu,
    "gelu": _gelu,
}


def _over_entries(config: FusedConfig, function: Any, operands: Any) -> Any:
    """``function`` of the configuration and the operands of one entry, over the batch axes."""
    if not config.batch_dims:
        return function(config, *operands)
    inner = dataclasses.replace(config, batch_dims=config.batch_dims - 1)
    own = 0 if config.batched_weight else None
    axes = (0, 0 if config.residual else None, own, own, 0 if config.static else None)
    return jax.vmap(lambda *entry: _over_entries(inner, function, entry), in_axes=axes)(*operands)


def _values(config: FusedConfig, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """What is quantized, in float32, and the sum with the residual where there is one."""
    x, residual, weight, bias, _ = operands
    wide = x.astype(jnp.float32)
    total: tuple[jax.Array, ...] = ()
    if config.residual:
        # The barrier keeps XLA, which may compute in more digits than asked for, from leaving the
        # rounding out.
        total = (lax.optimization_barrier((wide + residual.astype(jnp.float32)).astype(x.dtype)),)
        wide = total[0].astype(jnp.float32)
    weight, bias = weight.astype(jnp.float32), bias.astype(jnp.float32)
    return _PRODUCERS[config.producer](wide, weight, bias, config.eps), total


def _quantized(config: FusedConfig, *operands: jax.Array) -> tuple[jax.Array, ...]:
    values, total = _values(config, *operands)
    data, scale, _ = reference(config.quantize, values, operands[-1])
    return (data, scale, *total)


def _reference(config: FusedConfig, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """The definition in plain JAX: the oracle of the tests, and what the CPU runs."""
    return _over_entries(config, _quantized, operands)


def _amax(config: FusedConfig, *operands: jax.Array) -> jax.Array:
    return amax_of(_values(config, *operands)[0], config.granularity)


# --- The handler ----------------------------------------------------------------------------------


def _kernel(config: FusedConfig, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """The handler, which knows (batch, rows, columns) only."""
    x, residual, weight, bias, scale = operands
    batch, own = x.shape[: config.batch_dims], x.shape[config.batch_dims :]
    shape = config.data_shape(x.shape)
    x3 = (math.prod(batch), math.prod(own[:-1]), own[-1])
    shape3 = config.data_shape(x3)
    if config.granularity == "tensor":
        scale3: tuple[int, ...] = (x3[0], 1, 1)
    else:
        scale3 = scale_shape(shape3, config.granularity)
    weights = (x3[0] if config.batched_weight else 1, own[-1])
    data, new_scale, total = ffi.fused_quantize(
        (
            x.reshape(x3),
            residual.reshape(x3) if config.residual else None,
            weight.reshape(weights) if config.norm else None,
            bias.reshape(weights) if config.producer == "layer_norm" else None,
            scale.reshape(scale3) if config.static else None,
        ),
        producer=config.producer,
        eps=config.eps,
        dtype=config.dtype,
        block=block_shape(config.granularity),
        shape=shape3,
        scale_shape=scale3,
    )
    out_scale = (*batch, *scale_shape(shape[config.batch_dims :], config.granularity))
    results = (data.reshape(shape), new_scale.reshape(out_scale))
    return (*results, total.reshape(x.shape)) if config.residual else results


def _xla(config: FusedConfig, *operands: jax.Array) -> tuple[jax.Array, ...]:
    x = operands[0]
    plans.record_traced(
        config.op,
        platform="any" if config.implementation == "xla" else "cpu",
        shape=x.shape,
        dtypes=(x.dtype.name, config.dtype.name),
        granularity=config.granularity,
    )
    return _reference(config, *operands)


def _local(config: FusedConfig, *operands: jax.Array, axes: Axes) -> Any:
    """Runs on the operands of one device, whatever mesh they came from."""
    across = axes_of(shared_factors(config, operands[0].ndim), axes)
    if across and not config.static:
        amax = all_max(_over_entries(config, _amax, operands), across)
        operands = (*operands[:-1], dynamic_scale(amax, config.dtype))
        config = dataclasses.replace(config, static=True)
    xla, kernel = functools.partial(_xla, config), functools.partial(_kernel, config)
    if config.implementation == "xla":
        return xla(*operands)
    if config.implementation == "kernel":
        return kernel(*operands)
    return lax.platform_dependent(*operands, cpu=xla, cuda=kernel)


def _rule(config: FusedConfig, *operands: jax.Array) -> Rule:
    """As quantize's, but that the last axis of all but GELU goes through as a whole."""
    x = operands[0]
    given = config.data_shape(x.shape)
    shape = jax.ShapeDtypeStruct(given, x.dtype)
    quantize = dataclasses.replace(config.quantize, batch_dims=config.batch_dims)
    rule = quantize_rule(quantize, shape, jnp.zeros(()))
    if config.producer != "gelu":
        rule = rule.without(name_of(rule.operands[0][-1]))
    of_x = rule.operands[0]
    # A placeholder of the bias gets the batch axes of the weight.
    entries = of_x[: config.batch_dims] if config.batched_weight else ()
    of_weight = (*entries, None)
    data, scale, _ = rule.results
    return dataclasses.replace(
        rule,
        operands=(
            of_x,
            of_x if config.residual else (),
            of_weight if config.norm else (),
            of_weight if config.producer == "layer_norm" else entries,
            scale if config.static else (),
        ),
        results=(data, scale, of_x) if config.residual else (data, scale),
    )


def _batch(config: FusedConfig, size: int, batched: list[bool], operands: Any) -> Any:
    """The configuration and the operands with one more batch axis in front."""
    x, residual, weight, bias, scale = operands
    batch = x.shape[batched[0] :][: config.batch_dims]

    def front(array: jax.Array, is_batched: bool) -> jax.Array:
        return array if is_batched else jnp.broadcast_to(array, (size, *array.shape))

    def with_batch(array: jax.Array, is_batched: bool) -> jax.Array:
        array = front(array, is_batched)
        if config.batched_weight:
            return array
        ones = (1,) * len(batch)
        return jnp.broadcast_to(
            array.reshape(size, *ones, *array.shape[1:]), (size, *batch, *array.shape[1:])
        )

    batched_weight = config.batched_weight or batched[2] or batched[3]
    deeper = dataclasses.replace(
        config, batch_dims=config.batch_dims + 1, batched_weight=batched_weight
    )
    return deeper, (
        front(x, batched[0]),
        front(residual, batched[1]) if config.residual else residual,
        with_batch(weight, batched[2]) if batched_weight else weight,
        with_batch(bias, batched[3]) if batched_weight else bias,
        front(scale, batched[4]) if config.static else scale,
    )


@functools.cache
def _operation(config: FusedConfig) -> Any:
    """custom_vjp -> custom_vmap -> partition -> platform, for one configuration."""
    batched = jax.custom_batching.custom_vmap(
        partition(functools.partial(_local, config), functools.partial(_rule, config))
    )

    @batched.def_vmap
    def _vmap(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> Any:
        deeper, operands = _batch(config, axis_size, in_batched, operands)
        out = _operation(deeper)(*operands)
        return out, (True,) * len(out)

    differentiable = jax.custom_vjp(batched)

    def forward(*operands: jax.Array) -> Any:
        raise NotImplementedError(
            f"{config.op}: it cannot be differentiated in this version; put"
            " jax.lax.stop_gradient around its operands"
        )

    differentiable.defvjp(forward, lambda residuals, cotangents: cotangents)
    return jax.jit(differentiable, inline=True)


# --- The functions --------------------------------------------------------------------------------


def _wide(op: str, name: str, array: Any, like: jax.Array | None = None) -> jax.Array:
    """Returns a wide array, of the shape and dtype of ``like``, or raises."""
    array = jnp.asarray(array)
    if array.dtype not in WIDE_DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16 or float16, got {array.dtype}{array.shape}"
        )
    if like is not None and (array.shape, array.dtype) != (like.shape, like.dtype):
        error = TypeError if array.shape == like.shape else ValueError
        raise error(
            f"{op}: {name} must have shape and dtype of x, {like.dtype}{like.shape}, got"
            f" {array.dtype}{array.shape}"
        )
    return array


def _eps(op: str, eps: Any) -> float:
    if not isinstance(eps, float | int | np.floating | np.integer):
        raise TypeError(f"{op}: eps must be a number of Python or numpy, got {type(eps).__name__}")
    if not 0 <= float(eps) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")
    return float(np.float32(eps))


def _call(
    producer: str,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: Any = 0.0,
    residual: Any = None,
    dtype: Any,
    granularity: Any,
    scale: Any,
    implementation: str | None,
) -> Any:
    op = f"{producer}_quantize"
    what = "gate_up" if producer == "swiglu" else "x"
    x = _wide(op, what, x)
    dtype = check_fp8_dtype(op, "dtype", dtype)
    granularity = check_granularity(op, granularity)
    if granularity == (BLOCK, BLOCK):
        raise NotImplementedError(
            f"{op}: granularity {granularity} is for weights; accepted are 'tensor', 'row' and"
            f" (1, {BLOCK})"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; accepted are {IMPLEMENTATIONS}"
        )
    if x.ndim == 0:
        raise ValueError(f"{op}: {what} must have an axis of features, got rank 0")
    if producer == "swiglu" and x.shape[-1] % 2:
        raise ValueError(
            f"{op}: the last axis of gate_up holds gates and as many values, got {x.shape}"
        )
    none = jnp.zeros((), jnp.float32)  # So that there is one signature to batch and partition.
    vectors = {"weight": weight, "bias": bias}
    for name, vector in vectors.items():
        vectors[name] = none if vector is None else _wide(op, name, vector)
        if vector is not None and vectors[name].shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} must be of shape {x.shape[-1:]} for x of shape {x.shape}, got"
                f" {vectors[name].shape}"
            )
    config = FusedConfig(
        producer,
        _eps(op, eps),
        dtype,
        granularity,
        scale is not None,
        residual is not None,
        implementation,
    )
    shape = config.data_shape(x.shape)
    data, new_scale, *total = _operation(config)(
        x,
        none if residual is None else _wide(op, "residual", residual, like=x),
        vectors["weight"],
        vectors["bias"],
        none if scale is None else static_scale(op, scale, shape, granularity),
    )
    quantized = ScaledArray(data, new_scale, granularity)
    return (quantized, total[0]) if total else quantized


def rms_norm_quantize(
    x: Any,
    weight: Any,
    *,
    eps: float = 1e-6,
    residual: Any = None,
    dtype: Any = jnp.float8_e4m3fn,
    granularity: Granularity = "tensor",
    scale: Any = None,
    implementation: str | None = None,
) -> Any:
    """RMSNorm over the last axis, and ``quantize`` of it, in one kernel.

    The values are ``x * weight / sqrt(mean(x^2) + eps)`` in float32 (Zhang and Sennrich, arXiv
    1910.07467), and are not rounded to ``x``'s dtype before they go to FP8. A row whose sum of
    squares is not finite in float32 becomes NaN, all of it.

    Args:
      x: ``(..., K)``; float32, bfloat16 or float16.
      weight: ``(K,)``; float32, bfloat16 or float16.
      eps: a number that is known when the program is traced; finite, not negative.
      residual: None, or an array of ``x``'s shape and dtype, which is added to it first.
      dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
      granularity: ``"tensor"``, ``"row"`` or ``(1, 128)``. A dynamic ``"tensor"`` scale takes
        two passes, each of which computes the norm.
      scale: None for dynamic scaling; else the float32 scale to use, as in ``quantize``.
      implementation: ``"kernel"`` (this library's handler), ``"xla"`` (plain JAX), or None: the
        kernel on a GPU and XLA on a CPU. The values are within a factor of
        ``1 +- (16 + K / 2^14) 2^-24`` of the exact ones, of XLA ``1 +- (72 + K / 256) 2^-24``: so
        codes of the two may differ, by one, where a value lies that close to the middle between
        two codes. A row's values do not depend on what other rows there are.

    Returns:
      A ScaledArray of ``x``'s shape. With ``residual``: (ScaledArray, sum), where sum is
      ``x + residual`` rounded to ``x``'s dtype, and the norm is that of the rounded sum.

    Raises:
      TypeError: for dtypes other than the above, or an ``eps`` that is no plain number.
      ValueError: for shapes that do not fit, an ``eps`` that is negative or not finite, an unknown
        granularity or implementation, or a scale that does not fit.
      NotImplementedError: for granularity ``(128, 128)``, and under differentiation.

    >>> import jax.numpy as jnp, jax_fp8
    >>> xq = jax_fp8.rms_norm_quantize(jnp.array([[3.0, -3.0]]), jnp.array([1.0, 2.0]), eps=0.0)
    >>> jax_fp8.dequantize(xq).tolist()
    [[1.0, -2.0]]
    """
    return _call(
        "rms_norm",
        x,
        weight,
        eps=eps,
        residual=residual,
        dtype=dtype,
        granularity=granularity,
        scale=scale,
        implementation=implementation,
    )


def layer_norm_quantize(
    x: Any,
    weight: Any,
    bias: Any,
    *,
    eps: float = 1e-6,
    residual: Any = None,
    dtype: Any = jnp.float8_e4m3fn,
    granularity: Granularity = "tensor",
    scale: Any = None,
    implementation: str | None = None,
) -> Any:
    """LayerNorm over the last axis, and ``quantize`` of it, in one kernel.

    The values are ``(x - mean(x)) * weight / sqrt(variance(x) + eps) + bias`` in float32 (Ba et
    al., arXiv 1607.06450), the variance being the mean of ``(x - mean(x))^2``. All else is as
    in ``rms_norm_quantize``, but that rounding of the mean adds, before weight and bias, up to
    twice the errors stated there times ``mean(|x|) / sqrt(variance(x) + eps)``.

    Args:
      x: ``(..., K)``; float32, bfloat16 or float16.
      weight: ``(K,)``; float32, bfloat16 or float16.
      bias: likewise.
      eps: as in ``rms_norm_quantize``.
      residual: likewise.
      dtype: likewise.
      granularity: likewise.
      scale: likewise.
      implementation: likewise.

    Returns:
      As ``rms_norm_quantize``.

    Raises:
      As ``rms_norm_quantize``.

    >>> import jax.numpy as jnp, jax_fp8
    >>> x, one = jnp.array([[3.0, 5.0]]), jnp.ones(2)
    >>> jax_fp8.dequantize(jax_fp8.layer_norm_quantize(x, one, one, eps=0.0)).tolist()
    [[0.0, 2.0]]
    """
    return _call(
        "layer_norm",
        x,
        weight,
        bias,
        eps=eps,
        residual=residual,
        dtype=dtype,
        granularity=granularity,
        scale=scale,
        implementation=implementation,
    )


def swiglu_quantize(
    gate_up: Any,
    *,
    dtype: Any = jnp.float8_e4m3fn,
    granularity: Granularity = "tensor",
    scale: Any = None,
    implementation: str | None = None,
) -> ScaledArray:
    """``silu(gate) * up``, and ``quantize`` of it, in one kernel.

    The values are ``gate / (1 + exp(-gate)) * up`` in float32 (Shazeer, arXiv 2002.05202), and
    are not rounded to ``gate_up``'s dtype before they go to FP8.

    Args:
      gate_up: ``(..., 2 F)``, the gates and then as many values; float32, bfloat16 or float16.
      dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
      granularity: ``"tensor"``, ``"row"`` or ``(1, 128)``. A dynamic ``"tensor"`` scale takes
        two passes, each of which computes the values.
      scale: None for dynamic scaling; else the float32 scale to use, as in ``quantize``.
      implementation: ``"kernel"`` (this library's handler), ``"xla"`` (plain JAX), or None: the
        kernel on a GPU and XLA on a CPU. The values of both are within a factor of
        ``1 +- (12 + 4 |gate|) 2^-24`` of the exact ones; where ``1 / (1 + exp(-gate))`` is below
        2^-126, they may be zero.

    Returns:
      A ScaledArray of ``(..., F)``.

    Raises:
      TypeError: for dtypes other than the above.
      ValueError: for an odd last axis, an unknown granularity or implementation, or a scale that
        does not fit.
      NotImplementedError: for granularity ``(128, 128)``, and under differentiation.

    >>> import jax.numpy as jnp, jax_fp8
    >>> xq = jax_fp8.swiglu_quantize(jnp.array([[30.0, 0.0, 2.0, 5.0]]))
    >>> jax_fp8.dequantize(xq).tolist()
    [[60.0, 0.0]]
    """
    return _call(
        "swiglu",
        gate_up,
        dtype=dtype,
        granularity=granularity,
        scale=scale,
        implementation=implementation,
    )


def gelu_quantize(
    x: Any,
    *,
    dtype: Any = jnp.float8_e4m3fn,
    granularity: Granularity = "tensor",
    scale: Any = None,
    implementation: str | None = None,
) -> ScaledArray:
    """GELU in its tanh approximation, and ``quantize`` of it, in one kernel.

    The values are ``x * (1 + tanh(z)) / 2`` with ``z = sqrt(2 / pi) * (x + 0.044715 x^3)``
    (Hendrycks and Gimpel, arXiv 1606.08415), computed as ``x / (1 + exp(-2z))`` in float32. All
    else is as in ``swiglu_quantize``, with a factor of ``1 +- (12 + 12 |z|) 2^-24``.

    Args:
      x: ``(..., K)``; float32, bfloat16 or float16.
      dtype: as in ``swiglu_quantize``.
      granularity: likewise.
      scale: likewise.
      implementation: likewise.

    Returns:
      A ScaledArray of ``x``'s shape.

    Raises:
      As ``swiglu_quantize``.

    >>> import jax.numpy as jnp, jax_fp8
    >>> jax_fp8.dequantize(jax_fp8.gelu_quantize(jnp.array([[-30.0, 0.0, 7.0]]))).tolist()
    [[-0.0, 0.0, 7.0]]
    """
    return _call(
        "gelu",
        x,
        dtype=dtype,
        granularity=granularity,
        scale=scale,
        implementation=implementation,
    )
