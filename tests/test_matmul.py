"""matmul: quantize, then scaled_matmul."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import is_fast, must_refuse, operand, pair_id, sample, scaled
from training import cosine

import jax_fp8
from jax_fp8 import Operand, Recipe
from jax_fp8._src.epilogue import activate


def reference_operand(x, dtype=ref.E4M3, granularity="tensor", scale=None):
    return scaled(*ref.quantize(x, dtype, granularity, scale), granularity)


def check(implementation, x, w, x_reference, **options):
    """Holds matmul to the product of the codes that x must be quantized to."""
    if must_refuse(implementation, x_reference, w):
        return
    got = jax_fp8.matmul(x, w, implementation=implementation, **options)
    expected, magnitudes = ref.product(x_reference, w)
    assert got.dtype == options.get("preferred_element_type", x.dtype)
    ref.assert_close(
        got, expected, ref.random_error(magnitudes, x.shape[-1], is_fast(implementation))
    )


@pytest.mark.parametrize("wide", ref.WIDE, ids=pair_id)
@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
def test_granularities(implementation, rng, wide, granularity):
    x, w = sample(rng, "normal", (140, 272)).astype(wide), operand(rng, (24, 272))
    check(
        implementation, jnp.asarray(x), w, reference_operand(x, ref.E4M3, granularity),
        granularity=granularity,
    )  # fmt: skip


@pytest.mark.parametrize(
    "recipe, dtype, granularity",
    [
        ("tensorwise", ref.E4M3, "tensor"),
        ("rowwise", ref.E4M3, "row"),
        ("blockwise", ref.E4M3, (1, 128)),
        (Recipe(Operand(jnp.float8_e5m2, "row")), ref.E5M2, "row"),
    ],
    ids=["tensorwise", "rowwise", "blockwise", "own"],
)
def test_recipes(implementation, rng, recipe, dtype, granularity):
    x, w = sample(rng, "normal", (9, 272)), operand(rng, (24, 272), granularity="row")
    check(implementation, x, w, reference_operand(x, dtype, granularity), recipe=recipe)


def test_arguments_win_over_the_recipe(implementation, rng):
    x, w = sample(rng, "normal", (9, 272)), operand(rng, (24, 272))
    check(
        implementation, x, w, reference_operand(x, ref.E5M2, "row"),
        recipe="blockwise", granularity="row", dtype=jnp.float8_e5m2,
    )  # fmt: skip


def test_a_static_scale(implementation, rng):
    x, w = sample(rng, "normal", (9, 64)), operand(rng, (24, 64))
    check(implementation, x, w, reference_operand(x, scale=0.02), scale=0.02)


def test_the_dtype_of_the_result(implementation, rng):
    x, w = sample(rng, "normal", (9, 64)), operand(rng, (24, 64))
    check(implementation, x, w, reference_operand(x), preferred_element_type=jnp.bfloat16)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64)], ids=pair_id)
def test_shapes_of_x(implementation, rng, shape):
    x, w = sample(rng, "normal", shape), operand(rng, (24, 64))
    check(implementation, x, w, reference_operand(x))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_batches(implementation, rng, granularity):
    x = sample(rng, "normal", (3, 9, 64))
    w = operand(rng, (3, 24, 64), granularity="row")
    want = reference_operand(x, ref.E4M3, granularity)
    check(implementation, x, w, want, granularity=granularity)


def test_options_reach_the_product(implementation, rng):
    x, w = sample(rng, "normal", (9, 64)), operand(rng, (24, 64))
    options = {
        "bias": jnp.asarray(rng.standard_normal(24), jnp.bfloat16),
        "activation": "gelu",
        "preferred_element_type": jnp.float8_e4m3fn,
        "precision": "highest",
        "output_scale": 0.5,
        "return_amax": True,
        "implementation": implementation,
    }
    got = jax_fp8.matmul(x, w, **options)
    ref.assert_same_trees(got, jax_fp8.scaled_matmul(jax_fp8.quantize(x), w, **options))


def test_xla_leaves_the_quantization_to_xla_too(rng):
    jax_fp8.clear_plans()
    x, w = sample(rng, "normal", (9, 71)), operand(rng, (24, 71))
    jax_fp8.matmul(x, w, implementation="xla").block_until_ready()
    assert {(p["operation"], p["implementation"], p["platform"]) for p in jax_fp8.plans()} == {
        ("quantize", "xla", "any"),
        ("scaled_matmul", "xla", "any"),
    }


# --- Errors ---------------------------------------------------------------------------------------


def refuses(error, message, x, w, **options):
    with pytest.raises(error, match=message):
        jax_fp8.matmul(x, w, **options)


X = np.ones((4, 32), np.float32)


def test_a_plain_array_as_w_raises_and_names_what_takes_it():
    message = r"matmul: w must be a .*ScaledArray .*\(N, K\).*\[32, 32\].*dot_general or .*einsum"
    refuses(TypeError, message, X, jnp.ones((32, 32)))


def test_a_scaled_array_as_x_raises(rng):
    x = operand(rng, (4, 32))
    refuses(TypeError, "matmul: x is a ScaledArray already; use jax_fp8.scaled_matmul", x, x)


def test_another_dtype_of_x_raises(rng):
    w = operand(rng, (8, 32))
    message = r"matmul: x must be float32, bfloat16 or float16, got int32\(4, 32\)"
    refuses(TypeError, message, X.astype(np.int32), w)


def test_options_are_checked(rng):
    w = operand(rng, (8, 32))
    refuses(ValueError, "matmul: unknown granularity 'column'", X, w, granularity="column")
    refuses(ValueError, "matmul: unknown recipe 'mxfp8'; named ones are", X, w, recipe="mxfp8")
    refuses(TypeError, "matmul: recipe must be a name or a Recipe, got int", X, w, recipe=1)
    refuses(TypeError, "matmul: dtype must be float8_e4m3fn or", X, w, dtype=jnp.int8)
    refuses(ValueError, "unknown implementation 'kernel'", X, w, implementation="kernel")


def test_shapes_that_do_not_fit_raise(rng):
    message = r"contracts the last axis of both operands.*x \(4, 32\) and w \(32, 8\)"
    refuses(ValueError, message, X, operand(rng, (32, 8)))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=str)
def test_gradients_of_the_activation_and_the_bias(implementation, rng, granularity, activation):
    """Those of the wide function of the same weights, but for what E5M2 rounds of the gradient."""
    x = jnp.asarray(sample(rng, "normal", (3, 20, 272)))
    w = jax_fp8.quantize(jnp.asarray(sample(rng, "normal", (40, 272))), granularity=granularity)
    bias = jnp.asarray(sample(rng, "normal", (40,)))
    dy = jnp.asarray(sample(rng, "normal", (3, 20, 40)))
    if isinstance(granularity, tuple) and implementation == "cublaslt":
        pytest.skip("blocks of weights by rows of gradients are not in cublasLt")

    def call(x, bias):
        return jax_fp8.matmul(
            x, w, bias=bias, activation=activation, recipe="rowwise", implementation=implementation
        )

    rounded = jax_fp8.dequantize(jax_fp8.quantize(x, granularity="row")) - x

    def exact(x, bias):
        x = x + rounded  # A slope of the activation is that at the product as it was.
        y = jnp.einsum(
            "...k,nk->...n", x, jnp.asarray(ref.values(w), jnp.float32), precision="highest"
        )
        return activate(y + bias, activation)

    got, want = (jax.vjp(f, x, bias)[1](dy) for f in (call, exact))
    for one, other in zip(got, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert cosine(one, other) >= 0.997


def test_gradients_of_weight_only(rng):
    x = jnp.asarray(sample(rng, "normal", (20, 64))).astype(ref.BF16)
    w = jax_fp8.quantize(jnp.asarray(sample(rng, "normal", (40, 64))), granularity="row")
    (dx,) = jax.vjp(lambda x: jax_fp8.matmul(x, w, recipe="weight_only"), x)[1](
        jnp.ones((20, 40), ref.BF16)
    )
    want = np.ones((20, 40)) @ ref.values(w)
    assert dx.dtype == ref.BF16
    assert cosine(dx, want) >= 0.9999


def test_gradients_of_a_batch(rng):
    x = jnp.asarray(sample(rng, "normal", (2, 20, 64)))
    w = jax_fp8.quantize(jnp.asarray(sample(rng, "normal", (2, 40, 64))), granularity="row")
    dy = jnp.asarray(sample(rng, "normal", (2, 20, 40)))
    (dx,) = jax.vjp(lambda x: jax_fp8.matmul(x, w, recipe="rowwise"), x)[1](dy)
    assert cosine(dx, np.asarray(dy) @ ref.values(w)) >= 0.997


@pytest.mark.parametrize("wrapper", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_gradients_with_a_static_scale_that_is_traced(rng, wrapper):
    x = jnp.asarray(sample(rng, "normal", (20, 64)))
    w = operand(rng, (8, 64))

    def total(x, scale):
        return jax_fp8.matmul(x, w, scale=scale).sum()

    want = jax.grad(total)(x, 0.01)
    ref.assert_same_bits(jax.grad(wrapper(total))(x, jnp.float32(0.01)), want)


def test_a_scaled_weight_is_not_differentiated(rng):
    w = operand(rng, (8, 32))
    total = jax.grad(lambda w: jax_fp8.matmul(X, w).sum(), allow_int=True)
    with pytest.raises(TypeError, match="matmul: a ScaledArray cannot be differentiated"):
        total(w)


def test_an_fp8_result_is_not_differentiated(rng):
    w = operand(rng, (8, 32))

    def total(x):
        y = jax_fp8.matmul(x, w, preferred_element_type=ref.E4M3, output_scale=1.0)
        return jax_fp8.dequantize(y).sum()

    with pytest.raises(NotImplementedError, match="matmul: an FP8 result has no gradient"):
        jax.grad(total)(X)

    def total_by_scale(scale):
        y = jax_fp8.matmul(X, w, preferred_element_type=ref.E4M3, output_scale=scale)
        return jax_fp8.dequantize(y).sum()

    with pytest.raises(NotImplementedError, match="matmul: an FP8 result has no gradient"):
        jax.grad(total_by_scale)(1.0)


def test_recipes_that_need_more_than_matmul_takes(rng):
    w = operand(rng, (8, 32))
    refuses(
        ValueError, "activation has delayed scaling: scale must be given", X, w, recipe="delayed"
    )
    refuses(ValueError, "the recipe multiplies wide values, and w is FP8", X, w, recipe="wide")
    stochastic = jax_fp8.named_recipe("rowwise", stochastic_rounding=True)
    refuses(ValueError, "it takes no key to round gradients with", X, w, recipe=stochastic)
