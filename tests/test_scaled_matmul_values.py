"""scaled_matmul against float64 over the same FP8 bytes, for every implementation alike."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import PAIRS, codes, integers, is_fast, must_refuse, operand, pair_id, scaled
from jax.lax import Precision

import jax_fp8

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]

PRECISE = {"preferred_element_type": jnp.float32, "precision": Precision.HIGHEST}
precisions = pytest.mark.parametrize(
    "precision", [None, Precision.HIGHEST], ids=["fast", "precise"]
)
pairs = pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
x_granularities = pytest.mark.parametrize("x_granularity", ref.GRANULARITIES, ids=pair_id)
w_granularities = pytest.mark.parametrize("w_granularity", ref.GRANULARITIES, ids=pair_id)


def check_random(implementation, x, w, **options):
    """Holds a product of random data to its bound, accumulated precisely unless told otherwise."""
    options = {**PRECISE, **options}
    got = jax_fp8.scaled_matmul(x, w, implementation=implementation, **options)
    expected, magnitudes = ref.product(x, w)
    fast = is_fast(implementation, options["precision"])
    assert got.dtype == options["preferred_element_type"]
    ref.assert_close(got, expected, ref.random_error(magnitudes, x.shape[-1], fast))


def check_exact(implementation, x, w, **options):
    """Holds a product without rounding to equality; zeros may have either sign."""
    options = {**PRECISE, **options}
    got = jax_fp8.scaled_matmul(x, w, implementation=implementation, **options)
    np.testing.assert_array_equal(got, ref.product(x, w)[0].astype(np.float32))


# --- The error of the sums ------------------------------------------------------------------------


@precisions
@pytest.mark.parametrize("kind", ["normal", "heavy", "positive"])
@pytest.mark.parametrize("k", [512, 4096])
def test_error_of_the_sums(implementation, rng, k, kind, precision):
    x, w = operand(rng, (56, k), kind=kind), operand(rng, (48, k), kind=kind)
    if kind != "normal":
        check_random(implementation, x, w, precision=precision)
        return
    got = jax_fp8.scaled_matmul(
        x, w, implementation=implementation, **{**PRECISE, "precision": precision}
    )
    expected, _ = ref.product(x, w)
    fast = is_fast(implementation, precision)
    ref.assert_close(got, expected, ref.normal_error(expected, k, fast))


@precisions
@pytest.mark.parametrize("k", [2**17, 2**17 - 1], ids=str)
@pytest.mark.parametrize("kind", ["normal", "positive"])
def test_large_k(implementation, rng, kind, k, precision):
    x, w = operand(rng, (3, k), kind=kind), operand(rng, (8, k), granularity="row", kind=kind)
    check_random(implementation, x, w, precision=precision)


@precisions
@pairs
def test_small_integers_are_exact(implementation, rng, pair, precision):
    x, w = (integers(rng, (rows, 900), dtype) for rows, dtype in zip((35, 50), pair, strict=True))
    if not must_refuse(implementation, x, w):
        check_exact(implementation, x, w, precision=precision)


@precisions
@x_granularities
@w_granularities
def test_integers_with_powers_of_two_as_scales_are_exact(
    implementation, rng, x_granularity, w_granularity, precision
):
    x = integers(rng, (150, 900), granularity=x_granularity)
    w = integers(rng, (136, 900), granularity=w_granularity)
    if not must_refuse(implementation, x, w):
        check_exact(implementation, x, w, precision=precision)


# --- Codes ----------------------------------------------------------------------------------------


def one_code_a_row(dtype, k=32):
    """Row i has code i at column i % k and zeros beside it, so that a NaN poisons its row alone."""
    data = np.zeros((256, k), dtype)
    data[np.arange(256), np.arange(256) % k] = ref.all_codes(dtype)
    return scaled(data, np.ones((1, 1), np.float32))


def identity(dtype, k=32):
    return scaled(np.eye(k, dtype=np.float32).astype(dtype), np.ones((1, 1), np.float32))


@pairs
def test_all_codes_of_x_times_one(implementation, pair):
    x, w = one_code_a_row(pair[0]), identity(pair[1])
    if must_refuse(implementation, x, w):
        return
    check_exact(implementation, x, w)
    got = jax_fp8.scaled_matmul(x, w, implementation=implementation, **PRECISE)
    codes = ref.all_codes(pair[0]).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(got)[np.arange(256), np.arange(256) % 32], codes)


@pairs
def test_all_codes_of_w_times_one(implementation, pair):
    x, w = identity(pair[0]), one_code_a_row(pair[1])
    if not must_refuse(implementation, x, w):
        check_exact(implementation, x, w)


@pairs
def test_all_pairs_of_codes(implementation, pair):
    x, w = (scaled(ref.all_codes(d).reshape(256, 1), np.ones((1, 1), np.float32)) for d in pair)
    if not must_refuse(implementation, x, w):
        check_exact(implementation, x, w)


# --- Shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 34))
def test_every_residue_of_all_axes(implementation, rng, size):
    # 5 and 7 have no factor in common with 33: each axis takes every size from 1 to 33.
    m, n, k = size, 5 * size % 33 + 1, 7 * size % 33 + 1
    check_random(implementation, operand(rng, (m, k)), operand(rng, (n, k)))


@pytest.mark.parametrize("axis", "mnk")
@pytest.mark.parametrize("size", range(1, 17))
def test_every_residue_of_one_axis(implementation, rng, axis, size):
    sizes = {"m": 16, "n": 16, "k": 16, axis: size + 16}
    x = operand(rng, (sizes["m"], sizes["k"]), granularity="row")
    w = operand(rng, (sizes["n"], sizes["k"]), granularity="row")
    check_random(implementation, x, w, preferred_element_type=jnp.bfloat16)


@pytest.mark.parametrize(
    "m, n, k",
    [(1, 640, 512), (1, 1, 1), (127, 131, 257), (257, 129, 144), (128, 256, 128), (2, 1031, 61)],
    ids=str,
)
def test_one_row_primes_and_edges_of_tiles(implementation, rng, m, n, k):
    for granularity in ("tensor", "row"):
        x = operand(rng, (m, k), granularity=granularity)
        check_random(implementation, x, operand(rng, (n, k), granularity=granularity))


# --- Dtypes ---------------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("out", ref.WIDE, ids=pair_id)
def test_wide_results(implementation, rng, pair, out):
    x, w = operand(rng, (17, 80), pair[0]), operand(rng, (24, 80), pair[1])
    if not must_refuse(implementation, x, w):
        check_random(implementation, x, w, preferred_element_type=out)


def test_the_default_result_is_bfloat16(implementation, rng):
    x, w = operand(rng, (4, 16)), operand(rng, (8, 16))
    assert jax_fp8.scaled_matmul(x, w, implementation=implementation).dtype == jnp.bfloat16


# --- Scales ---------------------------------------------------------------------------------------


@x_granularities
@w_granularities
def test_every_pair_of_granularities(implementation, rng, x_granularity, w_granularity):
    x = operand(rng, (150, 300), ref.E4M3, x_granularity, "heavy")
    w = operand(rng, (136, 300), ref.E4M3, w_granularity, "heavy")
    if not must_refuse(implementation, x, w):
        check_random(implementation, x, w)


@pairs
@pytest.mark.parametrize("granularities", [("row", "row"), ref.BLOCKS], ids=pair_id)
def test_every_pair_of_types_with_finer_scales(implementation, rng, pair, granularities):
    x = operand(rng, (130, 272), pair[0], granularities[0], "heavy")
    w = operand(rng, (136, 272), pair[1], granularities[1], "heavy")
    if not must_refuse(implementation, x, w):
        check_random(implementation, x, w)


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
@pytest.mark.parametrize(
    "x_scale, w_scale",
    [(1e30, 1e-30), (1e-30, 1e30), (2.0**-126, 1.0), (2.0**-126, 2.0**100)],
    ids=lambda scale: f"{scale:.0e}",
)
def test_tiny_and_huge_scales(implementation, rng, granularity, x_scale, w_scale):
    if (
        implementation == "xla"
        and jax.default_backend() == "cpu"
        and isinstance(granularity, tuple)
    ):
        pytest.skip("of block scales XLA makes values, and a CPU takes subnormal ones as zero")
    data = [ref.random_codes(rng, shape, ref.E4M3) for shape in ((9, 144), (16, 144))]
    x, w = (
        scaled(d, np.full(ref.scale_shape(d.shape, granularity), s, np.float32), granularity)
        for d, s in zip(data, (x_scale, w_scale), strict=True)
    )
    if not must_refuse(implementation, x, w):
        check_random(implementation, x, w)


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_a_scale_that_is_not_finite(implementation, rng, granularity, value):
    x = operand(rng, (130, 272), granularity=granularity)
    w = operand(rng, (16, 272), granularity="tensor" if granularity == "tensor" else "row")
    scale = np.array(x.scale)
    scale[-1, -1] = value
    x = scaled(x.data, scale, granularity)
    if must_refuse(implementation, x, w):
        return
    got = np.asarray(jax_fp8.scaled_matmul(x, w, implementation=implementation, **PRECISE))
    touched = ~np.isfinite(ref.expand(scale, x.shape, granularity)).all(axis=1)
    assert touched.any()
    assert not np.isfinite(got[touched]).any()
    assert np.isfinite(got[~touched]).all()


# --- Batches --------------------------------------------------------------------------------------


@x_granularities
@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=pair_id)
def test_leading_axes_of_x_are_rows(implementation, rng, leading, x_granularity):
    # (128, 128): the last block of each leading entry is partial.
    x = operand(rng, (*leading, 130, 160), ref.E4M3, x_granularity)
    w = operand(rng, (24, 160), granularity="row")
    if not must_refuse(implementation, x, w):
        check_random(implementation, x, w)


@pytest.mark.parametrize("granularity", ["tensor", "row", (1, 128)], ids=pair_id)
def test_a_vector_gives_a_vector(implementation, rng, granularity):
    row = operand(rng, (1, 160), ref.E4M3, granularity)
    x = scaled(row.data[0], row.scale[0], granularity)
    w = operand(rng, (24, 160), granularity="row")
    if not must_refuse(implementation, x, w):
        check_random(implementation, x, w)


@x_granularities
@w_granularities
@pytest.mark.parametrize("batch", [(3,), (2, 2)], ids=pair_id)
def test_batches_on_both_sides(implementation, rng, batch, x_granularity, w_granularity):
    x = operand(rng, (*batch, 130, 160), ref.E4M3, x_granularity)
    w = operand(rng, (*batch, 24, 160), ref.E5M2, w_granularity)
    if not must_refuse(implementation, x, w):
        check_random(implementation, x, w)


@pytest.mark.parametrize(
    "x_scales, w_scales",
    [
        ((3, 1, 1), (3, 1, 1)),
        ((3, 1, 1), (1, 1, 1)),
        ((1, 1, 1), (3, 1, 1)),
        ((3, 5, 1), (3, 1, 1)),
        ((1, 5, 1), (3, 8, 1)),
    ],
    ids=pair_id,
)
def test_stacked_tensor_scales(implementation, rng, x_scales, w_scales):
    x, w = (
        scaled(
            ref.random_codes(rng, shape, ref.E4M3),
            np.exp(rng.standard_normal(scales)).astype(np.float32),
        )
        for shape, scales in (((3, 5, 48), x_scales), ((3, 8, 48), w_scales))
    )
    check_random(implementation, x, w)
    check_random(implementation, x, scaled(w.data[0], w.scale[0]))


# --- NaN and Inf ----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "row", (1, 128)], ids=pair_id)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_and_inf_reach_what_they_are_part_of(implementation, rng, granularity, value):
    x = operand(rng, (20, 144), ref.E5M2, granularity)
    w = operand(rng, (24, 144), ref.E4M3, granularity)
    data = np.array(x.data)
    data[7, 131] = value
    x = scaled(data, x.scale, granularity)
    if must_refuse(implementation, x, w):
        return
    check_random(implementation, x, w)
    got = jax_fp8.scaled_matmul(x, w, implementation=implementation)
    finite = np.isfinite(np.asarray(got).astype(np.float32)).all(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(~finite), [7])


def test_results_beyond_the_range_are_infinite(implementation):
    x = scaled(np.full((4, 16), 448, ref.E4M3), np.ones((1, 1), np.float32))
    w = scaled(np.full((8, 16), -448, ref.E4M3), np.ones((1, 1), np.float32))
    got = jax_fp8.scaled_matmul(
        x, w, implementation=implementation, preferred_element_type=jnp.float16
    )
    np.testing.assert_array_equal(got, np.full((4, 8), -np.inf, np.float16))


# --- Nothing, and anything ------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
@pytest.mark.parametrize(
    "x_shape, w_shape",
    [((0, 32), (8, 32)), ((4, 32), (0, 32)), ((4, 0), (8, 0)), ((0, 4, 32), (0, 8, 32))],
    ids=pair_id,
)
def test_zero_size(implementation, x_shape, w_shape, granularity):
    x, w = (
        scaled(
            np.zeros(shape, ref.E4M3),
            np.ones(ref.scale_shape(shape, granularity), np.float32),
            granularity,
        )
        for shape in (x_shape, w_shape)
    )
    if not must_refuse(implementation, x, w):
        check_exact(implementation, x, w)


@st.composite
def products(draw):
    """Two operands of any finite codes, batched on both sides, on one or not at all."""
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    m, n, k = draw(st.integers(1, 140)), draw(st.integers(1, 140)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x_dtype, w_dtype = draw(st.sampled_from(PAIRS))
    granularity = st.sampled_from(ref.GRANULARITIES)
    x = codes(rng, (*batch, m, k), x_dtype, draw(granularity))
    w_batch = batch if draw(st.booleans()) else ()
    return x, codes(rng, (*w_batch, n, k), w_dtype, draw(granularity))


@hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(operands=products(), out=st.sampled_from([ref.F32, ref.BF16]))
def test_any_product(implementation, operands, out):
    x, w = operands
    if must_refuse(implementation, x, w):
        return
    got = jax_fp8.scaled_matmul(
        x,
        w,
        implementation=implementation,
        preferred_element_type=out,
        precision=Precision.HIGHEST,
    )
    expected, magnitudes = ref.product(x, w)
    ref.assert_close(got, expected, ref.arbitrary_error(magnitudes))
