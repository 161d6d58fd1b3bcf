"""small_m, by name, with activations of 16 bits: each of the kernels that it has for few rows.

What holds for the other implementations is in test_weight_only.py; test_small_m.py has FP8 x.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import codes, integers, operand, pair_id, sample, scaled

import jax_fp8

pytestmark = pytest.mark.gpu

F32_OUT = {"preferred_element_type": jnp.float32}
WIDE = (ref.BF16, ref.F16)
# The kernels are for up to 4, 8, 16, 32 and 64 rows; these fill as little of each as they can.
KERNELS = (1, 5, 9, 17, 33)
rows = pytest.mark.parametrize("m", [1, 4, 5, 8, 9, 16, 17, 32, 33, 64])
kernels = pytest.mark.parametrize("m", KERNELS)
wides = pytest.mark.parametrize("wide", WIDE, ids=pair_id)
w_dtypes = pytest.mark.parametrize("w_dtype", ref.FP8, ids=pair_id)
w_granularities = pytest.mark.parametrize("w_granularity", ["tensor", "row"])


def multiply(x, w, **options):
    return jax_fp8.matmul(x, w, recipe="weight_only", implementation="small_m", **options)


def activations(rng, shape, wide, kind="normal"):
    return jnp.asarray(sample(rng, kind, shape).astype(wide))


def whole(rng, shape, wide):
    """Integers, whose sums are exact."""
    return jnp.asarray(rng.integers(-9, 10, shape).astype(wide))


def expect(x, w, *epilogue):
    return ref.product(scaled(x, np.ones((1,) * x.ndim, np.float32)), w, *epilogue)


def check(x, w):
    """Holds a product of any data to the bound of float32 sums; returns it."""
    got = multiply(x, w, **F32_OUT)
    expected, magnitudes = expect(x, w)
    ref.assert_close(got, expected, ref.sum_error(magnitudes, x.shape[-1]))
    return got


def check_exact(x, w):
    """Holds a product of integers to the very numbers, in float32 and in the dtype of x."""
    expected = expect(x, w)[0].astype(np.float32)
    np.testing.assert_array_equal(multiply(x, w, **F32_OUT), expected)
    got = multiply(x, w)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, expected.astype(x.dtype))


# --- Shapes ---------------------------------------------------------------------------------------


@rows
@wides
@w_dtypes
@w_granularities
def test_every_number_of_rows(rng, m, wide, w_dtype, w_granularity):
    for n, k in ((300, 528), (17, 4096)):
        check(activations(rng, (m, k), wide), operand(rng, (n, k), w_dtype, w_granularity))


@kernels
@wides
@pytest.mark.parametrize(
    "k", [16, 32, 112, 128, 144, 496, 528, 1008, 1024, 1040, 2048, 2064, 16400]
)
def test_every_end_of_k(rng, m, wide, k):
    check(activations(rng, (m, k), wide), operand(rng, (50, k), granularity="row"))


@kernels
@wides
@pytest.mark.parametrize("n", [1, 7, 8, 16, 31, 33, 129])
def test_every_end_of_n(rng, m, wide, n):
    check_exact(whole(rng, (m, 256), wide), integers(rng, (n, 256), granularity="row"))


@kernels
@wides
@w_dtypes
@pytest.mark.parametrize("n, k", [(9001, 272), (4300, 5264)], ids=str)
def test_blocks_with_several_tiles(rng, m, wide, w_dtype, n, k):
    """More rows of W than all blocks take at once; X stays in shared memory, and does not."""
    check_exact(whole(rng, (m, k), wide), integers(rng, (n, k), w_dtype, "row"))


@kernels
@wides
@w_granularities
def test_batches(rng, m, wide, w_granularity):
    w = integers(rng, (3, 90, 272), granularity=w_granularity)
    check_exact(whole(rng, (3, m, 272), wide), w)


@wides
@w_granularities
@pytest.mark.parametrize("shape", [(272,), (2, 3, 272), (3, 11, 272)], ids=str)
def test_one_w_for_all_rows_of_x(rng, wide, w_granularity, shape):
    check_exact(whole(rng, shape, wide), integers(rng, (50, 272), granularity=w_granularity))


# --- Values ---------------------------------------------------------------------------------------


@kernels
@wides
@pytest.mark.parametrize("kind", ["heavy", "positive"])
def test_data_that_is_not_normal(rng, m, wide, kind):
    x = activations(rng, (m, 14336), wide, kind)
    check(x, operand(rng, (40, 14336), kind=kind, granularity="row"))


@kernels
@wides
@w_dtypes
def test_every_code_is_decoded_exactly(m, wide, w_dtype):
    """Each in a row and at a place of its own; subnormal ones, NaN and infinities among them."""
    data = np.zeros((256, 512), w_dtype)
    data[np.arange(256), np.arange(256) * 7 % 512] = ref.all_codes(w_dtype)
    scale = np.exp2(np.linspace(-100, 100, 256).round()).astype(np.float32)[:, None]
    x = np.ones((m, 512), wide)
    x[m - 1] = 1.5
    got = np.asarray(multiply(jnp.asarray(x), scaled(data, scale, "row"), **F32_OUT))
    factor = x[:, :1].astype(np.float64) * scale[:, 0]
    expected = factor * ref.all_codes(w_dtype).astype(np.float64)
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@rows
@wides
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_and_inf_in_x_stay_in_their_row(rng, m, wide, value):
    x, w = np.array(activations(rng, (m, 144), wide)), operand(rng, (70, 144), granularity="row")
    row = m // 2
    without = np.asarray(check(x, w))
    x[row, 131] = value
    got = np.asarray(check(x, w))
    assert not np.isfinite(got[row]).any()
    ref.assert_same_bits(np.delete(got, row, axis=0), np.delete(without, row, axis=0))


@rows
@wides
@w_dtypes
def test_nan_in_w_stays_in_its_column(rng, m, wide, w_dtype):
    x, w = whole(rng, (m, 272), wide), integers(rng, (70, 272), w_dtype, "row")
    expected = expect(x, w)[0].astype(np.float32)
    data = np.array(w.data)
    columns = [0, 15, 33, 69]
    data[columns, [271, 128, 0, 127]] = np.nan
    expected[:, columns] = np.nan
    got = multiply(x, scaled(data, w.scale, "row"), **F32_OUT)
    np.testing.assert_array_equal(got, expected)


@kernels
@pytest.mark.parametrize("value", [2.0**-24, 2.0**-14, 65504.0, -3 * 2.0**-24], ids=str)
def test_the_ends_of_the_range_of_float16(m, value):
    x = np.zeros((m, 64), np.float16)
    x[m - 1, 33] = value
    w = scaled(np.full((8, 64), -448, ref.E4M3), np.full((1, 1), 4, np.float32))
    expected = np.zeros((m, 8), np.float32)
    expected[m - 1] = value * -448 * 4
    np.testing.assert_array_equal(multiply(jnp.asarray(x), w, **F32_OUT), expected)


@kernels
@pytest.mark.parametrize("value", [2.0**100, -(2.0**-100)], ids=str)
def test_what_only_bfloat16_can_hold(m, value):
    x = np.zeros((m, 64), ref.BF16)
    x[m - 1, 40] = value
    w = scaled(np.full((8, 64), 448, ref.E4M3), np.ones((1, 1), np.float32))
    expected = np.zeros((m, 8), np.float32)
    expected[m - 1] = value * 448
    np.testing.assert_array_equal(multiply(jnp.asarray(x), w, **F32_OUT), expected)


@rows
@wides
@w_dtypes
def test_the_bits_do_not_change(rng, m, wide, w_dtype):
    """From call to call, nor when they are a part of a program."""
    x = activations(rng, (m, 2064), wide)
    w = codes(rng, (9001, 2064), w_dtype, "row")
    first = np.asarray(multiply(x, w, **F32_OUT))
    assert np.isfinite(first).all()
    call = jax.jit(lambda x, w: multiply(x, w, **F32_OUT))
    for _ in range(4):
        ref.assert_same_bits(call(x, w), first)
    ref.assert_same_bits(multiply(x, w, **F32_OUT), first)


# --- Epilogues ------------------------------------------------------------------------------------


@wides
@pytest.mark.parametrize("activation", [None, "relu", "gelu"], ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *ref.WIDE], ids=pair_id)
def test_every_epilogue(rng, wide, activation, bias_dtype):
    for m in KERNELS:
        x, w = activations(rng, (m, 272), wide), operand(rng, (50, 272), granularity="row")
        bias = None if bias_dtype is None else jnp.asarray(2 * rng.standard_normal(50), bias_dtype)
        expected, magnitudes = expect(x, w, bias, activation)
        sums, _ = expect(x, w, bias)
        error = ref.epilogue_error(sums, ref.sum_error(magnitudes, 272), activation, bias)
        for out in ref.WIDE:
            got = multiply(x, w, bias=bias, activation=activation, preferred_element_type=out)
            assert got.dtype == out
            ref.assert_close(got, expected, error)


@rows
@wides
@pytest.mark.parametrize("out", ref.FP8, ids=pair_id)
def test_an_fp8_result(rng, m, wide, out):
    x, w = whole(rng, (m, 96), wide), integers(rng, (50, 96), granularity="row")
    options = {"preferred_element_type": out, "output_scale": 0.5, "return_amax": True}
    got, amax = multiply(x, w, **options)
    expected = expect(x, w)[0].astype(np.float32)
    data = ref.round_saturate(expected, np.float32(2), out).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(got.data).astype(np.float32), data)
    assert float(amax) == np.abs(expected).max()


# --- What runs ------------------------------------------------------------------------------------


@kernels
@wides
@w_dtypes
def test_the_named_one_is_what_runs(rng, m, wide, w_dtype):
    x, w = activations(rng, (m, 64), wide), operand(rng, (24, 64), w_dtype, "row")
    jax_fp8.clear_plans()
    jax.block_until_ready(multiply(x, w))
    (plan,) = (p for p in jax_fp8.plans() if p["when"] == "run")
    assert (plan["operation"], plan["implementation"]) == ("scaled_matmul", "small_m")
    assert plan["dtypes"] == [wide.name, w_dtype.name, wide.name]
