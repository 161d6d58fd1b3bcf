"""matmul: wide activations by FP8 weights, on top of quantize and scaled_matmul."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src.axes import view_of
from jax_fp8._src.epilogue import with_gradients
from jax_fp8._src.layouts import keeps_rows
from jax_fp8._src.placement import placement, reshape
from jax_fp8._src.product import input_gradient
from jax_fp8._src.quantize import WIDE_DTYPES, quantize, static_scale
from jax_fp8._src.recipe import Operand, Recipe, get_recipe
from jax_fp8._src.scaled_array import (
    Granularity,
    ScaledArray,
    check_fp8_dtype,
    check_granularity,
    check_scaled_array,
    describe,
)
from jax_fp8._src.scaled_matmul import FP8_HAS_NO_GRADIENT, check_shapes, multiply


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

    With the recipe ``"weight_only"`` ``x`` stays as it is: the weights are decoded, exactly, on
    their way to 16-bit tensor cores, and the sums are float32. It loses nothing but what the
    weights have lost; FP8 tensor cores, with twice the speed, it leaves idle.

    Differentiable in ``x`` and in the bias. The gradient of ``x`` is the product with ``w`` of the
    gradient quantized as ``recipe.dgrad`` says; scales of a row of ``w`` go to the gradient first,
    and weights with (1, 128) blocks are multiplied wide.

    Args:
      x: ``(..., M, K)``; float32, bfloat16 or float16. ``"weight_only"``: bfloat16 or float16.
      w: a ScaledArray of ``(N, K)``, or ``(*batch, N, K)`` with ``x`` of ``(*batch, M, K)``.
      granularity: of ``x``'s scales; None takes what ``recipe`` says for activations.
      recipe: ``"tensorwise"``, ``"rowwise"``, ``"blockwise"``, ``"weight_only"`` or a ``Recipe``;
        with ``scale`` also ``"static"`` and ``"delayed"``. What it says of weights is not read:
        ``w`` has its own dtype and granularity.
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
      TypeError: when ``w`` is no ScaledArray; use ``dot_general`` or ``einsum`` for two wide
        arrays. Otherwise as ``quantize`` and ``scaled_matmul``.
      ValueError: for a ``granularity``, ``scale`` or ``dtype`` of an ``x`` that stays wide, and for
        a recipe that needs a ``scale`` without one, or a key.

    >>> import jax.numpy as jnp, jax_fp8
    >>> x, w = 7 * jnp.ones((2, 16)), jax_fp8.quantize(7 * jnp.ones((3, 16)), granularity="row")
    >>> jax_fp8.matmul(x, w, granularity="row").tolist()
    [[784.0, 784.0, 784.0], [784.0, 784.0, 784.0]]
    >>> jax_fp8.matmul(x.astype(jnp.bfloat16), w, recipe="weight_only").dtype
    dtype(bfloat16)
    """
    op = "matmul"
    if isinstance(x, ScaledArray):
        raise TypeError(f"{op}: x is a ScaledArray already; use jax_fp8.scaled_matmul")
    if not isinstance(w, ScaledArray):
        raise TypeError(
            f"{op}: w must be a jax_fp8.ScaledArray of shape (N, K), got {describe(w)}: quantize"
            " it with jax_fp8.quantize, K last; for two wide arrays use jax_fp8.dot_general"
            " or jax_fp8.einsum"
        )
    x = jnp.asarray(x)
    if x.dtype not in WIDE_DTYPES:
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16, got {x.dtype}{x.shape}")
    recipe = get_recipe(op, recipe)
    if recipe.weight is None:
        raise ValueError(f"{op}: the recipe multiplies wide values, and w is FP8")
    if recipe.needs_key:
        raise ValueError(f"{op}: it takes no key to round gradients with; dot_general does")
    check_scaled_array(op, "w", w)
    batch_dims = check_shapes(op, x, w)
    operand = _activation(op, recipe, x, dtype, granularity, scale)
    if operand is not None and scale is not None:
        scale = lax.stop_gradient(static_scale(op, scale, x.shape, operand.granularity))
    out_dtype = x.dtype if preferred_element_type is None else preferred_element_type

    def run(activation: str | None, x: jax.Array, w: ScaledArray, bias: Any, scales: Any) -> Any:
        scale, output_scale = scales
        return multiply(
            op,
            _quantize(x, operand, scale, implementation),
            w,
            batch_dims=batch_dims,
            bias=bias,
            activation=activation,
            preferred_element_type=out_dtype,
            precision=precision,
            output_scale=output_scale,
            return_amax=return_amax,
            implementation=implementation,
        )

    def gradient(dz: jax.Array, w: ScaledArray, dtype: Any) -> jax.Array:
        return _input_gradient(op, recipe, operand, dz, w, dtype, implementation)

    refusal = None if output_scale is None else FP8_HAS_NO_GRADIENT
    bias = None if bias is None else jnp.asarray(bias)
    differentiable = with_gradients(
        op,
        run,
        activation,
        input_gradient=gradient,
        refusal=refusal,
        placements=(placement(x), None if bias is None else placement(bias)),
    )
    return differentiable(x, w, bias, (scale, output_scale))


