"""concatenate: FP8 weights of one input as one weight, such as those of q, k and v."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_fp8._src.quantize import dequantize, quantize
from jax_fp8._src.scaled_array import BLOCK, ScaledArray, check_scaled_array


def concatenate(weights: Sequence[ScaledArray], *, requantize: bool = False) -> ScaledArray:
    """Joins FP8 weights along their output axis, so that one product makes what several made.

    Nothing is rounded: scales of tensors become scales of rows, unless all are the same, and scales
    of rows and of blocks stay what they are. With ``requantize``, weights with scales of tensors
    get one for all, the largest, and those of them that had a smaller one are rounded again.

    Args:
      weights: each ``(..., out, in)``, of one ``in`` and one dtype.
      requantize: whether the result has one scale, for products that want it.

    Returns:
      A ScaledArray ``(..., sum of out, in)``. Under a transformation, whose scales have no values
      yet, those of tensors always become scales of rows.

    Raises:
      TypeError: for anything but ScaledArrays.
      ValueError: for weights that do not fit together: other shapes, dtypes or granularities, or
        blocks of (128, 128) that a seam would cut.

    >>> import jax, jax.numpy as jnp, jax_fp8, jax_fp8.checkpoint
    >>> q = jax_fp8.quantize(jnp.ones((16, 32)))
    >>> k = jax_fp8.quantize(jnp.full((8, 32), 2.0))
    >>> qk = jax_fp8.checkpoint.concatenate([q, k])
    >>> qk.shape, qk.granularity, float(jax_fp8.dequantize(qk)[16, 0])
    ((24, 32), 'row', 2.0)
    """
    op = "concatenate"
    weights = [check_scaled_array(op, f"weights[{i}]", w) for i, w in enumerate(weights)]
    if not weights:
        raise ValueError(f"{op}: there are no weights")
    shapes = [w.shape for w in weights]
    if any(len(shape) < 2 for shape in shapes) or len({(*s[:-2], s[-1]) for s in shapes}) > 1:
        raise ValueError(f"{op}: weights must differ in axis -2 alone, got shapes {shapes}")
    if len({w.dtype for w in weights}) > 1:
        raise ValueError(
            f"{op}: weights must have one dtype, got {[w.dtype.name for w in weights]}"
        )
    granularities = {w.granularity for w in weights}
    if requantize:
        if granularities != {"tensor"}:
            raise ValueError(f"{op}: requantize is for granularity 'tensor', got {granularities}")
        largest = jnp.stack([w.scale for w in weights]).max(0)
        weights = [_requantized(w, largest) for w in weights]
        return ScaledArray(_joined([w.data for w in weights]), largest, "tensor")
    data = _joined([w.data for w in weights])
    if granularities == {"tensor"} and _same([w.scale for w in weights]):
        return ScaledArray(data, weights[0].scale, "tensor")
    if granularities <= {"tensor", "row"}:
        scales = [jnp.broadcast_to(w.scale, (*w.shape[:-1], 1)) for w in weights]
        return ScaledArray(data, _joined(scales), "row")
    if len(granularities) > 1:
        raise ValueError(f"{op}: weights must have one granularity, got {granularities}")
    granularity = weights[0].granularity
    cut = [shape[-2] % BLOCK for shape in shapes[:-1]]
    if granularity == (BLOCK, BLOCK) and any(cut):
        raise ValueError(
            f"{op}: with granularity {granularity}, all weights but the last must have a multiple"
            f" of {BLOCK} rows, got shapes {shapes}"
        )
    return ScaledArray(data, _joined([w.scale for w in weights]), granularity)


def _joined(arrays: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(arrays, axis=-2)


def _same(scales: list[jax.Array]) -> bool:
    if any(isinstance(scale, jax.core.Tracer) for scale in scales):
        return False
    return all(s.shape == scales[0].shape and bool((s == scales[0]).all()) for s in scales)


def _requantized(weight: ScaledArray, scale: jax.Array) -> ScaledArray:
    again: ScaledArray = quantize(dequantize(weight), dtype=weight.dtype, scale=scale)
    return again
