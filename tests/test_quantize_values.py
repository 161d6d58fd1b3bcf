"""quantize against its definition in numpy, bit for bit: codes, scales and amax."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import on_gpu, pair_id, sample, scaled

import jax_fp8

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]

SPECIAL = [np.nan, np.inf, -np.inf]


def every(*, granularities=ref.GRANULARITIES):
    """Decorates with every granularity and FP8 dtype."""

    def decorate(test):
        test = pytest.mark.parametrize("dtype", ref.FP8, ids=pair_id)(test)
        return pytest.mark.parametrize("granularity", granularities, ids=pair_id)(test)

    return decorate


def check(x, dtype, granularity, implementation, scale=None):
    """Holds data, scale and amax to the reference, and returns the data as float32."""
    got, amax = jax_fp8.quantize(
        jnp.asarray(x),
        dtype=dtype,
        granularity=granularity,
        scale=scale,
        return_amax=True,
        implementation=implementation,
    )
    data, want = ref.quantize(x, dtype, granularity, scale)
    ref.assert_same_bits(got.scale, want)
    ref.assert_same_bits(got.data, data)
    ref.assert_same_bits(amax, ref.amax(x, granularity))
    return np.asarray(got.data).astype(np.float32)


# --- Codes ----------------------------------------------------------------------------------------


def boundaries(dtype):
    """All codes, what lies halfway between them or beyond the last, and the floats beside."""
    codes = np.sort(ref.finite_codes(dtype).astype(np.float32))
    step = codes[-1] - codes[-2]
    beyond = codes[-1] + step * np.float32([0.25, 0.5, 0.75, 1, 2, 1e6])
    points = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, beyond, -beyond])
    infinity = np.float32(np.inf)
    return np.concatenate([points, *(np.nextafter(points, to) for to in (infinity, -infinity))])


def normal_numbers(x):
    """Takes out what XLA's CPU backend takes as zero; nothing of it reaches a code but zero."""
    return x[(np.abs(x) >= ref.SMALLEST_NORMAL) | (x == 0)]


@pytest.mark.parametrize("dtype", ref.FP8, ids=pair_id)
@pytest.mark.parametrize("wide", [ref.BF16, ref.F16], ids=pair_id)
def test_all_16_bit_numbers(quantizer, dtype, wide):
    x = np.arange(65536, dtype=np.uint16).view(wide)
    check(x, dtype, "tensor", quantizer, scale=1.0)


@pytest.mark.parametrize("dtype", ref.FP8, ids=pair_id)
def test_every_boundary_between_codes(quantizer, dtype):
    x = boundaries(dtype)
    assert x.size > 1500
    check(x, dtype, "tensor", quantizer, scale=1.0)


@pytest.mark.parametrize("dtype", ref.FP8, ids=pair_id)
def test_float32_of_all_magnitudes(quantizer, dtype, rng):
    x = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([normal_numbers(x), SPECIAL]).astype(np.float32)
    check(x, dtype, "tensor", quantizer, scale=1.0)


@pytest.mark.parametrize("dtype", ref.FP8, ids=pair_id)
def test_all_codes_come_back_as_they_were(quantizer, dtype):
    codes = ref.all_codes(dtype)
    wide = jax_fp8.dequantize(scaled(codes, np.ones(1, np.float32)))
    ref.assert_same_bits(wide, codes.astype(np.float32))
    again = jax_fp8.quantize(wide, dtype=dtype, scale=1.0, implementation=quantizer)
    codes = np.where(np.isinf(np.asarray(wide)), np.float32("nan"), wide).astype(dtype)
    ref.assert_same_bits(again.data, codes)


# --- Scales ---------------------------------------------------------------------------------------

SHAPE = (2, 130, 264)  # Aligned runs of 8, whole blocks and partial ones.


@every()
@pytest.mark.parametrize("wide", ref.WIDE, ids=pair_id)
def test_dynamic(quantizer, rng, wide, granularity, dtype):
    data = check(sample(rng, "heavy", SHAPE).astype(wide), dtype, granularity, quantizer)
    assert np.abs(data).max() == ref.fp8_max(dtype)


