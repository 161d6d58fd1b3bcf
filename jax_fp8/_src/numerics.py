"""The arithmetic of quantization in plain JAX, exact to the last bit on every backend.

The kernels round a division and a reciprocal to nearest, as IEEE 754 has it. XLA promises neither,
and so the scales are computed here in a way that gives the same bits whatever XLA makes of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src.scaled_array import fp8_max


def round_saturate(x: jax.Array, inverse_scale: jax.Array, dtype: Any) -> jax.Array:
    """Rounds ``x * inverse_scale`` to nearest even in FP8, saturating; infinities become NaN."""
    largest = fp8_max(dtype)
    scaled = jnp.clip(x * inverse_scale, -largest, largest)  # clip keeps NaN
    return jnp.where(jnp.isinf(x), jnp.nan, scaled).astype(dtype)


def _centering(x: jax.Array) -> jax.Array:
    """A power of two that brings ``x`` away from the ends of float32's range."""
    return jnp.where(jnp.abs(x) < 1.0, jnp.float32(2.0**64), jnp.float32(2.0**-64))


def _reciprocal(x: jax.Array) -> jax.Array:
    """``1 / x`` rounded to nearest, which XLA's division on GPUs (off by up to 2 ulp) is not.

    A Newton step leads to within an ulp; of that and its neighbours, the one with the smallest
    residual ``1 - q * x`` is the answer. The residual is exact: both factors are split in halves
    of 12 bits, so that each product, and each partial sum, fits into a float32. The barriers keep
    XLA from rewriting what is exact as written.
    """

    def bits(a: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(a, jnp.uint32)

    def floats(a: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(a, jnp.float32)

    def halves(a: jax.Array) -> tuple[jax.Array, jax.Array]:
        high = floats(bits(a) & jnp.uint32(0xFFFFF000))
        return high, a - high

    centering = _centering(x)
    x_high, x_low = halves(x * centering)

    def residual(q: jax.Array) -> jax.Array:
        q_high, q_low = halves(q)
        return (((1.0 - q_high * x_high) - q_high * x_low) - q_low * x_high) - q_low * x_low

    q = lax.optimization_barrier(1.0 / (x * centering))
    q = lax.optimization_barrier(q + lax.optimization_barrier(q * residual(q)))
    best = q
    for neighbour in (floats(bits(q) - 1), floats(bits(q) + 1)):
        closer = jnp.abs(residual(neighbour)) < jnp.abs(residual(best))
        best = jnp.where(closer, neighbour, best)
    return best * centering


def inverse(scale: jax.Array) -> jax.Array:
    """``1 / scale``; NaN where that or ``scale`` is not finite, so that all data is."""
    reciprocal = _reciprocal(scale)
    return jnp.where(jnp.isfinite(reciprocal) & jnp.isfinite(scale), reciprocal, jnp.nan)


def dynamic_scale(amax: jax.Array, dtype: Any) -> jax.Array:
    """``max(amax / max, 2^-126)`` in float32; 1 where the amax is 0, NaN where it is not finite."""
    # Both formats' max is 7 * 2^k. The division by 7 is rounded to nearest by one Newton step,
    # whose residual is exact because no subtraction loses a bit; XLA's own division may be off,
    # or become a multiplication by the reciprocal.
    centering = _centering(amax)
    centered = amax * centering
    quotient = lax.optimization_barrier(centered * jnp.float32(1 / 7))
    residual = ((centered - 4 * quotient) - 2 * quotient) - quotient
    quotient = lax.optimization_barrier(quotient + residual * jnp.float32(1 / 7))
    scale = jnp.maximum(quotient * (7 / fp8_max(dtype)) / centering, 2.0**-126)
    return jnp.where(amax == 0, 1.0, jnp.where(jnp.isfinite(amax), scale, jnp.nan))


def absolute_max(x: jax.Array, axis: Any = None, keepdims: bool = False) -> jax.Array:
    """The largest magnitude of float32 ``x``, NaN where there is one, 0 where there is nothing.

    As integers magnitudes order with infinity and then NaN on top; XLA's maximum of floats may
    lose a NaN on the CPU.
    """
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return lax.bitcast_convert_type(
        jnp.max(bits, axis=axis, keepdims=keepdims, initial=0), jnp.float32
    )
