"""matmul with the recipe weight_only: 16-bit activations by FP8 weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import integers, operand, pair_id, sample, scaled

import jax_fp8
from jax_fp8 import Operand, Recipe

pytestmark = pytest.mark.slow

F32_OUT = {"preferred_element_type": jnp.float32}
WIDE = (ref.BF16, ref.F16)
wides = pytest.mark.parametrize("wide", WIDE, ids=pair_id)
w_dtypes = pytest.mark.parametrize("w_dtype", ref.FP8, ids=pair_id)
w_granularities = pytest.mark.parametrize("w_granularity", ref.GRANULARITIES, ids=pair_id)


@pytest.fixture
def multiply(implementation):
    """matmul with the implementation of the test, which holds cublasLt to refusing."""

    def call(x, w, **options):
        options = {"implementation": implementation, "recipe": "weight_only", **options}
        if implementation != "cublaslt":
            return jax_fp8.matmul(x, w, **options)
        message = "implementation 'cublaslt' cannot multiply x .*float16.* no product of 16-bit by"
        with pytest.raises(NotImplementedError, match=message):
            jax_fp8.matmul(x, w, **options)
        pytest.skip("cublasLt has no such product")

    return call


def activations(rng, shape, wide, kind="normal"):
    return jnp.asarray(sample(rng, kind, shape).astype(wide))


def as_operand(x):
    """A wide array as the reference takes it."""
    return scaled(x, np.ones((1,) * x.ndim, np.float32))


def expect(x, w, *epilogue):
    return ref.product(as_operand(x), w, *epilogue)


def check_random(got, x, w):
    expected, magnitudes = expect(x, w)
    ref.assert_close(got, expected, ref.sum_error(magnitudes, x.shape[-1]))


# --- Values ---------------------------------------------------------------------------------------


@wides
@w_dtypes
@w_granularities
@pytest.mark.parametrize("m, n, k", [(1, 256, 512), (9, 24, 272), (140, 136, 1000)], ids=str)
def test_random_values(multiply, rng, m, n, k, w_granularity, w_dtype, wide):
    x, w = activations(rng, (m, k), wide), operand(rng, (n, k), w_dtype, w_granularity)
    check_random(multiply(x, w, **F32_OUT), x, w)


@wides
@pytest.mark.parametrize("kind", ["heavy", "positive"])
@pytest.mark.parametrize("k", [4096, 2**15 + 1], ids=str)
def test_data_that_is_not_normal(multiply, rng, wide, kind, k):
    x, w = activations(rng, (5, k), wide, kind), operand(rng, (40, k), kind=kind, granularity="row")
    check_random(multiply(x, w, **F32_OUT), x, w)


@wides
@w_granularities
@pytest.mark.parametrize("m, n, k", [(3, 130, 130), (150, 136, 900), (300, 40, 64)], ids=str)
def test_small_integers_are_exact(multiply, rng, m, n, k, w_granularity, wide):
    x = jnp.asarray(rng.integers(-9, 10, (m, k)).astype(wide))
    w = integers(rng, (n, k), granularity=w_granularity)
    expected = expect(x, w)[0].astype(np.float32)
    np.testing.assert_array_equal(multiply(x, w, **F32_OUT), expected)


@wides
@w_dtypes
@pytest.mark.parametrize("k", [512, 513], ids=str)
def test_every_code_is_decoded_exactly(multiply, w_dtype, wide, k):
    """Each in a row and at a place of its own; subnormal ones, NaN and infinities among them."""
    data = np.zeros((256, k), w_dtype)
    places = np.arange(256) * 7 % k
    data[np.arange(256), places] = ref.all_codes(w_dtype)
    scale = np.float32(2.0) ** np.arange(-128, 128)[:, None] * np.float32(0.5) ** 0
    scale = np.clip(scale, 2.0**-100, 2.0**100).astype(np.float32)
    x = np.ones((17, k), wide)
    x[3] = 1.5
    got = np.asarray(multiply(jnp.asarray(x), scaled(data, scale, "row"), **F32_OUT))
    factor = x[:, :1].astype(np.float64) * scale[:, 0].astype(np.float64)
    expected = factor * ref.all_codes(w_dtype).astype(np.float64)
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize("value", [2.0**-24, 2.0**-14, 65504.0, -3 * 2.0**-24], ids=str)
def test_the_ends_of_the_range_of_float16(multiply, value):
    x = np.zeros((4, 64), np.float16)
    x[2, 33] = value
    w = scaled(np.full((8, 64), -448, ref.E4M3), np.full((1, 1), 4, np.float32))
    got = np.asarray(multiply(jnp.asarray(x), w, **F32_OUT))
    np.testing.assert_array_equal(got[2], np.full(8, value * -448 * 4, np.float32))
    assert not got[[0, 1, 3]].any()


def test_what_only_bfloat16_can_hold(multiply):
    x = np.full((4, 64), 0, ref.BF16)
    x[1, 40], x[3, 40] = 2.0**100, 2.0**-100
    w = scaled(np.full((8, 64), 448, ref.E4M3), np.ones((1, 1), np.float32))
    got = np.asarray(multiply(jnp.asarray(x), w, **F32_OUT))
    np.testing.assert_array_equal(got[:, 0], np.float32([0, 448 * 2.0**100, 0, 448 * 2.0**-100]))


@wides
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_and_inf_reach_what_they_are_part_of(multiply, rng, wide, value):
    x = np.array(activations(rng, (20, 144), wide))
    x[7, 131] = value
    w = operand(rng, (24, 144), granularity="row")
    check_random(multiply(jnp.asarray(x), w, **F32_OUT), x, w)
    got = np.asarray(multiply(jnp.asarray(x), w)).astype(np.float32)
    np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(got).all(axis=1)), [7])


# --- Results, epilogues, shapes -------------------------------------------------------------------


@wides
def test_the_result_has_the_dtype_of_x(multiply, rng, wide):
    x, w = activations(rng, (9, 64), wide), operand(rng, (24, 64))
    got = multiply(x, w)
    assert got.dtype == wide
    check_random(got, x, w)


@wides
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("bias_type", [None, *ref.WIDE], ids=pair_id)
@pytest.mark.parametrize("out", ref.WIDE, ids=pair_id)
def test_epilogues(multiply, rng, wide, out, bias_type, activation):
    x, w = activations(rng, (20, 160), wide), operand(rng, (24, 160), granularity="row")
    bias = None if bias_type is None else jnp.asarray(rng.standard_normal(24), bias_type)
    got = multiply(x, w, bias=bias, activation=activation, preferred_element_type=out)
    expected, magnitudes = expect(x, w, bias, activation)
    sums, _ = expect(x, w, bias)
    error = ref.epilogue_error(sums, ref.sum_error(magnitudes, 160), activation, bias)
    assert got.dtype == out
    ref.assert_close(got, expected, error)


@wides
@pytest.mark.parametrize("out", ref.FP8, ids=pair_id)
def test_an_fp8_result(multiply, rng, wide, out):
    x = jnp.asarray(rng.integers(-4, 5, (35, 96)).astype(wide))
    w = integers(rng, (40, 96))
    options = {"preferred_element_type": out, "output_scale": 0.5, "return_amax": True}
    got, amax = multiply(x, w, **options)
    expected = expect(x, w)[0].astype(np.float32)
    data = ref.round_saturate(expected, np.float32(2), out)
    np.testing.assert_array_equal(np.asarray(got.data).astype(np.float32), data.astype(np.float32))
    assert float(amax) == np.abs(expected).max()


@wides
@w_granularities
@pytest.mark.parametrize("shape", [(160,), (2, 3, 160), (0, 160), (4, 0)], ids=pair_id)
def test_shapes_of_x(multiply, rng, wide, w_granularity, shape):
    x = activations(rng, shape, wide)
    w = operand(rng, (24, shape[-1]), granularity=w_granularity)
    check_random(multiply(x, w, **F32_OUT), x, w)


@wides
@w_granularities
def test_batches_on_both_sides(multiply, rng, wide, w_granularity):
    x = activations(rng, (2, 2, 130, 160), wide)
    w = operand(rng, (2, 2, 24, 160), granularity=w_granularity)
    check_random(multiply(x, w, **F32_OUT), x, w)


def test_a_recipe_of_ones_own(multiply, rng):
    x, w = activations(rng, (9, 64), ref.BF16), operand(rng, (24, 64))
    check_random(multiply(x, w, recipe=Recipe(activation=None)), x, w)


def test_it_loses_less_than_a_quantized_x(multiply, rng):
    x, w = activations(rng, (64, 1024), ref.BF16), operand(rng, (64, 1024), granularity="row")
    expected, _ = expect(x, w)

    def off(recipe):
        got = np.asarray(multiply(x, w, recipe=recipe, **F32_OUT), np.float64)
        return np.linalg.norm(got - expected) / np.linalg.norm(expected)

    assert off("weight_only") < 1e-5
    assert off("rowwise") > 1e-2


# --- What runs ------------------------------------------------------------------------------------


def plan_of(x, w, **options):
    jax_fp8.clear_plans()
    jax.block_until_ready(jax_fp8.matmul(x, w, recipe="weight_only", **options))
    return next(p for p in jax_fp8.plans() if p["when"] == "run")


def test_the_journal_tells_the_dtypes(handlers, rng):
    x, w = activations(rng, (9, 64), ref.BF16), operand(rng, (24, 64), granularity="row")
    plan = plan_of(x, w, implementation="naive")
    assert (plan["operation"], plan["implementation"]) == ("scaled_matmul", "naive")
    assert plan["dtypes"] == ["bfloat16", "float8_e4m3fn", "bfloat16"]
    assert plan["granularity"] == ["tensor", "row"]


@pytest.mark.gpu
@wides
@pytest.mark.parametrize("capability", [70, 75, 80, 90])
def test_the_default_on_every_generation(rng, forced_capability, capability, wide):
    forced_capability(capability)
    x, w = activations(rng, (300, 320), wide), operand(rng, (128, 320))
    tensor_cores = capability >= (80 if wide == ref.BF16 else 75)
    assert plan_of(x, w)["implementation"] == ("decode" if tensor_cores else "naive")
    check_random(jax_fp8.matmul(x, w, recipe="weight_only", **F32_OUT), x, w)


@pytest.mark.gpu
def test_turing_has_no_bfloat16(rng, forced_capability):
    forced_capability(75)
    x, w = activations(rng, (4, 32), ref.BF16), operand(rng, (8, 32))
    message = "bfloat16 tensor cores begin with compute capability 8.0"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        plan_of(x, w, implementation="decode")


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "row"},
        {"scale": jnp.ones((1, 1))},
        {"dtype": jnp.float8_e5m2},
        {"recipe": Recipe(None, Operand()), "granularity": "tensor"},
    ],
    ids=["granularity", "scale", "dtype", "own"],
)
def test_options_of_the_quantization_raise(rng, options):
    x, w = activations(rng, (4, 32), ref.BF16), operand(rng, (8, 32))
    with pytest.raises(ValueError, match="matmul: granularity, scale and dtype say how x is quan"):
        jax_fp8.matmul(x, w, **{"recipe": "weight_only", **options})


def test_float32_raises(rng):
    message = r"matmul: .*'weight_only' takes x of bfloat16 or float16, got float32\(4, 32\)"
    with pytest.raises(TypeError, match=message):
        jax_fp8.matmul(np.ones((4, 32), np.float32), operand(rng, (8, 32)), recipe="weight_only")


def test_scaled_matmul_takes_scaled_arrays_alone(rng):
    x = as_operand(activations(rng, (4, 32), ref.BF16))
    with pytest.raises(TypeError, match="scaled_matmul: x.data must be float8_e4m3fn or"):
        jax_fp8.scaled_matmul(x, operand(rng, (8, 32)))


def test_weights_are_checked(rng):
    x, w = activations(rng, (4, 32), ref.BF16), operand(rng, (8, 32))
    wrong = scaled(w.data, np.ones((8, 2), np.float32), "row")
    with pytest.raises(ValueError, match=r"matmul: w.scale of shape \(8, 2\) does not fit"):
        jax_fp8.matmul(x, wrong, recipe="weight_only")
    with pytest.raises(ValueError, match=r"contracts the last axis of both operands.*x \(4, 16\)"):
        jax_fp8.matmul(x[:, :16], w, recipe="weight_only")
