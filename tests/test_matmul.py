"""matmul: quantize, then scaled_matmul."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import is_fast, must_refuse, operand, pair_id, sample, scaled

import jax_fp8
from jax_fp8 import Operand, Recipe


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
    message = r"matmul: w must be a jax_fp8.ScaledArray .*\(N, K\).*\[32, 32\].*einsum or lax.dot"
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


def test_differentiation_raises(implementation, rng):
    w = operand(rng, (8, 32))
    total = jax.grad(lambda x: jax_fp8.matmul(x, w, implementation=implementation).sum())
    with pytest.raises(
        NotImplementedError, match="quantize: .* can be differentiated in this version"
    ):
        total(X)


def test_vmap_raises(implementation, rng):
    w = operand(rng, (8, 32))
    multiply = jax.vmap(lambda x: jax_fp8.matmul(x, w, implementation=implementation))
    with pytest.raises(NotImplementedError, match="scaled_matmul: jax.vmap is not supported"):
        multiply(X[None])
