"""prepare_weight: the same numbers, quantized once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import training
from cases import sample

import jax_fp8

pytestmark = pytest.mark.ends

RECIPES = ("tensorwise", "rowwise", "blockwise", "static", "delayed")


def draw(rng, pattern):
    x_shape, w_shape, dims = training.PATTERNS[pattern]
    return (jnp.asarray(sample(rng, "normal", shape)) for shape in (x_shape, w_shape)), dims


@pytest.mark.parametrize("pattern", ["flax", "two_contracted", "batch_inside"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_prepared_weight_changes_no_number(rng, recipe, pattern):
    (x, w), dims = draw(rng, pattern)
    state = training.state_for(recipe, x, w)

    def loss(x, w, prepared):
        if prepared:
            w = jax_fp8.prepare_weight(
                w, recipe, contract=dims[0][1], batch=dims[1][1], state=state
            )
        found = jax_fp8.dot_general(x, w, dims, recipe=recipe, state=state)
        y, new = found if state else (found, None)
        return jnp.sum(y**2), new

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    ref.assert_same_trees(gradients(x, w, True), gradients(x, w, False))


def test_a_weight_is_quantized_once_for_all_micro_batches(rng):
    w = jnp.asarray(sample(rng, "normal", (64, 32)))
    xs = jnp.asarray(sample(rng, "normal", (5, 16, 64)))

    def step(w, xs):
        def loss(w):
            prepared = jax_fp8.prepare_weight(w, "rowwise")

            def one(total, x):
                y = jax_fp8.dot_general(x, prepared, (((1,), (0,)), ((), ())), recipe="rowwise")
                return total + jnp.sum(y**2), None

            return jax.lax.scan(one, 0.0, xs)[0]

        return jax.grad(loss)(w)

    text = jax.jit(step).trace(w, xs).lower(lowering_platforms=("cuda",)).as_text()
    casts = text.count("custom_call @jax_fp8_cast_transpose")
    assert casts == 3  # Of the weight, and in the loops of x and of the gradient.
    want = sum(jax.grad(lambda w, x=x: jnp.sum((x @ w) ** 2))(w) for x in xs)
    assert training.cosine(jax.jit(step)(w, xs), want) > 0.997


def test_shared_weights_get_the_sum_of_the_gradients(rng):
    w = jnp.asarray(sample(rng, "normal", (32, 32)))
    x = jnp.asarray(sample(rng, "normal", (16, 32)))
    dims = (((1,), (0,)), ((), ()))

    def loss(w):
        prepared = jax_fp8.prepare_weight(w, "tensorwise")
        y = jax_fp8.dot_general(x, prepared, dims)
        return jnp.sum(jax_fp8.dot_general(y, prepared, dims) ** 2)

    def again(w):
        return jnp.sum(jax_fp8.dot_general(jax_fp8.dot_general(x, w, dims), w, dims) ** 2)

    np.testing.assert_allclose(jax.grad(loss)(w), jax.grad(again)(w), rtol=1e-5)


def test_it_is_a_pytree_of_the_wide_weight_and_its_copies():
    prepared = jax_fp8.prepare_weight(jnp.ones((32, 16), jnp.bfloat16), "rowwise")
    assert (prepared.shape, prepared.ndim, prepared.dtype) == ((32, 16), 2, jnp.bfloat16)
    assert prepared.forward.shape == (1, 16, 32) and prepared.backward.shape == (1, 32, 16)
    assert len(jax.tree.leaves(prepared)) == 5
    assert jax.tree.map(lambda leaf: leaf, prepared).recipe == jax_fp8.named_recipe("rowwise")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("wide",), ValueError, "leaves the weight wide"),
        (("rows",), ValueError, "unknown recipe 'rows'"),
        (("delayed",), TypeError, "state must be a ScalingState"),
    ],
)
def test_recipes_that_do_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        jax_fp8.prepare_weight(jnp.ones((32, 16)), *arguments)


def test_operands_that_do_not_fit():
    with pytest.raises(TypeError, match="prepare_weight: w must be float32, .*got an array int32"):
        jax_fp8.prepare_weight(jnp.ones((32, 16), jnp.int32))
    with pytest.raises(ValueError, match=r"contract \(2,\) and batch \(\) are no axes"):
        jax_fp8.prepare_weight(jnp.ones((32, 16)), contract=2)
    x, prepared = jnp.ones((8, 32)), jax_fp8.prepare_weight(jnp.ones((32, 32)), "rowwise")
    with pytest.raises(ValueError, match="rhs was prepared for Recipe"):
        jax_fp8.dot_general(x, prepared, (((1,), (0,)), ((), ())))
    with pytest.raises(ValueError, match=r"prepared for contracting its axes \(0,\)"):
        jax_fp8.dot_general(x, prepared, (((1,), (1,)), ((), ())), recipe="rowwise")
    with pytest.raises(TypeError, match="a PreparedWeight is a right operand, got one as lhs"):
        jax_fp8.dot_general(prepared, x.T, (((0,), (0,)), ((), ())), recipe="rowwise")
