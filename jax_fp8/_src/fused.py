"""Norms and activations with quantization in one: what comes before a product, as a ScaledArray."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8._src.fused_definition import FusedConfig
from jax_fp8._src.fused_operation import operation
from jax_fp8._src.quantize import IMPLEMENTATIONS, WIDE_DTYPES, static_scale
from jax_fp8._src.scaled_array import (
    BLOCK,
    Granularity,
    ScaledArray,
    check_fp8_dtype,
    check_granularity,
)


def check_wide(op: str, name: str, array: Any, like: jax.Array | None = None) -> jax.Array:
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


def check_eps(op: str, eps: Any) -> float:
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
    x = check_wide(op, what, x)
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
        vectors[name] = none if vector is None else check_wide(op, name, vector)
        if vector is not None and vectors[name].shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} must be of shape {x.shape[-1:]} for x of shape {x.shape}, got"
                f" {vectors[name].shape}"
            )
    config = FusedConfig(
        producer,
        check_eps(op, eps),
        dtype,
        granularity,
        scale is not None,
        residual is not None,
        implementation,
    )
    shape = config.data_shape(x.shape)
    data, new_scale, *total = operation(config)(
        x,
        none if residual is None else check_wide(op, "residual", residual, like=x),
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
      granularity: ``"tensor"``, ``"row"`` or ``(1, 128)``. With a dynamic ``"tensor"``
        scale, what does not stay on the chip is read twice; many rows take two kernels then, but
        those of bfloat16 whose columns fill whole thread blocks.
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
      granularity: ``"tensor"``, ``"row"`` or ``(1, 128)``. With a dynamic ``"tensor"``
        scale, what does not stay on the chip is read twice; many rows take two kernels then, but
        those of bfloat16 whose columns fill whole thread blocks.
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
