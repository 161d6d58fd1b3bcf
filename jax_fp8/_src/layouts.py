"""The two layouts of an operand: one for the product, its transpose for a gradient's product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8._src.cast_transpose import cast_layouts
from jax_fp8._src.cast_transpose_rule import CastTransposeConfig
from jax_fp8._src.quantize import dequantize, quantize
from jax_fp8._src.recipe import Operand, Recipe
from jax_fp8._src.scaled_array import BLOCK, ScaledArray

#: Straight, transposed, and the amax where a static scale was given, else None.
Layouts = tuple[ScaledArray | None, ScaledArray | None, jax.Array | None]


def quantize_layouts(
    x: jax.Array,
    straight: Operand | None,
    transposed: Operand | None,
    *,
    scale: jax.Array | None = None,
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> Layouts:
    """Quantizes ``x`` of ``(B, *R, C)`` as it lies and transposed, in one read where that can be.

    Args:
      x: a wide array. Where it has several axes of rows, they are one to scales, and no block may
        reach over the end of the last.
      straight: how ``(B, *R, C)`` is quantized; None leaves it out.
      transposed: how ``(B, C, *R)`` is; likewise.
      scale: the float32 scale of what has no dynamic one.
      key: for what is rounded stochastically.
      implementation: of the product that this is for; ``"xla"`` is one of quantization too.
    """
    quantizer = "xla" if implementation == "xla" else None
    if straight is not None and straight == transposed:
        return _quantize(x, straight, (True, True), scale, key, quantizer)
    first, second = None, None
    amax = None
    if straight is not None:
        first, _, amax = _quantize(x, straight, (True, False), scale, key, quantizer)
    if transposed is not None:
        _, second, other = _quantize(x, transposed, (False, True), scale, key, quantizer)
        amax = other if amax is None else amax
    return first, second, amax


def _quantize(
    x: jax.Array,
    operand: Operand,
    wanted: tuple[bool, bool],
    scale: jax.Array | None,
    key: jax.Array | None,
    quantizer: str | None,
) -> Layouts:
    scale = None if operand.scaling == "dynamic" else scale
    key = key if operand.rounding == "stochastic" else None
    power_of_two = operand.power_of_two and scale is None  # A given scale is one already.
    if wanted == (True, False) and key is None:
        found: Any = quantize(
            x,
            dtype=operand.dtype,
            granularity=operand.granularity,
            scale=scale,
            power_of_two=power_of_two,
            return_amax=scale is not None,
            implementation=quantizer,
        )
        data, amax = found if scale is not None else (found, None)
        return data, None, None if amax is None else amax.reshape(())
    config = CastTransposeConfig(
        dtype=operand.dtype,
        granularity=operand.granularity,
        static=scale is not None,
        power_of_two=power_of_two,
        stochastic=key is not None,
        straight=wanted[0],
        transposed=wanted[1],
        amax=scale is not None,
        implementation=quantizer,
        row_axes=x.ndim - 2,
    )
    straight, transposed, *amaxes = cast_layouts(config, x, scale, key)
    return straight, transposed, amaxes[0].reshape(()) if amaxes else None


def keeps_rows(recipe: Recipe, rows: tuple[int, ...]) -> bool:
    """Whether several axes of rows can stay apart: where no block reaches over the end of one."""
    straight = recipe.activation, recipe.dgrad[0] if recipe.dgrad else None
    turned = recipe.wgrad or ()
    blocks = {operand.granularity for operand in (*straight, *turned) if operand}
    if len(rows) < 2 or (BLOCK, BLOCK) in blocks or 0 in rows:
        return False
    along_rows = any(operand and operand.granularity == (1, BLOCK) for operand in turned)
    return not along_rows or rows[-1] % BLOCK == 0


def transpose(x: ScaledArray) -> tuple[ScaledArray | jax.Array, jax.Array | None]:
    """``x`` of ``(B, *R, C)`` for a product over R, and what to multiply its other operand by.

    A scale a row changes along R, where no product takes one: it goes to the other operand,
    which the factor, float32 ``(B, *R, 1)``, is for. It is at most 1; the rest is a scale of the
    tensor. Blocks of (1, 128) cannot be taken apart like that, and come back as wide values.
    """
    data = turn(x.data)
    if x.granularity == "tensor" and x.scale.size == 1:
        return ScaledArray(data, x.scale), None
    if x.granularity == (BLOCK, BLOCK):
        return ScaledArray(data, turn(x.scale), x.granularity), None
    if x.granularity == (1, BLOCK):
        return turn(dequantize(x)), None
    scale = jnp.broadcast_to(x.scale, (*x.shape[:-1], 1))
    largest = jnp.max(scale, keepdims=True, initial=2.0**-126)
    return ScaledArray(data, largest), scale / largest


def turn(x: jax.Array) -> jax.Array:
    """``(B, *R, C)`` as ``(B, C, *R)``."""
    return jnp.moveaxis(x, -1, 1)
