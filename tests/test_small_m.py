"""The kernel for few rows of X: all that it supports, by name, and when the default takes it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import PAIRS, codes, integers, operand, pair_id, scaled

import jax_fp8

SMALL_M = {"implementation": "small_m"}
F32_OUT = {"preferred_element_type": jnp.float32, **SMALL_M}
GRANULARITIES = list(itertools.product(("tensor", "row"), repeat=2))
pairs = pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
granularities = pytest.mark.parametrize("granularities", GRANULARITIES, ids=pair_id)


def check(x, w, **options):
    """Holds a product of any data to its bound; the sums are always precise."""
    got = jax_fp8.scaled_matmul(x, w, **{**F32_OUT, **options})
    expected, magnitudes = ref.product(x, w)
    ref.assert_close(got, expected, ref.random_error(magnitudes, x.shape[-1], fast=False))


# --- Shapes ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("m", [*range(1, 18), 23, 24, 25, 31, 32, 33, 40, 63, 64])
def test_every_number_of_rows(rng, m):
    for n, k in ((300, 528), (17, 4096)):
        check(operand(rng, (m, k), granularity="row"), operand(rng, (n, k), granularity="row"))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 9, 32, 64])
@pytest.mark.parametrize("k", [16, 32, 112, 128, 144, 1024, 1040, 2064, 16400])
def test_every_end_of_k(rng, m, k):
    check(operand(rng, (m, k)), operand(rng, (50, k), granularity="row"))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 30, 64])
@pytest.mark.parametrize("n", [1, 7, 16, 129, 4099, 9001])
def test_every_number_of_columns(rng, m, n):
    x, w = integers(rng, (m, 256)), integers(rng, (n, 256), granularity="row")
    got = jax_fp8.scaled_matmul(x, w, **F32_OUT)
    np.testing.assert_array_equal(got, ref.product(x, w)[0].astype(np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("m, n, k", [(5, 640, 65536), (64, 100, 40000)], ids=str)
def test_x_that_does_not_stay_on_the_chip(rng, m, n, k):
    check(operand(rng, (m, k), granularity="row"), operand(rng, (n, k), granularity="row"))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 9, 16])
@pytest.mark.parametrize(
    "n, k",
    [
        *((70, 14336), (70, 16400), (40, 28672), (9000, 1040)),
        *((4300, 16400), (4300, 31744), (9000, 20496)),  # Two turns and more.
        # The last that stays on the chip, and what comes next, with as many parts as groups or not.
        *((32, 9216), (32, 9232), (9000, 10000), (32, 15360), (32, 15376), (9000, 16384)),
        *((32, 57360), (4300, 20480)),
    ],
    ids=str,
)
def test_x_that_comes_in_parts(rng, m, n, k):
    """On Hopper: X that stays in shared memory, and X that does not, for one turn and for more."""
    x, w = operand(rng, (m, k), granularity="row"), operand(rng, (n, k), granularity="row")
    check(x, w)
    x, w = integers(rng, (m, k)), integers(rng, (n, k))
    got = jax_fp8.scaled_matmul(x, w, **F32_OUT)
    np.testing.assert_array_equal(got, ref.product(x, w)[0].astype(np.float32))


# On a card of 132 multiprocessors: four blocks share K or more, two, none.
@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 64])
@pytest.mark.parametrize(
    "n, k",
    [(1, 4096), (40, 65552), (513, 4096), (1000, 14336), (1530, 2064), (1600, 4096)],
    ids=str,
)
def test_few_columns_of_which_blocks_share_k(rng, m, n, k):
    x, w = operand(rng, (m, k), granularity="row"), operand(rng, (n, k), granularity="row")
    check(x, w)
    first, *others = (np.asarray(jax_fp8.scaled_matmul(x, w, **F32_OUT)) for _ in range(4))
    for other in others:
        ref.assert_same_bits(other, first)
    x, w = integers(rng, (2, m, k)), integers(rng, (2, n, k))
    got = np.asarray(jax_fp8.scaled_matmul(x, w, **F32_OUT))
    np.testing.assert_array_equal(got, ref.product(x, w)[0].astype(np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [3, 16, 40])
def test_an_entry_of_a_batch_has_the_bits_it_has_alone(rng, m):
    x, w = operand(rng, (3, m, 8208)), operand(rng, (3, 400, 8208))
    got = np.asarray(jax_fp8.scaled_matmul(x, w, **F32_OUT))
    for i in range(3):
        alone = jax_fp8.scaled_matmul(
            scaled(x.data[i], x.scale[i], "tensor"),
            scaled(w.data[i], w.scale[i], "tensor"),
            **F32_OUT,
        )
        ref.assert_same_bits(got[i], np.asarray(alone))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16])
def test_batches_of_x_in_parts(rng, m):
    for n, k in ((90, 16400), (6000, 272)):
        check(
            operand(rng, (3, m, k), granularity="row"), operand(rng, (3, n, k), granularity="row")
        )


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16])
def test_few_rows_beyond_hopper(rng, forced_capability, m):
    """What runs there has more rows on Hopper itself."""
    forced_capability(100)
    for n, k in ((300, 528), (17, 4096), (9001, 272)):
        check(operand(rng, (m, k), granularity="row"), operand(rng, (n, k), granularity="row"))


@pytest.mark.gpu
@granularities
@pytest.mark.parametrize("m", [1, 12, 20, 50])
@pytest.mark.parametrize("w_dtype", ref.FP8, ids=pair_id)
def test_batches(rng, m, granularities, w_dtype):
    x = operand(rng, (3, m, 272), ref.E4M3, granularities[0])
    w = operand(rng, (3, 90, 272), w_dtype, granularities[1])
    check(x, w)
    if 3 * m <= 64:  # One W for all: the batch becomes rows.
        check(x, operand(rng, (90, 272), granularity=granularities[1]))


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pairs
@granularities
@pytest.mark.parametrize("m", [3, 16, 32, 64])
def test_small_integers_are_exact(rng, m, pair, granularities):
    x = integers(rng, (m, 912), pair[0], granularities[0])
    w = integers(rng, (70, 912), pair[1], granularities[1])
    got = jax_fp8.scaled_matmul(x, w, **F32_OUT)
    np.testing.assert_array_equal(got, ref.product(x, w)[0].astype(np.float32))


@pytest.mark.gpu
@pairs
@pytest.mark.parametrize("side", ["x", "w"])
@pytest.mark.parametrize("m", [8, 16, 64])
def test_all_codes_times_one(pair, side, m):
    """NaN and infinities, which reach their own row alone, among them."""
    dtype, other = pair if side == "x" else pair[::-1]
    all_codes = np.zeros((256, 64), dtype)
    all_codes[np.arange(256), np.arange(256) % 64] = ref.all_codes(dtype)
    one = np.ones((1, 1), np.float32)
    identity = np.eye(64, dtype=np.float32).astype(other)
    if side == "w":
        w = scaled(all_codes, one)
        operands = [(scaled(part, one), w) for part in np.split(identity, 64 // m)]
    else:
        w = scaled(identity, one)
        operands = [(scaled(part, one), w) for part in np.split(all_codes, 256 // m)]
    for x, w in operands:
        got = jax_fp8.scaled_matmul(x, w, **F32_OUT)
        np.testing.assert_array_equal(got, ref.product(x, w)[0].astype(np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "heavy", "positive"])
@pytest.mark.parametrize("m, k", [(1, 4096), (16, 14336), (64, 8192)], ids=str)
def test_error_of_the_sums(rng, kind, m, k):
    x, w = operand(rng, (m, k), kind=kind), operand(rng, (48, k), kind=kind)
    if kind != "normal":
        check(x, w)
        return
    got = jax_fp8.scaled_matmul(x, w, **F32_OUT)
    expected, _ = ref.product(x, w)
    ref.assert_close(got, expected, ref.normal_error(expected, k, fast=False))


@pytest.mark.gpu
@pytest.mark.parametrize("x_scale, w_scale", [(1e30, 1e-30), (2.0**-126, 2.0**100)], ids=str)
def test_tiny_and_huge_scales(rng, x_scale, w_scale):
    x, w = (codes(rng, (rows, 144), granularity="row") for rows in (9, 40))
    check(
        scaled(x.data, np.full((9, 1), x_scale, np.float32), "row"),
        scaled(w.data, np.full((40, 1), w_scale, np.float32), "row"),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("m", [16, 20])
def test_the_bits_do_not_change(rng, m):
    x = operand(rng, (m, 4096), granularity="row")
    w = operand(rng, (4096, 4096), granularity="row")
    first, *others = (np.asarray(jax_fp8.scaled_matmul(x, w, **F32_OUT)) for _ in range(5))
    for other in others:
        ref.assert_same_bits(other, first)


# --- Epilogues ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("out", [*ref.WIDE, *ref.FP8], ids=pair_id)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"], ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *ref.WIDE], ids=pair_id)
def test_every_epilogue(rng, out, activation, bias_dtype):
    # With the longer K several blocks share it.
    for m, k in itertools.product((1, 13, 30, 64), (272, 8208)):
        x = operand(rng, (m, k), granularity="row")
        w = operand(rng, (50, k), granularity="row")
        bias = None if bias_dtype is None else jnp.asarray(2 * rng.standard_normal(50), bias_dtype)
        fp8 = {"output_scale": 0.25, "return_amax": True} if out in ref.FP8 else {}
        result = jax_fp8.scaled_matmul(
            x, w, bias=bias, activation=activation, preferred_element_type=out, **fp8, **SMALL_M
        )
        expected, magnitudes = ref.product(x, w, bias, activation)
        sums, _ = ref.product(x, w, bias)
        error = ref.epilogue_error(
            sums, ref.random_error(magnitudes, k, fast=False), activation, bias
        )
        if not fp8:
            ref.assert_close(result, expected, error)
            continue
        y, amax = result
        largest = float(ref.fp8_max(out))
        error_of_data = 4 * error + 2.0**-22 * np.abs(4 * expected)
        ref.assert_close(y.data, np.clip(4 * expected, -largest, largest), error_of_data)
        off = abs(float(amax) - np.abs(expected).max())
        assert off <= error.max() + ref.half_ulp(np.float64(amax), ref.F32)


# --- What it refuses, and when it is the default --------------------------------------------------


def test_block_scales_and_an_odd_k_are_refused_before_anything_runs(rng):
    w = operand(rng, (8, 160))
    with pytest.raises(NotImplementedError, match="'small_m' cannot multiply .*block scales"):
        jax_fp8.scaled_matmul(operand(rng, (4, 160), granularity=(1, 128)), w, **SMALL_M)
    with pytest.raises(NotImplementedError, match="'small_m' cannot multiply .*K in steps of 16"):
        jax_fp8.scaled_matmul(operand(rng, (4, 40)), operand(rng, (8, 40)), **SMALL_M)


@pytest.mark.gpu
def test_more_rows_are_refused(rng):
    x, w = operand(rng, (65, 32)), operand(rng, (8, 32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="'small_m' cannot .*M <= 64"):
        jax_fp8.scaled_matmul(x, w, **SMALL_M).block_until_ready()


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [1, 8, 16])
def test_slices_of_larger_arrays(rng, offset):
    """XLA may hand over a part of a buffer, with whatever address it starts at."""
    flat_x, flat_w = (codes(rng, (offset + rows * 80,)).data for rows in (40, 48))

    def operands(flat_x, flat_w):
        one = np.ones((1, 1), np.float32)
        return scaled(flat_x[offset:].reshape(40, 80), one), scaled(
            flat_w[offset:].reshape(48, 80), one
        )

    multiply = jax.jit(lambda *flat: jax_fp8.scaled_matmul(*operands(*flat), **F32_OUT))
    expected, magnitudes = ref.product(*operands(flat_x, flat_w))
    try:
        got = jax.block_until_ready(multiply(flat_x, flat_w))
    except jax.errors.JaxRuntimeError as error:
        assert offset % 16
        assert "does not start at a multiple of 16 bytes" in str(error)
        return
    ref.assert_close(got, expected, ref.random_error(magnitudes, 80, fast=False))


def ran(x, w, **options):
    jax_fp8.clear_plans()
    jax.block_until_ready(jax_fp8.scaled_matmul(x, w, **options))
    plans = [p for p in jax_fp8.plans() if p["when"] == "run"]
    return {p["implementation"] for p in plans if p["operation"] == "scaled_matmul"}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "capability, granularity, dtype, shape, expected",
    [
        (90, "row", ref.E4M3, (16, 2048, 1024), "small_m"),
        (90, "row", ref.E4M3, (17, 2048, 1024), "cublaslt"),
        (90, "row", ref.E4M3, (16, 2048, 9216), "small_m"),
        (90, "row", ref.E4M3, (16, 2048, 9232), "cublaslt"),
        (90, "row", ref.E4M3, (16, 4096, 16384), "small_m"),
        (90, "row", ref.E4M3, (8, 4096, 28672), "small_m"),
        (90, "row", ref.E4M3, (16, 4096, 28672), "cublaslt"),
        (90, "row", ref.E4M3, (16, 1024, 18432), "small_m"),  # Two thread blocks share K.
        (90, "row", ref.E4M3, (16, 1024, 18448), "cublaslt"),
        (90, "row", ref.E4M3, (8, 1024, 30736), "cublaslt"),
        (90, "row", ref.E4M3, (16, 28672, 1024), "small_m"),
        (90, "tensor", ref.E4M3, (16, 28672, 1024), "cublaslt"),
        (90, "tensor", ref.E4M3, (8, 28672, 1024), "small_m"),
        (90, "row", (ref.E5M2, ref.E4M3), (8, 2048, 1024), "cublaslt"),
        (90, "row", ref.E4M3, (8, 1024, 1024), "small_m"),
        (90, "row", ref.E4M3, (16, 512, 2048), "small_m"),
        (90, "row", ref.E4M3, (16, 496, 4096), "cublaslt"),
        (90, "row", ref.E4M3, (8, 4096, 512), "cublaslt"),
        (90, "tensor", ref.E4M3, (1, 2048, 8192), "small_m"),
        (90, "tensor", ref.E4M3, (17, 2048, 8192), "cublaslt"),
        (90, ("tensor", "row"), ref.E4M3, (8, 2048, 1024), "small_m"),
        (90, ("tensor", "row"), ref.E4M3, (8, 1024, 512), "cublaslt"),
        (90, "tensor", ref.E5M2, (64, 1024, 1024), "small_m"),
        (90, "tensor", ref.E5M2, (65, 1024, 1024), "decode"),
        (89, "row", ref.E4M3, (1, 1024, 8192), "cublaslt"),
        (80, "row", ref.E4M3, (1, 1024, 8192), "decode"),
    ],
    ids=pair_id,
)
def test_the_default(rng, forced_capability, capability, granularity, dtype, shape, expected):
    m, n, k = shape
    x_granularity, w_granularity = (
        granularity if isinstance(granularity, tuple) else (granularity, granularity)
    )
    x_dtype, w_dtype = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    x = operand(rng, (m, k), x_dtype, x_granularity)
    w = operand(rng, (n, k), w_dtype, w_granularity)
    forced_capability(capability)
    assert ran(x, w) == {expected}


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [80, 89, 120])
def test_other_gpus_are_refused(rng, forced_capability, capability):
    forced_capability(capability)
    x, w = operand(rng, (4, 32)), operand(rng, (8, 32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="'small_m' cannot .*9.0 to 11"):
        jax_fp8.scaled_matmul(x, w, **SMALL_M).block_until_ready()