# Runs of 8 that are not aligned, one row, whole blocks alone, rows longer than a thread block. The
# host has one loop for all types, the device a kernel for each.
@pytest.mark.parametrize("wide", [ref.F32, *on_gpu(ref.BF16, ref.F16)], ids=pair_id)
@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
@pytest.mark.parametrize("shape", [(3, 5, 131), (1, 8), (256, 128), (3, 5001)], ids=pair_id)
def test_shapes(quantizer, rng, shape, granularity, wide):
    dtype = ref.E4M3 if len(shape) == 3 else ref.E5M2
    check(sample(rng, "heavy", shape).astype(wide), dtype, granularity, quantizer)


@every()
@pytest.mark.parametrize("wide", [ref.F32, ref.BF16], ids=pair_id)
def test_static(quantizer, rng, wide, granularity, dtype):
    # Some of the data saturates, and some of it is subnormal.
    scale = np.exp2(rng.uniform(-12, -8, ref.scale_shape(SHAPE, granularity))).astype(np.float32)
    data = check(sample(rng, "normal", SHAPE).astype(wide), dtype, granularity, quantizer, scale)
    assert dtype == ref.E5M2 or np.any(np.abs(data) == 448)


def test_a_negative_static_scale(quantizer, rng):
    check(sample(rng, "normal", (3, 16)), ref.E4M3, "tensor", quantizer, scale=-0.25)


@pytest.mark.parametrize(
    "shape, granularity",
    [((), "tensor"), ((7,), "tensor"), ((300,), "row"), ((300,), (1, 128))]
    + [((2, 3, 4, 5), granularity) for granularity in ref.GRANULARITIES],
    ids=pair_id,
)
def test_every_rank(quantizer, rng, shape, granularity):
    x = np.asarray(sample(rng, "normal", (1, *shape))[0])
    check(x, ref.E4M3, granularity, quantizer)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [9_000_000, 1_200_001], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("wide", ref.WIDE, ids=pair_id)
def test_more_than_one_step_of_the_largest_grid(rng, size, wide):
    check(sample(rng, "normal", (size,)).astype(wide), ref.E4M3, "tensor", "kernel")


@every()
@pytest.mark.parametrize("shape", [(3, 5), (2, 130, 264)], ids=pair_id)
def test_powers_of_two(quantizer, rng, granularity, dtype, shape):
    x = sample(rng, "heavy", shape)
    x[..., 1, 3] = ref.fp8_max(dtype) * 2.0**10  # A scale that is one already.
    x[..., 2, :] = 0
    got, amax = jax_fp8.quantize(
        x,
        dtype=dtype,
        granularity=granularity,
        power_of_two=True,
        return_amax=True,
        implementation=quantizer,
    )
    data, scale = ref.quantize(x, dtype, granularity, power_of_two=True)
    assert (np.frexp(scale)[0] == 0.5).all()
    ref.assert_same_bits(got.scale, scale)
    ref.assert_same_bits(got.data, data)
    ref.assert_same_bits(amax, ref.amax(x, granularity))


# --- Zero, subnormal, NaN, Inf --------------------------------------------------------------------


def group_of(shape, granularity, index):
    """Which elements share the scale of the one at `index`."""
    numbers = np.arange(np.prod(ref.scale_shape(shape, granularity)))
    groups = ref.expand(numbers.reshape(ref.scale_shape(shape, granularity)), shape, granularity)
    return groups == groups[index]


@every()
@pytest.mark.parametrize("value", SPECIAL, ids=str)
def test_dynamic_scaling_gives_nan_to_all_that_shares_the_scale(
    quantizer, rng, granularity, dtype, value
):
    x = sample(rng, "normal", SHAPE)
    x[1, 129, 257] = value
    data = check(x, dtype, granularity, quantizer)
    np.testing.assert_array_equal(np.isnan(data), group_of(x.shape, granularity, (1, 129, 257)))


@every()
@pytest.mark.parametrize("value", SPECIAL, ids=str)
def test_static_scaling_gives_nan_to_the_element_alone(quantizer, rng, granularity, dtype, value):
    x = sample(rng, "normal", SHAPE)
    x[1, 129, 257] = value
    scale = np.full(ref.scale_shape(x.shape, granularity), 0.01, np.float32)
    data = check(x, dtype, granularity, quantizer, scale)
    assert np.isnan(data[1, 129, 257])
    assert np.isnan(data).sum() == 1


