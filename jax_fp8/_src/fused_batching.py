"""jax.vmap of a fused producer: every entry is quantized as if it were alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8._src.batching import with_axis
from jax_fp8._src.fused_definition import FusedConfig


def batch_fused(config: FusedConfig, size: int, batched: list[bool], operands: Any) -> Any:
    """The configuration and the operands with one more batch axis in front."""
    x, residual, weight, bias, scale = operands
    batch = x.shape[batched[0] :][: config.batch_dims]

    front = functools.partial(with_axis, size=size)

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
