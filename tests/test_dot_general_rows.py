"""Several axes of rows: the numbers of one axis, in all that is done with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import training
from cases import pair_id, scaled

import jax_fp8

pytestmark = pytest.mark.slow

SEVERAL, ONE = (((3,), (0,)), ((), ())), (((1,), (0,)), ((), ()))


def recipes():
    named = {name: jax_fp8.named_recipe(name) for name in training.RECIPES}
    stochastic = jax_fp8.named_recipe("rowwise", stochastic_rounding=True)
    rowwise = jax_fp8.named_recipe("rowwise")
    e5m2 = jax_fp8.Operand(jnp.float8_e5m2, (1, 128))
    blocks = e5m2, jax_fp8.Operand(granularity=(1, 128))
    return named | {
        "stochastic": stochastic,
        "wide_wgrad": jax_fp8.named_recipe("rowwise", wide_wgrad=True),
        "wide_dgrad": dataclasses.replace(rowwise, dgrad=None),
        "blocks_of_rows": dataclasses.replace(rowwise, wgrad=blocks),
        "square_blocks": jax_fp8.Recipe(*(jax_fp8.Operand(granularity=(128, 128)),) * 2),
    }


def steps(recipe, x, w, dimension_numbers, state, key):
    """``(x, w, dy) -> y, dx, dw, the state and the statistics``."""

    def step(x, w, dy):
        def call(x, w, probe):
            found = jax_fp8.dot_general(
                *(x, w, dimension_numbers),
                recipe=recipe,
                state=state,
                key=key,
                probe=probe,
                implementation="naive",
            )
            return found if state is not None else (found, None)

        y, pull, state_after = jax.vjp(call, x, w, jax_fp8.health_probe(), has_aux=True)
        dx, dw, stats = pull(dy)
        return y, dx, dw, state_after, stats

    return step


RAGGED = ("rowwise", "blockwise", "blocks_of_rows", "square_blocks")


@pytest.mark.parametrize(
    "rows, name",
    [*(((2, 3, 128), name) for name in recipes()), *(((2, 3, 20), name) for name in RAGGED)],
    ids=pair_id,
)
def test_several_axes_have_the_numbers_of_one(rng, rows, name):
    recipe = recipes()[name]
    dtype = jnp.bfloat16 if name == "weight_only" else jnp.float32
    x = jnp.asarray(rng.standard_normal((*rows, 48)), dtype)
    w = jnp.asarray(rng.standard_normal((48, 32)), jnp.float32)
    dy = jnp.asarray(rng.standard_normal((*rows, 32)), jnp.float32)
    state = training.state_for(name, x, w) if recipe.has_state else None
    key = jax.random.key(0, impl="threefry2x32") if recipe.needs_key else None
    got = jax.jit(steps(recipe, x, w, SEVERAL, state, key))(x, w, dy)
    folded = x.reshape(-1, 48), w, dy.reshape(-1, 32)
    want = jax.jit(steps(recipe, x, w, ONE, state, key))(*folded)
    is_wide = recipe.weight is None, recipe.dgrad is None, recipe.wgrad is None
    for one, other, wide in zip(got[:3], want[:3], is_wide, strict=True):
        if wide:  # XLA sums in the order it likes.
            one, other = (np.asarray(a, np.float32).reshape(-1) for a in (one, other))
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())
        else:
            ref.assert_same_bits(np.asarray(one).reshape(other.shape), other)
    ref.assert_same_trees(got[3], want[3])
    for one, other in zip(jax.tree.leaves(got[4]), jax.tree.leaves(want[4]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("of_x", [True, False], ids=["of x too", "of w alone"])
@pytest.mark.parametrize("name", ["rowwise", "blockwise"])
def test_statistics_where_one_gradient_is_wanted(rng, name, of_x):
    """Those of the gradient come from the copy that there is."""
    x, w = rng.standard_normal((2, 3, 128, 48)), rng.standard_normal((48, 32))
    x, w = x.astype(np.float32), w.astype(np.float32)

    def stats(x, dimension_numbers):
        def loss(x, w, probe):
            y = jax_fp8.dot_general(x, w, dimension_numbers, recipe=name, probe=probe)
            return (y**2).sum()

        return jax.grad(loss, (*(0,) * of_x, 1, 2))(x, w, jax_fp8.health_probe())[-1]

    got, want = stats(x, SEVERAL), stats(x.reshape(-1, 48), ONE)
    assert got.gradient.calls == 1 and got.gradient.noise > 0
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "row", (1, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("name", ["rowwise", "blockwise", "wide_wgrad"])
def test_rows_of_a_scaled_array(rng, granularity, name):
    recipe = recipes()[name]
    rows = 2, 256
    data, scale = ref.quantize(rng.standard_normal((*rows, 128)), ref.E4M3, granularity)
    x = scaled(data, scale, granularity)
    count = rows[0] * rows[1]
    one = scaled(data.reshape(count, 128), scale.reshape(-1, scale.shape[-1]), granularity)
    if granularity == "tensor":
        one = scaled(data.reshape(count, 128), scale.reshape(1, 1))
    w = jnp.asarray(rng.standard_normal((128, 32)), jnp.float32)
    dy = rng.standard_normal((*rows, 32)).astype(np.float32)

    def step(x, dy, dimension_numbers):
        def call(w):
            return jax_fp8.dot_general(
                *(x, w, dimension_numbers),
                recipe=recipe,
                preferred_element_type=jnp.float32,
                implementation="naive",
            )

        y, pull = jax.vjp(call, w)
        return y, *pull(dy)

    y, dw = step(x, dy, (((2,), (0,)), ((), ())))
    want_y, want_dw = step(one, dy.reshape(count, 32), ONE)
    ref.assert_same_bits(np.asarray(y).reshape(count, 32), want_y)
    np.testing.assert_allclose(dw, want_dw, rtol=0, atol=1e-6 * np.abs(want_dw).max())


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "blockwise", "wide_wgrad"])
def test_entries_of_a_batch_and_of_vmap(rng, name):
    """A weight for each entry of a batch, and a vmap around that."""
    x = rng.standard_normal((3, 2, 2, 128, 48)).astype(np.float32)
    x *= np.array([1, 30, 0.02], np.float32).reshape(3, 1, 1, 1, 1)
    w = rng.standard_normal((2, 48, 32)).astype(np.float32)
    dy = rng.standard_normal((3, 2, 2, 128, 32)).astype(np.float32)
    recipe = recipes()[name]

    def step(spec):
        def run(x, w, dy):
            def call(x, w):
                return jax_fp8.einsum(spec, x, w, recipe=recipe, implementation="naive")

            y, pull = jax.vjp(call, x, w)
            return y, *pull(dy)

        return run

    got = jax.jit(jax.vmap(step("ebsd,edf->ebsf"), (0, None, 0)))(x, w, dy)
    one = jax.jit(step("erd,edf->erf"))
    for i in range(3):
        want = one(x[i].reshape(2, 256, 48), w, dy[i].reshape(2, 256, 32))
        for ours, theirs in zip(got, want, strict=True):
            ours = np.asarray(ours[i]).reshape(theirs.shape)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["rowwise", "blockwise"])
def test_one_read_makes_both_copies(name):
    """On a GPU, of an x and a gradient with several axes of rows as with one."""
    x, w = jnp.ones((2, 128, 64), jnp.bfloat16), jnp.ones((64, 32), jnp.bfloat16)

    def loss(x, w):
        y = jax_fp8.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), recipe=name)
        return y.astype(jnp.float32).sum()

    def lowered(x):
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        text = step.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
        return {name: text.count(f"custom_call @jax_fp8_{name}") for name in TARGETS}

    assert lowered(x) == lowered(x.reshape(-1, 64)) == dict(zip(TARGETS, (0, 3, 3), strict=True))


TARGETS = ("quantize", "cast_transpose", "scaled_matmul")
