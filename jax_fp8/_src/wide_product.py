"""The product of operands that stay wide."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src.placement import placement_of_product


def multiply_wide(
    a: jax.Array, b: jax.Array, contract: Any, dtype: Any, precision: Any
) -> jax.Array:
    """The product over the axes ``contract`` of each, in batches along the first, to ``dtype``."""
    common = jnp.promote_types(a.dtype, b.dtype)
    if a.dtype != b.dtype:  # XLA would undo the cast, and round the wider one instead.
        a, b = lax.optimization_barrier((a.astype(common), b.astype(common)))
    # XLA on a GPU multiplies float32 values in fewer digits where the result has fewer.
    summed = jnp.promote_types(common, dtype)
    batch = ((0,), (0,))
    y = lax.dot_general(
        *(a.astype(common), b.astype(common)),
        (contract, batch),
        precision=precision,
        preferred_element_type=summed,
        out_sharding=placement_of_product(a, b, contract, batch),
    )
    return y.astype(dtype)
