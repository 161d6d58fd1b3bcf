"""scaled_matmul as a function: what it takes, refuses and returns."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import codes, operand, pair_id, scaled
from jax.lax import Precision

import jax_fp8
from jax_fp8._src.epilogue import activate

FP8_OUT = {"preferred_element_type": jnp.float8_e4m3fn, "output_scale": 0.5}


@pytest.mark.parametrize(
    "x_shape, w_shape, want",
    [
        ((32,), (8, 32), (8,)),
        ((4, 32), (8, 32), (4, 8)),
        ((2, 3, 4, 32), (8, 32), (2, 3, 4, 8)),
        ((2, 4, 32), (2, 8, 32), (2, 4, 8)),
        ((2, 3, 4, 32), (2, 3, 8, 32), (2, 3, 4, 8)),
    ],
    ids=pair_id,
)
def test_shapes(implementation, rng, x_shape, w_shape, want):
    x = scaled(ref.random_codes(rng, x_shape, ref.E4M3), np.ones((1,) * len(x_shape), np.float32))
    w = operand(rng, w_shape, granularity="row")
    assert jax_fp8.scaled_matmul(x, w, implementation=implementation).shape == want
    y = jax_fp8.scaled_matmul(x, w, implementation=implementation, **FP8_OUT)
    assert (y.shape, y.scale.shape) == (want, (1,) * len(want))


@pytest.mark.parametrize("output_scale", [0.5, np.float32(0.5), jnp.full((1, 1), 0.5)], ids=type)
def test_spellings_of_an_output_scale(implementation, rng, output_scale):
    x, w = operand(rng, (4, 32)), operand(rng, (8, 32))
    options = {"implementation": implementation, **FP8_OUT}
    got = jax_fp8.scaled_matmul(x, w, **{**options, "output_scale": output_scale})
    ref.assert_same_trees(got, jax_fp8.scaled_matmul(x, w, **options))


@pytest.mark.parametrize(
    "precision, accumulation",
    [
        (None, "fast"),
        (Precision.DEFAULT, "fast"),
        ("default", "fast"),
        (Precision.HIGH, "precise"),
        (Precision.HIGHEST, "precise"),
        ("HIGHEST", "precise"),
        ("float32", "precise"),
        ((Precision.DEFAULT, Precision.DEFAULT), "fast"),
        ((Precision.DEFAULT, Precision.HIGHEST), "precise"),
        (["high", "default"], "precise"),
    ],
    ids=str,
)
def test_precisions(handlers, rng, precision, accumulation):
    jax_fp8.clear_plans()
    x, w = operand(rng, (4, 32)), operand(rng, (8, 32))
    with jax.default_matmul_precision("highest"):  # Not read.
        jax_fp8.scaled_matmul(x, w, precision=precision, implementation="naive").block_until_ready()
    (plan,) = (p for p in jax_fp8.plans() if p["when"] == "run")
    assert plan["accumulation"] == accumulation


def test_the_same_bits_every_time(implementation, rng):
    x, w = codes(rng, (70, 500)), codes(rng, (90, 500), granularity="row")
    runs = [
        jax_fp8.scaled_matmul(x, w, implementation=implementation, **options)
        for _ in range(4)
        for options in ({}, FP8_OUT)
    ]
    for i, run in enumerate(runs):
        ref.assert_same_trees(run, runs[i % 2])


# --- Errors ---------------------------------------------------------------------------------------


@pytest.fixture
def x():
    return operand(np.random.default_rng(0), (4, 32))


@pytest.fixture
def w():
    return operand(np.random.default_rng(1), (8, 32))


def refuses(error, message, x, w, **options):
    with pytest.raises(error, match="scaled_matmul: " + message):
        jax_fp8.scaled_matmul(x, w, **options)


def test_a_plain_array_raises(x, w):
    refuses(TypeError, r"x must be a jax_fp8.ScaledArray, got .*\[4, 32\]", jnp.ones((4, 32)), w)
    refuses(TypeError, r"w must be a jax_fp8.ScaledArray, got .*\[8, 32\]", x, jnp.ones((8, 32)))


def test_operands_are_checked(x, w):
    wrong = scaled(w.data, jnp.ones((8, 2)), "row")
    refuses(
        ValueError, r"w.scale of shape \(8, 2\) does not fit w.data of shape \(8, 32\)", x, wrong
    )
    wrong = scaled(x.data.astype(jnp.float16), x.scale)
    refuses(TypeError, "x.data must be float8_e4m3fn or float8_e5m2, got float16", wrong, w)
    wrong = scaled(x.data, x.scale.astype(jnp.float16))
    refuses(TypeError, "x.scale must be float32, got float16", wrong, w)


def test_ranks_that_are_too_low_raise(x, w):
    vector = scaled(w.data[0], w.scale[0])
    scalar = scaled(x.data[0, 0], x.scale[0, 0])
    refuses(ValueError, r".*rank >= 2.*got x \(4, 32\) and w \(32,\)", x, vector)
    refuses(ValueError, r".*rank >= 1.*got x \(\) and w \(8, 32\)", scalar, w)


def test_different_k_raise(x, w):
    other = scaled(w.data.T, w.scale)
    refuses(ValueError, r"contracts the last axis .*got x \(4, 32\) and w \(32, 8\)", x, other)


@pytest.mark.parametrize("x_shape", [(4, 32), (3, 4, 32), (2, 3, 4, 32)], ids=pair_id)
def test_different_batches_raise(rng, x_shape):
    x, w = operand(rng, x_shape), operand(rng, (2, 8, 32))
    message = r"leading batch axes must be the same .*w \(2, 8, 32\)"
    refuses(ValueError, message, x, w)


def test_another_activation_raises(x, w):
    refuses(ValueError, "unknown activation 'silu'; accepted are .*'gelu'", x, w, activation="silu")


def test_another_implementation_raises(x, w):
    message = "unknown implementation 'triton'; accepted are .*'cublaslt'"
    refuses(ValueError, message, x, w, implementation="triton")


@pytest.mark.parametrize(
    "precision",
    [
        "bf16",
        1,
        ("high", "bf16"),
        ("high",) * 3,
        [["high"], "high"],
        "BF16_BF16_F32",
        jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
        jax.lax.DotAlgorithm(np.float32, np.float32, np.float32),
    ],
    ids=str,
)
def test_another_precision_raises(x, w, precision):
    message = re.escape(f"unknown precision {precision!r}; accepted are None, DEFAULT, HIGH,")
    refuses(ValueError, f"{message} .* a pair of them, but no algorithm", x, w, precision=precision)


def test_another_output_dtype_raises(x, w):
    message = "preferred_element_type must be float32, .*got int32"
    refuses(TypeError, message, x, w, preferred_element_type=jnp.int32)


def test_an_output_scale_goes_with_fp8_alone(x, w):
    message = "output_scale goes with an FP8 preferred_element_type"
    refuses(ValueError, message + ".*bfloat16 and an output_scale", x, w, output_scale=1.0)
    message += ".*got float8_e5m2"
    refuses(ValueError, message, x, w, preferred_element_type=jnp.float8_e5m2)


def test_an_output_scale_that_is_no_scalar_raises(x, w):
    options = {**FP8_OUT, "output_scale": jnp.ones((4, 1))}
    refuses(ValueError, r"output_scale must be a scalar, got \(4, 1\)", x, w, **options)


def test_an_amax_goes_with_fp8_alone(x, w):
    refuses(ValueError, "return_amax needs an FP8 result, got bfloat16", x, w, return_amax=True)


def test_another_bias_dtype_raises(x, w):
    message = "bias must be float32, bfloat16 or float16, got int32"
    refuses(TypeError, message, x, w, bias=jnp.ones(8, jnp.int32))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 8)], ids=pair_id)
def test_another_bias_shape_raises(x, w, shape):
    message = r"bias must have the shape \(N,\) = \(8,\), got"
    refuses(ValueError, message, x, w, bias=jnp.ones(shape))


def test_cublaslt_has_no_product_of_e5m2_with_e5m2(rng):
    x, w = operand(rng, (4, 32), ref.E5M2), operand(rng, (8, 32), ref.E5M2)
    message = r".*'cublaslt' cannot multiply x float8_e5m2\(4, 32\) .*no product of E5M2 with E5M2"
    refuses(NotImplementedError, message, x, w, implementation="cublaslt")


@pytest.mark.parametrize("named", ["cublaslt", "small_m", "decode"])
def test_what_the_cpu_has_not_is_refused_when_it_runs(x, w, named):
    if jax.default_backend() != "cpu":
        pytest.skip("the GPU has it")
    message = (
        rf"'{named}' cannot multiply x float8_e4m3fn\[1,4,32\] .*the CPU has 'naive' and 'xla'"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax_fp8.scaled_matmul(x, w, implementation=named).block_until_ready()


def test_operands_are_not_differentiated(implementation, x, w):
    def total(scale):
        other = jax_fp8.ScaledArray(x.data, scale, "tensor")
        return jax_fp8.scaled_matmul(
            other, w, implementation=implementation, preferred_element_type=jnp.float32
        ).sum()

    with pytest.raises(TypeError, match="scaled_matmul: a ScaledArray cannot be differentiated"):
        jax.grad(total)(x.scale)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_the_gradient_of_the_bias(implementation, x, w, activation):
    bias = jnp.linspace(-1.0, 1.0, w.shape[0])
    dy = jnp.linspace(-1.0, 1.0, x.shape[0] * w.shape[0]).reshape(x.shape[0], -1)

    def call(bias):
        return jax_fp8.scaled_matmul(
            *(x, w),
            bias=bias,
            activation=activation,
            implementation=implementation,
            preferred_element_type=jnp.float32,
        )

    def exact(bias):
        sums = jnp.asarray(ref.product(x, w)[0], jnp.float32)
        return activate(sums + bias, activation)

    got, want = (jax.vjp(f, bias)[1](dy)[0] for f in (call, exact))
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