def _activation(
    op: str, recipe: Recipe, x: jax.Array, dtype: Any, granularity: Any, scale: Any
) -> Operand | None:
    """How ``x`` is quantized; None leaves it wide."""
    operand = recipe.activation
    if operand is None:
        if any(option is not None for option in (granularity, scale, dtype)):
            raise ValueError(
                f"{op}: granularity, scale and dtype say how x is quantized, and with the recipe"
                " 'weight_only' it is not"
            )
        if x.dtype == jnp.float32:
            raise TypeError(
                f"{op}: the recipe 'weight_only' takes x of bfloat16 or float16, got"
                f" {x.dtype}{x.shape}; cast it, or quantize it with another recipe"
            )
        return None
    if scale is None and operand.scaling != "dynamic":
        raise ValueError(
            f"{op}: the recipe's activation has {operand.scaling} scaling: scale must be given"
        )
    return dataclasses.replace(
        operand,
        dtype=operand.dtype if dtype is None else check_fp8_dtype(op, "dtype", dtype),
        granularity=operand.granularity
        if granularity is None
        else check_granularity(op, granularity),
        scaling="dynamic",  # With a given scale there is nothing to choose.
    )


def _quantize(
    x: jax.Array, operand: Operand | None, scale: Any, implementation: str | None
) -> ScaledArray:
    if operand is None:
        return ScaledArray(x, jnp.ones((1,) * x.ndim, jnp.float32))
    return quantize(
        x,
        dtype=operand.dtype,
        granularity=operand.granularity,
        scale=scale,
        power_of_two=operand.power_of_two and scale is None,
        implementation="xla" if implementation == "xla" else None,
    )


def _input_gradient(
    op: str,
    recipe: Recipe,
    operand: Operand | None,
    dz: jax.Array,
    w: ScaledArray,
    dtype: Any,
    implementation: str | None,
) -> jax.Array:
    """``dz @ w``, of the dtype of ``x``: a product of dot_general, whose gradients these are."""
    batch = w.ndim - 2
    view = view_of(w.ndim, (w.ndim - 1,), tuple(range(batch)))
    if operand is not None and recipe.dgrad is not None and recipe.dgrad[0] is not None:
        gradient = dataclasses.replace(recipe.dgrad[0], granularity=operand.granularity)
        recipe = dataclasses.replace(recipe, dgrad=(gradient, recipe.dgrad[1]))
    rows = dz.shape[batch:-1]
    if not keeps_rows(dataclasses.replace(recipe, wgrad=None), rows):
        rows = (math.prod(rows),)
    apart = reshape(dz, (math.prod(dz.shape[:batch]), *rows, dz.shape[-1]))
    dx = input_gradient(op, recipe, apart, view.apply_scaled(op, "w", w), dtype, implementation)
    return reshape(dx, (*dz.shape[:-1], w.shape[-1]))
