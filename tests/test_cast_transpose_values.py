"""cast_transpose against quantize's definition in numpy, bit for bit, of x and of its transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import on_gpu, pair_id, sample

import jax_fp8
from jax_fp8._src import numerics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]

SPECIAL = [np.nan, np.inf, -np.inf]
# Whole tiles and edges, in vectors and in single bytes on either side.
SHAPES = ((2, 130, 264), (131, 257), (3, 256, 36), (44, 200))
KEY = np.array([0x12345678, 0x9ABCDEF0], np.uint32)

granularities = pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
formats = pytest.mark.parametrize("dtype", ref.FP8, ids=pair_id)
wides = pytest.mark.parametrize("wide", ref.WIDE, ids=pair_id)


def turned(x):
    return np.swapaxes(x, -1, -2)


def check(
    x,
    implementation,
    granularity="tensor",
    dtype=ref.E4M3,
    *,
    scale=None,
    power_of_two=False,
    key=None,
    layouts=(True, True),
):
    """Holds data, scales and amax to the reference, and returns the straight data as float32."""
    has_amax = granularity == "tensor"
    *got, amax = jax_fp8.cast_transpose(
        jnp.asarray(x),
        dtype=dtype,
        granularity=granularity,
        scale=scale,
        power_of_two=power_of_two,
        key=key,
        straight=layouts[0],
        transposed=layouts[1],
        return_amax=has_amax,
        implementation=implementation,
    ) + (() if has_amax else (None,))
    if has_amax:
        ref.assert_same_bits(amax, ref.amax(x, granularity))
    bits = None if key is None else ref.random_bits(key, x.shape)
    wants = ((x, bits), (turned(x), None if bits is None else turned(bits)))
    for layout, asked, (values, own) in zip(got, layouts, wants, strict=True):
        assert (layout is not None) == asked
        if not asked:
            continue
        data, scales = ref.quantize(values, dtype, granularity, scale, power_of_two, own)
        assert layout.granularity == granularity
        ref.assert_same_bits(layout.scale, scales)
        ref.assert_same_bits(layout.data, data)
    return None if got[0] is None else np.asarray(got[0].data).astype(np.float32)


@granularities
@wides
@pytest.mark.parametrize(
    "shape", [*SHAPES[:2], *on_gpu(*SHAPES[2:], (2, 3, 300, 144), (1000, 1032))], ids=pair_id
)
def test_both_layouts(quantizer, rng, shape, wide, granularity):
    dtype = ref.E4M3 if len(shape) == 3 else ref.E5M2
    check(sample(rng, "heavy", shape).astype(wide), quantizer, granularity, dtype)


@granularities
@pytest.mark.parametrize("layouts", [(True, False), (False, True)], ids=["straight", "transposed"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_one_layout(quantizer, rng, granularity, layouts, stochastic):
    x = sample(rng, "heavy", SHAPES[0]).astype(ref.BF16)
    check(x, quantizer, granularity, key=KEY if stochastic else None, layouts=layouts)


@wides
@pytest.mark.parametrize("shape", SHAPES[:2], ids=pair_id)
def test_static_scale(quantizer, rng, shape, wide):
    dtype = ref.E4M3 if len(shape) == 3 else ref.E5M2
    # Some of the data saturates, and some of it is subnormal.
    data = check(sample(rng, "normal", shape).astype(wide), quantizer, dtype=dtype, scale=2.0**-8)
    assert dtype == ref.E5M2 or np.any(np.abs(data) == 448)


@granularities
@pytest.mark.parametrize("shape", SHAPES[:2], ids=pair_id)
def test_powers_of_two(quantizer, rng, shape, granularity):
    dtype = ref.E4M3 if len(shape) == 3 else ref.E5M2
    x = sample(rng, "heavy", shape)
    x[..., :40, :40] *= 1e-30
    x[..., 3, 5] = ref.fp8_max(dtype) * 2.0**10  # A scale that is one already.
    check(x, quantizer, granularity, dtype, power_of_two=True)


@granularities
@pytest.mark.parametrize("shape", [(4, 4), (4, 129)], ids=pair_id)
def test_powers_of_two_of_zeros_and_of_what_is_not_finite(quantizer, granularity, shape):
    check(np.zeros(shape, np.float32), quantizer, granularity, power_of_two=True)
    x = np.ones(shape, np.float32)
    x[1, 2] = np.inf
    check(x, quantizer, granularity, power_of_two=True)


@granularities
@pytest.mark.parametrize("dtype, value", list(zip(ref.FP8 * 2, SPECIAL, strict=False)), ids=str)
def test_what_is_not_finite(quantizer, rng, granularity, dtype, value):
    x = sample(rng, "normal", (2, 140, 264))
    x[1, 129, 257] = value
    check(x, quantizer, granularity, dtype)
    if granularity == "tensor":
        data = check(x, quantizer, granularity, dtype, scale=0.01)
        assert np.isnan(data).sum() == 1
        check(x, quantizer, granularity, dtype, scale=0.01, key=KEY)


@pytest.mark.parametrize("scale", [0.0, -0.25, *SPECIAL], ids=str)
def test_odd_static_scales(quantizer, rng, scale):
    check(sample(rng, "normal", SHAPES[1]), quantizer, scale=scale)
    check(sample(rng, "normal", SHAPES[1]), quantizer, scale=scale, key=KEY)


@granularities
@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (2, 0, 5), (0, 4, 5), (2, 0, 0)], ids=pair_id)
def test_zero_size(quantizer, granularity, shape):
    x = np.zeros(shape, np.float32)
    check(x, quantizer, granularity)
    check(x, quantizer, granularity, key=KEY, power_of_two=True)
    check(x, quantizer, granularity, layouts=(False, True))
    if granularity == "tensor":
        check(x, quantizer, granularity, scale=0.5)


@granularities
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 2, 2, 3, 5)], ids=pair_id)
def test_small_shapes(quantizer, rng, granularity, shape):
    check(sample(rng, "normal", shape), quantizer, granularity)
    check(sample(rng, "normal", shape), quantizer, granularity, key=KEY)


@granularities
def test_the_ends_of_the_range_of_float32(quantizer, rng, granularity):
    for largest in (2.0**-126, 2.0**-110, 3e38):
        x = rng.choice(np.float32([1, -1, 0]), SHAPES[1]) * np.float32(largest)
        check(x, quantizer, granularity)
        check(x, quantizer, granularity, power_of_two=True)


def test_a_kernel_counts_subnormals(handlers, rng):
    x = rng.integers(1, 2**23, SHAPES[0], dtype=np.uint32).view(np.float32)
    for granularity in ref.GRANULARITIES:
        check(x, "kernel", granularity)
        check(x, "kernel", granularity, key=KEY)


# --- Stochastic rounding --------------------------------------------------------------------------


def test_the_reference_is_threefry():
    # From the tests of the paper's Random123.
    a, b = ref.threefry((0x13198A2E, 0x03707344), 0x243F6A88, 0x85A308D3)
    assert (int(a[0]), int(b[0])) == (0xC4923A9C, 0x483DF7A0)
    got = numerics.random_bits(jnp.asarray(KEY), (3, 70_001))  # More than one row of counters.
    np.testing.assert_array_equal(got, ref.random_bits(KEY, (3, 70_001)))


@granularities
@wides
@pytest.mark.parametrize("shape", SHAPES[:2], ids=pair_id)
def test_stochastic_rounding(quantizer, rng, shape, wide, granularity):
    dtype = ref.E5M2 if len(shape) == 3 else ref.E4M3
    x = sample(rng, "heavy", shape).astype(wide)
    check(x, quantizer, granularity, dtype, key=KEY)


@formats
def test_stochastic_rounding_between_all_codes(quantizer, rng, dtype):
    codes = np.sort(ref.finite_codes(dtype).astype(np.float32))
    between = (codes[1:, None] - codes[:-1, None]) * rng.random(64) + codes[:-1, None]
    beyond = codes[-1] * np.float32([[1 + 2**-20, 1.02, 1.1, 2, 1e9], [-1.02, -1.1, -2, 1e30, 5]])
    check(between.astype(np.float32), quantizer, dtype=dtype, scale=1.0, key=KEY)
    check(np.tile(codes, (3, 1)), quantizer, dtype=dtype, scale=1.0, key=KEY)
    data = check(beyond, quantizer, dtype=dtype, scale=1.0, key=KEY)
    assert np.abs(data[0]).min() == codes[-1]


@formats
def test_codes_stay_as_they_are(quantizer, dtype):
    codes = np.repeat(ref.finite_codes(dtype)[None], 50, axis=0)
    got, _ = jax_fp8.cast_transpose(
        codes.astype(np.float32), dtype=dtype, scale=1.0, key=KEY, implementation=quantizer
    )
    ref.assert_same_bits(got.data, codes)


@formats
def test_the_mean_is_the_value(quantizer, rng, dtype):
    """Within five standard errors, of values that are normal and subnormal in FP8."""
    values = np.exp2(rng.uniform(-20, 8, 40)).astype(np.float32) * rng.choice([-1, 1], 40)
    x = np.repeat(values[:, None], 20_000, axis=1).astype(np.float32)
    got, _ = jax_fp8.cast_transpose(x, dtype=dtype, scale=1.0, key=KEY, implementation=quantizer)
    data = np.asarray(got.data).astype(np.float64)
    error = np.abs(data.mean(1) - values)
    # 16 bits are what the probability is a multiple of.
    steps = np.array([len(np.unique(row)) for row in data])
    assert steps.max() == 2 and (steps == 2).sum() > 20
    unit = data.max(1) - data.min(1)
    np.testing.assert_array_less(
        error, 5 * data.std(1) / np.sqrt(20_000) + 2.0**-15 * np.maximum(unit, np.abs(values))
    )


def test_other_keys_give_other_bits_and_the_same_key_the_same(quantizer, rng):
    x = sample(rng, "normal", (128, 64))

    def cast(key):
        return jax_fp8.cast_transpose(x, key=key, implementation=quantizer)[0].data

    first, other = cast(jax.random.key(1)), cast(jax.random.key(2))
    assert np.mean(np.asarray(first) != np.asarray(other)) > 0.1
    ref.assert_same_bits(cast(jax.random.key(1)), first)
    ref.assert_same_bits(cast(jax.random.key_data(jax.random.key(1))), first)
