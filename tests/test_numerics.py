"""The arithmetic of scales in plain JAX, bit for bit against IEEE 754."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import pair_id

from jax_fp8._src import numerics

pytestmark = pytest.mark.usefixtures("optimized")

SMALLEST, LARGEST = np.float32(2.0**-126), np.finfo(np.float32).max


def magnitudes(rng, smallest, largest):
    """All mantissas near one, and numbers of any size in between."""
    near_one = np.arange(1 << 17, dtype=np.uint32) * 64 + rng.integers(0, 64, 1 << 17)
    near_one = (near_one.astype(np.uint32) + np.uint32(127 << 23)).view(np.float32)
    low, high = (int(np.float32(end).view(np.uint32)) for end in (smallest, largest))
    anything = rng.integers(low, high + 1, 1 << 18, dtype=np.uint32).view(np.float32)
    powers = np.float32(2.0) ** np.arange(-126, 128, dtype=np.float32)
    ends = [smallest, np.nextafter(smallest, 1), np.nextafter(largest, 1), largest]
    beside = (np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf)))
    x = np.concatenate([near_one, anything, powers, *beside, np.float32(ends)])
    return x[(x >= smallest) & (x <= largest)]


def test_inverse_is_rounded_to_nearest(handlers, rng):
    # Beyond 2^126 the reciprocal is subnormal, and zero for XLA's CPU backend.
    x = magnitudes(rng, SMALLEST, 2.0**126)
    ref.assert_same_bits(jax.jit(numerics.inverse)(x), np.float32(1) / x)
    ref.assert_same_bits(jax.jit(numerics.inverse)(-x), np.float32(-1) / x)


@pytest.mark.parametrize("value", [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-39], ids=str)
def test_inverse_of_what_has_none_is_nan(handlers, value):
    got = jax.jit(numerics.inverse)(jnp.array([value, 2.0], jnp.float32))
    ref.assert_same_bits(got, np.float32([np.nan, 0.5]))


@pytest.mark.parametrize("dtype", ref.FP8, ids=pair_id)
def test_dynamic_scale_is_rounded_to_nearest(handlers, rng, dtype):
    amax = np.concatenate([magnitudes(rng, SMALLEST, LARGEST), np.float32([0, np.nan, np.inf])])
    got = jax.jit(lambda amax: numerics.dynamic_scale(amax, dtype))(amax)
    ref.assert_same_bits(got, ref.dynamic_scale(amax, dtype))


@pytest.mark.parametrize("dtype", ref.FP8, ids=pair_id)
def test_dynamic_scale_is_rounded_up_to_a_power_of_two(handlers, rng, dtype):
    amax = np.concatenate([magnitudes(rng, SMALLEST, LARGEST), np.float32([0, np.nan, np.inf])])
    got = jax.jit(lambda amax: numerics.dynamic_scale(amax, dtype, power_of_two=True))(amax)
    ref.assert_same_bits(got, ref.dynamic_scale(amax, dtype, power_of_two=True))


@pytest.mark.parametrize("dtype", ref.FP8, ids=pair_id)
def test_the_largest_value_of_a_dynamic_scale_is_the_largest_code(handlers, rng, dtype):
    amax = magnitudes(rng, 2.0**-100, LARGEST)

    def largest(amax):
        scale = numerics.dynamic_scale(amax, dtype)
        return numerics.round_saturate(amax, numerics.inverse(scale), dtype)

    got = np.asarray(jax.jit(largest)(amax)).astype(np.float32)
    np.testing.assert_array_equal(got, ref.fp8_max(dtype))


def test_absolute_max(handlers):
    x = np.float32([[1, -3, 2], [0, -0.0, 0], [1, np.nan, np.inf], [1, -np.inf, 2]])
    got = jax.jit(lambda x: numerics.absolute_max(x, axis=1))(x)
    ref.assert_same_bits(got, np.float32([3, 0, np.nan, np.inf]))
    assert float(numerics.absolute_max(jnp.zeros((0,)))) == 0
