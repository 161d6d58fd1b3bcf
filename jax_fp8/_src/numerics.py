"""The arithmetic of quantization in plain JAX, exact to the last bit on every backend.

The kernels round a division and a reciprocal to nearest, as IEEE 754 has it. XLA promises neither,
and so the scales are computed here in a way that gives the same bits whatever XLA makes of it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
from jax import lax

from jax_fp8._src.scaled_array import fp8_max


def round_saturate(x: jax.Array, inverse_scale: jax.Array, dtype: Any) -> jax.Array:
    """Rounds ``x * inverse_scale`` to nearest even in FP8, saturating; infinities become NaN."""
    largest = fp8_max(dtype)
    scaled = jnp.clip(x * inverse_scale, -largest, largest)  # clip keeps NaN
    return jnp.where(jnp.isinf(x), jnp.nan, scaled).astype(dtype)


def as_rounded(results: Any, implementation: str | None) -> Any:
    """Keeps XLA from leaving out a rounding to FP8 together with the decoding behind it.

    Its compiler for GPUs does that within one program, as it may have more digits than it was asked
    for. There, plain JAX runs by its name alone.
    """
    return lax.optimization_barrier(results) if implementation == "xla" else results


def round_stochastic(
    x: jax.Array, inverse_scale: jax.Array, bits: jax.Array, dtype: Any
) -> jax.Array:
    """Rounds ``x * inverse_scale`` in FP8 up or down, saturating; infinities become NaN.

    ``bits`` are 16 random ones for each element, as uint32. With u the distance of the codes
    around ``v = |x * inverse_scale|``, the magnitude is ``floor(v / u + bits * 2^-16) * u``, whose
    mean is v. All but the sum are exact, so no way of evaluating them gives other bits.
    """
    info = jnp.finfo(dtype)
    scaled = x * inverse_scale
    magnitude = jnp.minimum(jnp.abs(scaled), fp8_max(dtype))
    binade = lax.bitcast_convert_type(magnitude, jnp.uint32) & jnp.uint32(0x7F800000)
    binade = jnp.maximum(binade, jnp.uint32((127 + int(info.minexp)) << 23))
    unit = lax.bitcast_convert_type(binade - jnp.uint32(int(info.nmant) << 23), jnp.float32)
    # The exponents of a number and of its reciprocal add up to twice the bias.
    inverse_unit = lax.bitcast_convert_type(
        jnp.uint32((254 + int(info.nmant)) << 23) - binade, jnp.float32
    )
    fraction = bits.astype(jnp.float32) * jnp.float32(2.0**-16)
    rounded = jnp.floor(magnitude * inverse_unit + fraction) * unit
    # By the bits: a comparison would not see the sign of -0.
    negative = lax.bitcast_convert_type(scaled, jnp.uint32) >> 31 != 0
    rounded = jnp.where(negative, -rounded, rounded)
    return jnp.where(jnp.isinf(x) | jnp.isnan(scaled), jnp.nan, rounded).astype(dtype)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """16 random bits for each element of an array of ``shape``, as uint32.

    Threefry-2x32 (Salmon et al., SC 2011) of the pair ``key`` makes those of four elements at a
    time: of the elements 4 i to 4 i + 3 in row-major order from the 64-bit counter i, high word
    first; they take the low and the high half of the first word and of the second.
    """
    size = math.prod(shape)
    if size == 0:
        return jnp.zeros(shape, jnp.uint32)
    quads = math.ceil(size / 4)
    columns = min(quads, 1 << 16)  # Two counters of 32 bits make one of more.
    rows = math.ceil(quads / columns)
    row, column = (lax.broadcasted_iota(jnp.uint32, (rows, columns), axis) for axis in (0, 1))
    counters = jnp.stack([row >> 16, row << 16 | column])
    first, second = jax.extend.random.threefry_2x32((key[0], key[1]), counters)
    low = jnp.uint32(0xFFFF)
    halves = jnp.stack([first & low, first >> 16, second & low, second >> 16], axis=-1)
    return halves.reshape(-1)[:size].reshape(shape)


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


def dynamic_scale(amax: jax.Array, dtype: Any, power_of_two: bool = False) -> jax.Array:
    """``max(amax / max, 2^-126)`` in float32; 1 where the amax is 0, NaN where it is not finite.

    ``power_of_two`` rounds it up to the next one.
    """
    # Both formats' max is 7 * 2^k. The division by 7 is rounded to nearest by one Newton step,
    # whose residual is exact because no subtraction loses a bit; XLA's own division may be off,
    # or become a multiplication by the reciprocal.
    centering = _centering(amax)
    centered = amax * centering
    quotient = lax.optimization_barrier(centered * jnp.float32(1 / 7))
    residual = ((centered - 4 * quotient) - 2 * quotient) - quotient
    quotient = lax.optimization_barrier(quotient + residual * jnp.float32(1 / 7))
    scale = jnp.maximum(quotient * (7 / fp8_max(dtype)) / centering, 2.0**-126)
    if power_of_two:  # As bits: a carry out of the mantissa is the next binade.
        bits = lax.bitcast_convert_type(scale, jnp.uint32) + jnp.uint32(0x7FFFFF)
        scale = lax.bitcast_convert_type(bits & jnp.uint32(0xFF800000), jnp.float32)
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
