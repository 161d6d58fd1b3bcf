"""Bias, activation, and FP8 results with their scale and amax, against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import PAIRS, integers, is_fast, must_refuse, operand, pair_id, scaled
from jax.lax import Precision

import jax_fp8

pytestmark = pytest.mark.slow

outputs = pytest.mark.parametrize("out", [*ref.WIDE, *ref.FP8], ids=pair_id)
fp8_outputs = pytest.mark.parametrize("out", ref.FP8, ids=pair_id)
activations = pytest.mark.parametrize("activation", [None, "relu", "gelu"], ids=str)
biases = pytest.mark.parametrize("bias_dtype", [None, *ref.WIDE], ids=pair_id)


def multiply(x, w, implementation, out, **options):
    """The result, its output scale and its amax; the latter two None where there is none."""
    if out in ref.WIDE:
        y = jax_fp8.scaled_matmul(
            x, w, implementation=implementation, preferred_element_type=out, **options
        )
        assert y.dtype == out
        return y, None, None
    options = {"output_scale": 0.25, **options}
    y, amax = jax_fp8.scaled_matmul(
        x,
        w,
        implementation=implementation,
        preferred_element_type=out,
        return_amax=True,
        **options,
    )
    assert (y.granularity, y.dtype, y.scale.shape) == ("tensor", out, (1,) * y.ndim)
    assert (amax.dtype, amax.shape) == (jnp.float32, ())
    np.testing.assert_array_equal(y.scale, np.float32(options["output_scale"]))
    return y.data, np.float64(y.scale.ravel()[0]), amax


def may_use_hardware_tanh(implementation):
    return jax.default_backend() == "gpu" and implementation in ("cublaslt", None)


def check(implementation, x, w, out, bias=None, activation=None, **options):
    """Holds the result of random operands, and its amax, to float64."""
    y, scale, amax = multiply(
        x, w, implementation, out, bias=bias, activation=activation, **options
    )
    expected, magnitudes = ref.product(x, w, bias, activation)
    fast = is_fast(implementation, options.get("precision"))
    error = ref.random_error(magnitudes, x.shape[-1], fast)
    sums, _ = ref.product(x, w, bias)
    hardware_tanh = may_use_hardware_tanh(implementation)
    error = ref.epilogue_error(sums, error, activation, bias, hardware_tanh)
    if scale is None:
        ref.assert_close(y, expected, error)
        return
    largest = float(ref.fp8_max(out))
    # One more rounding: of the reciprocal of the scale.
    error = error / scale + 2.0**-22 * np.abs(expected / scale)
    ref.assert_close(y, np.clip(expected / scale, -largest, largest), error)
    off = abs(float(amax) - np.abs(expected).max(initial=0))
    assert off <= np.max(error * scale, initial=0) + ref.half_ulp(np.float64(amax), ref.F32)


# --- Bias and activation --------------------------------------------------------------------------


def some_bias(rng, n, dtype):
    return None if dtype is None else jnp.asarray(2 * rng.standard_normal(n), dtype)


@outputs
@activations
@biases
def test_every_epilogue(implementation, rng, out, activation, bias_dtype):
    x, w = operand(rng, (19, 96)), operand(rng, (32, 96))
    bias = some_bias(rng, 32, bias_dtype)
    check(implementation, x, w, out, bias, activation, precision=Precision.HIGHEST)


@activations
@pytest.mark.parametrize("granularity", ["row", (1, 128)], ids=pair_id)
@pytest.mark.parametrize("out", [ref.BF16, ref.F16, ref.E4M3], ids=pair_id)
def test_epilogues_after_finer_scales(implementation, rng, out, activation, granularity):
    x = operand(rng, (19, 272), granularity=granularity)
    w = operand(rng, (32, 272), granularity=granularity)
    if not must_refuse(implementation, x, w):
        check(implementation, x, w, out, some_bias(rng, 32, ref.BF16), activation)


@outputs
@pytest.mark.parametrize("n", [1, 13, 29], ids=str)
def test_a_bias_of_an_unaligned_size(implementation, rng, out, n):
    x, w = operand(rng, (5, 33)), operand(rng, (n, 33))
    dtype = ref.F16 if out == ref.F16 else ref.BF16
    check(implementation, x, w, out, some_bias(rng, n, dtype), "gelu")


@outputs
def test_a_bias_of_a_batch(implementation, rng, out):
    x, w = operand(rng, (2, 3, 17, 32)), operand(rng, (2, 3, 16, 32))
    check(implementation, x, w, out, some_bias(rng, 16, ref.BF16), "relu")


@outputs
@pytest.mark.parametrize("activation", [None, "relu"], ids=str)
@pytest.mark.parametrize("bias_dtype", ref.WIDE, ids=pair_id)
def test_integers_are_exact_with_bias_and_relu(implementation, rng, out, activation, bias_dtype):
    """The bias is taken as it is and added in float32: its last bit is beyond the other types."""
    x, w = integers(rng, (35, 96), largest=2), integers(rng, (32, 96), largest=2)
    x, w = (scaled(operand.data, jnp.ones((1, 1))) for operand in (x, w))
    step = {ref.F32: 2.0**-12, ref.BF16: 2.0**-4, ref.F16: 2.0**-7}[bias_dtype]
    bias = jnp.asarray((2 * rng.integers(-50, 50, 32) + 1) * step, bias_dtype)
    y, scale, amax = multiply(x, w, implementation, out, bias=bias, activation=activation)
    expected = ref.product(x, w, bias, activation)[0].astype(np.float32)
    if scale is None:
        np.testing.assert_array_equal(y, expected.astype(out))
    else:
        data = ref.round_saturate(expected, np.float32(1 / scale), out)
        np.testing.assert_array_equal(np.asarray(y).astype(np.float32), data.astype(np.float32))
        assert float(amax) == np.abs(expected).max()


@outputs
@activations
def test_nothing_to_contract_leaves_the_bias(implementation, rng, out, activation):
    x = scaled(np.zeros((3, 0), ref.E4M3), np.ones((1, 1), np.float32))
    w = scaled(np.zeros((16, 0), ref.E4M3), np.ones((1, 1), np.float32))
    check(implementation, x, w, out, some_bias(rng, 16, ref.BF16), activation)
    check(implementation, x, w, out, None, activation)


@fp8_outputs
@pytest.mark.parametrize("m, n", [(0, 16), (3, 0)], ids=str)
def test_the_amax_of_nothing_is_zero(implementation, out, m, n):
    x = scaled(np.zeros((m, 32), ref.E4M3), np.ones((1, 1), np.float32))
    w = scaled(np.zeros((n, 32), ref.E4M3), np.ones((1, 1), np.float32))
    data, _, amax = multiply(x, w, implementation, out)
    assert (data.shape, float(amax)) == ((m, n), 0.0)


# --- FP8 results ----------------------------------------------------------------------------------


@fp8_outputs
@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_fp8_results(implementation, rng, out, pair, granularity):
    x = operand(rng, (33, 128), pair[0], granularity)
    w = operand(rng, (48, 128), pair[1], granularity)
    if not must_refuse(implementation, x, w):
        check(implementation, x, w, out, output_scale=0.037)


@fp8_outputs
def test_the_amax_is_only_returned_when_asked_for(implementation, rng, out):
    x, w = operand(rng, (33, 128)), operand(rng, (48, 128))
    options = {"implementation": implementation, "preferred_element_type": out}
    alone = jax_fp8.scaled_matmul(x, w, output_scale=0.25, **options)
    both = jax_fp8.scaled_matmul(x, w, output_scale=0.25, return_amax=True, **options)
    assert isinstance(alone, jax_fp8.ScaledArray)
    ref.assert_same_trees(alone, both[0])


def column_of(values):
    """Operands whose product has these values, which must be codes of E5M2, in every column."""
    values = np.asarray(values, np.float32)
    x = np.zeros((values.size, 16), np.float32)
    x[:, 0] = values
    w = np.zeros((16, 16), np.float32)
    w[:, 0] = 1
    one = np.ones((1, 1), np.float32)
    return scaled(x.astype(ref.E5M2), one), scaled(w.astype(ref.E4M3), one)


@fp8_outputs
@activations
def test_finite_values_saturate_and_the_amax_is_theirs(implementation, out, activation):
    x, w = column_of([57344, -57344, 448, -1, 0])
    y, _, amax = multiply(x, w, implementation, out, output_scale=2.0**-6, activation=activation)
    expected = ref.activate(np.float64([57344, -57344, 448, -1, 0]), activation)
    largest = float(ref.fp8_max(out))
    got = np.asarray(y).astype(np.float64)
    np.testing.assert_array_equal(got, np.broadcast_to(got[:, :1], got.shape))
    np.testing.assert_array_equal(got[[0, 2, 4], 0], np.clip(expected * 64, 0, largest)[[0, 2, 4]])
    assert got[1, 0] == (-largest if activation is None else 0)
    assert float(amax) == 57344


def may_run_cublaslt(implementation):
    """Its amax may count an infinite sum of which relu makes a zero."""
    return implementation in (None, "cublaslt") and jax.default_backend() == "gpu"


@fp8_outputs
@activations
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_and_inf_are_never_finite(implementation, out, activation, value):
    x, w = column_of([1, value, 2])
    y, _, amax = multiply(x, w, implementation, out, output_scale=1.0, activation=activation)
    got = np.asarray(y).astype(np.float32)
    assert np.isfinite(got[[0, 2]]).all()
    if activation == "relu" and value == -np.inf:
        np.testing.assert_array_equal(got[1], 0.0)
        assert amax == 2 or (may_run_cublaslt(implementation) and np.isnan(amax))
    else:
        assert np.isnan(got[1]).all()
        assert not np.isfinite(amax)


@fp8_outputs
@activations
@pytest.mark.parametrize("sign", [1, -1])
def test_a_result_that_is_infinite_is_nan(implementation, out, activation, sign):
    """Without an infinity among the operands: the values are finite, their float32 is not."""
    x = scaled(np.full((4, 16), 448, ref.E4M3), np.full((1, 1), 1e35, np.float32))
    w = scaled(np.full((16, 16), sign * 448, ref.E4M3), np.ones((1, 1), np.float32))
    y, _, amax = multiply(x, w, implementation, out, output_scale=1.0, activation=activation)
    got = np.asarray(y).astype(np.float32)
    if activation == "relu" and sign < 0:
        np.testing.assert_array_equal(got, 0.0)
        assert amax == 0 or (may_run_cublaslt(implementation) and np.isnan(amax))
    else:
        assert np.isnan(got).all()
        assert not np.isfinite(amax)


@fp8_outputs
@pytest.mark.parametrize("value", [np.inf, np.nan], ids=str)
def test_a_nan_beside_an_infinite_result(implementation, out, value):
    x, w = column_of([57344, np.nan, 1])
    bias = jnp.zeros(16).at[3].set(value).astype(jnp.bfloat16)
    y, _, amax = multiply(x, w, implementation, out, output_scale=1.0, bias=bias)
    got = np.asarray(y).astype(np.float32)
    assert np.isnan(got[1]).all() and np.isnan(got[:, 3]).all()
    others = np.delete(got[[0, 2]], 3, axis=1)
    want = np.clip([[57344.0], [1.0]], 0, ref.fp8_max(out))
    np.testing.assert_array_equal(others, np.broadcast_to(want, others.shape))
    assert np.isnan(amax)


@fp8_outputs
@pytest.mark.parametrize("value", [0.0, np.inf, np.nan, 1e-39], ids=str)
def test_an_output_scale_without_a_reciprocal_gives_nan(implementation, rng, out, value):
    x, w = operand(rng, (5, 32)), operand(rng, (16, 32))
    y = jax_fp8.scaled_matmul(
        x, w, implementation=implementation, preferred_element_type=out, output_scale=value
    )
    assert np.isnan(np.asarray(y.data).astype(np.float32)).all()


# --- NaN and Inf in wide results ------------------------------------------------------------------


@activations
@pytest.mark.parametrize("out", ref.WIDE, ids=pair_id)
def test_activations_of_nan_and_inf(implementation, out, activation):
    x, w = column_of([np.nan, 1, 0, -1])
    bias = jnp.zeros(16, jnp.float32).at[:3].set(jnp.array([np.inf, -np.inf, np.nan]))
    got = jax_fp8.scaled_matmul(
        x,
        w,
        bias=bias.astype(ref.F16 if out == ref.F16 else ref.BF16),
        activation=activation,
        preferred_element_type=out,
        implementation=implementation,
    )
    expected, _ = ref.product(x, w, bias, activation)
    sums, _ = ref.product(x, w, bias)
    hardware_tanh = may_use_hardware_tanh(implementation)
    error = ref.epilogue_error(sums, 0.0, activation, None, hardware_tanh)
    ref.assert_close(got, expected, error)
    assert np.isnan(np.asarray(got)[0].astype(np.float32)).all()  # relu(NaN) is NaN.