@every()
@pytest.mark.parametrize("value", [0.0, 1e-39, *SPECIAL], ids=str)
def test_a_static_scale_without_a_reciprocal_gives_nan(quantizer, rng, granularity, dtype, value):
    x = sample(rng, "normal", SHAPE)
    scale = np.full(ref.scale_shape(x.shape, granularity), 0.01, np.float32)
    place = tuple(extent - 1 for extent in scale.shape)
    scale[place] = value
    data = check(x, dtype, granularity, quantizer, scale)
    np.testing.assert_array_equal(np.isnan(data), group_of(x.shape, granularity, (1, 129, 263)))


@every()
def test_zeros_have_the_scale_one(quantizer, granularity, dtype):
    x = np.zeros(SHAPE, np.float32)
    x[..., ::2] = -0.0
    x[0, 0, 0] = 3.0
    data = check(x, dtype, granularity, quantizer)
    np.testing.assert_array_equal(np.signbit(data), np.signbit(x))
    scale = ref.quantize(x, dtype, granularity)[1]
    assert np.all(scale.ravel()[1:] == 1) and scale.ravel()[0] == 3 / ref.fp8_max(dtype)


@every()
@pytest.mark.parametrize("largest", [2.0**-126, 2.0**-118, 2.0**-110, 3e38])
def test_ends_of_the_range_of_float32(quantizer, rng, granularity, dtype, largest):
    x = rng.choice(np.float32([1, -1, 0]), SHAPE) * np.float32(largest)
    x[0, 0, 0] = largest
    check(x, dtype, granularity, quantizer)


def subnormals(rng):
    return rng.integers(1, 2**23, SHAPE, dtype=np.uint32).view(np.float32)


@every()
def test_the_kernel_counts_subnormals(handlers, rng, granularity, dtype):
    x = subnormals(rng)
    data = check(x, dtype, granularity, "kernel")
    assert data.max() == 1  # 2^-126 is the smallest scale.
    scale = np.full(ref.scale_shape(x.shape, granularity), 2.0**-127, np.float32)
    assert check(x, dtype, granularity, "kernel", scale).max() == 2


@every()
def test_xla_counts_subnormals_on_a_gpu_and_takes_them_as_zero_on_a_cpu(rng, granularity, dtype):
    x = subnormals(rng)
    if jax.default_backend() == "gpu":
        check(x, dtype, granularity, "xla")
        return
    got = jax_fp8.quantize(x, dtype=dtype, granularity=granularity, implementation="xla")
    # Of an amax that is subnormal it may see the bits or a zero.
    assert np.isin(np.asarray(got.scale), np.float32([1.0, 2.0**-126])).all()
    ref.assert_same_bits(got.data, np.zeros(x.shape, dtype))


# --- Nothing, and anything ------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (2, 0, 5)], ids=pair_id)
def test_zero_size(quantizer, granularity, shape):
    x = np.zeros(shape, np.float32)
    check(x, ref.E4M3, granularity, quantizer)
    check(x, ref.E5M2, granularity, quantizer, np.ones(ref.scale_shape(shape, granularity)))


@st.composite
def arrays(draw):
    """A shape whose last axes may meet block edges, and values of any size with special ones."""
    shape = draw(
        st.lists(st.integers(0, 3), max_size=2).flatmap(
            lambda leading: st.tuples(st.integers(1, 140), st.integers(1, 300)).map(
                lambda matrix: (*leading, *matrix)
            )
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-20, 20, (*shape[:-1], 1))
    for value in draw(st.lists(st.sampled_from([0.0, -0.0, 448.0, *SPECIAL]), max_size=3)):
        x = np.where(rng.random(shape) < 0.01, value, x)
    wide = draw(st.sampled_from([ref.F32, ref.BF16]))
    return x.astype(np.float32).astype(wide)


@hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    x=arrays(), dtype=st.sampled_from(ref.FP8), granularity=st.sampled_from(ref.GRANULARITIES)
)
def test_any_array(quantizer, x, dtype, granularity):
    check(x, dtype, granularity, quantizer)


# --- dequantize -----------------------------------------------------------------------------------


@every()
@pytest.mark.parametrize("wide", ref.WIDE, ids=pair_id)
def test_dequantize(rng, granularity, dtype, wide):
    shape = SHAPE
    scale = np.exp(rng.standard_normal(ref.scale_shape(shape, granularity))).astype(np.float32)
    data = rng.choice(ref.all_codes(dtype), shape)
    got = jax_fp8.dequantize(scaled(data, scale, granularity), wide)
    want = data.astype(np.float32) * ref.expand(scale, shape, granularity)
    with np.errstate(over="ignore"):
        ref.assert_same_bits(got, want.astype(wide))
