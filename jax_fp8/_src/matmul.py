"""matmul: wide activations by FP8 weights, on top of quantize and scaled_matmul."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jax_fp8._src.quantize import WIDE_DTYPES, quantize
from jax_fp8._src.recipe import Recipe, get_recipe
from jax_fp8._src.scaled_array import (
    Granularity,
    ScaledArray,
    check_fp8_dtype,
    check_granularity,
    describe,
)
from jax_fp8._src.scaled_matmul import scaled_matmul


def matmul(
    x: Any,
    w: ScaledArray,
    *,
    granularity: Granularity | None = None,
    recipe: str | Recipe = "tensorwise",
    scale: Any = None,
    dtype: Any = None,
    bias: Any = None,
    activation: str | None = None,
    preferred_element_type: Any = None,
    precision: Any = None,
    output_scale: Any = None,
    return_amax: bool = False,
    implementation: str | None = None,
) -> Any:
    """Multiplies wide activations by FP8 weights: ``quantize(x)``, then ``scaled_matmul``.

    Args:
      x: ``(..., M, K)``; float32, bfloat16 or float16.
      w: a ScaledArray of ``(N, K)``, or ``(*batch, N, K)`` with ``x`` of ``(*batch, M, K)``.
      granularity: of ``x``'s scales; None takes what ``recipe`` says for activations.
      recipe: ``"tensorwise"``, ``"rowwise"``, ``"blockwise"`` or a ``Recipe``.
      scale: the static scale of ``x``; None takes it from ``x``.
      dtype: of the quantized ``x``; None takes what ``recipe`` says.
      bias: as in ``scaled_matmul``.
      activation: likewise.
      preferred_element_type: of the result; None takes ``x``'s dtype.
      precision: as in ``scaled_matmul``.
      output_scale: likewise.
      return_amax: likewise.
      implementation: of the product, as in ``scaled_matmul``; ``"xla"`` also of quantizing ``x``.

    Returns:
      As ``scaled_matmul``.

    Raises:
      TypeError: when ``w`` is no ScaledArray; use ``jax.numpy`` or ``jax.lax`` for two wide
        arrays. Otherwise as ``quantize`` and ``scaled_matmul``.

    >>> import jax.numpy as jnp, jax_fp8
    >>> x, w = 7 * jnp.ones((2, 16)), jax_fp8.quantize(7 * jnp.ones((3, 16)), granularity="row")
    >>> jax_fp8.matmul(x, w, granularity="row").tolist()
    [[784.0, 784.0, 784.0], [784.0, 784.0, 784.0]]
    """
    op = "matmul"
    if isinstance(x, ScaledArray):
        raise TypeError(f"{op}: x is a ScaledArray already; use jax_fp8.scaled_matmul")
    if not isinstance(w, ScaledArray):
        raise TypeError(
            f"{op}: w must be a jax_fp8.ScaledArray of shape (N, K), got {describe(w)}: quantize"
            " it with jax_fp8.quantize, K last; for two wide arrays use jnp.matmul, jnp.einsum or"
            " lax.dot_general"
        )
    x = jnp.asarray(x)
    if x.dtype not in WIDE_DTYPES:
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16, got {x.dtype}{x.shape}")
    operand = get_recipe(op, recipe).activation
    xq = quantize(
        x,
        dtype=operand.dtype if dtype is None else check_fp8_dtype(op, "dtype", dtype),
        granularity=operand.granularity
        if granularity is None
        else check_granularity(op, granularity),
        scale=scale,
        implementation="xla" if implementation == "xla" else None,
    )
    return scaled_matmul(
        xq,
        w,
        bias=bias,
        activation=activation,
        preferred_element_type=x.dtype
        if preferred_element_type is None
        else preferred_element_type,
        precision=precision,
        output_scale=output_scale,
        return_amax=return_amax,
        implementation=implementation,
    )
