"""How an operand of any rank becomes the (batch, rows, K) that handlers take."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jax_fp8._src.scaled_array import BLOCK, Granularity, scale_shape


@dataclasses.dataclass(frozen=True)
class Folded:
    """An operand as the handlers take it: (B, rows, K) and its scale of the same rank."""

    data: jax.Array
    scale: jax.Array
    granularity: Granularity


def fold(
    data: jax.Array,
    scale: jax.Array,
    granularity: Granularity,
    batch: tuple[int, ...],
    contracted: int,
) -> Folded:
    """Folds ``(*batch, ..., R, *contracted)`` to ``(prod(batch), rows, K)``.

    Axes between ``batch`` and the contracted ones become rows. Their scales are brought to a form
    that states the same values and that a kernel can index: one scale for each batch entry, row or
    block.
    """
    if contracted > 1:  # No block ends but with the last of them.
        data, scale = (
            array.reshape(*array.shape[:-contracted], math.prod(array.shape[-contracted:]))
            for array in (data, scale)
        )
    *leading, columns = data.shape
    count = math.prod(batch)
    inner = leading[len(batch) :]
    rows = math.prod(inner)
    if granularity == "tensor" and scale.size != 1:
        if all(size == 1 for size in scale.shape[len(batch) :]):
            # Stacked arrays, each with one scale.
            scale = jnp.broadcast_to(scale, (*batch, *(1,) * (len(inner) + 1)))
        else:
            scale, granularity = jnp.broadcast_to(scale, (*leading, 1)), "row"
    elif granularity == (BLOCK, BLOCK) and len(inner) > 1 and inner[-1] % BLOCK:
        # Blocks that end inside the folded rows: state each row's scales instead.
        scale = jnp.repeat(scale, BLOCK, axis=-2)[..., : inner[-1], :]
        granularity = (1, BLOCK)
    if granularity == "tensor":
        shape: tuple[int, ...] = (scale.size, 1, 1)
    else:
        shape = scale_shape((count, rows, columns), granularity)
    return Folded(data.reshape(count, rows, columns), scale.reshape(shape), granularity)
