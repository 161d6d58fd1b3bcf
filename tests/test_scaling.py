"""ScalingState: how static and delayed scales start, follow the values, and are used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref

import jax_fp8

FLAX = (((1,), (0,)), ((), ()))
X, W = jnp.full((4, 16), 3.0), jnp.full((16, 8), 2.0)
delayed = functools.partial(jax_fp8.named_recipe, "delayed")


def history(*amaxes, length=4):
    return jnp.zeros(length, jnp.float32).at[: len(amaxes)].set(jnp.asarray(amaxes, jnp.float32))


def test_a_delayed_state_starts_empty_or_with_what_is_given():
    state = jax_fp8.init_scaling(delayed(history=4), weight=W)
    ref.assert_same_bits(state.activation, history())
    ref.assert_same_bits(state.weight, history(2))


def test_a_static_state_has_one_amax_of_the_activation():
    state = jax_fp8.init_scaling("static")
    assert np.isnan(state.activation).tolist() == [True] and state.weight is None


def test_each_step_shifts_the_history():
    state = jax_fp8.init_scaling(delayed(history=3))
    for i in range(1, 5):
        _, state = jax_fp8.dot_general(i * X, W, FLAX, recipe=delayed(history=3), state=state)
    ref.assert_same_bits(state.activation, jnp.asarray([12, 9, 6], jnp.float32))
    ref.assert_same_bits(state.weight, jnp.asarray([2, 2, 2], jnp.float32))


@pytest.mark.parametrize("update, amax", [("max", 7.0), ("most_recent", 1.0)])
@pytest.mark.parametrize("margin", [0, 2])
def test_the_scale_is_that_of_earlier_steps(update, amax, margin):
    """Values are rounded and saturated by it, and not by their own."""
    recipe = delayed(history=4, update=update, margin=margin)
    state = jax_fp8.ScalingState(history(1.0, 7.0), history(2.0))
    x = jnp.linspace(-9.0, 9.0, 64).reshape(4, 16)
    y, new = jax_fp8.dot_general(x, W, FLAX, recipe=recipe, state=state)
    scales = [np.float32(amax * 2**margin / 448), np.float32(2 * 2**margin / 448)]
    xq, wq = (
        jax_fp8.quantize(operand, scale=scale)
        for operand, scale in zip((x, W.T), scales, strict=True)
    )
    want, magnitudes = ref.product(xq, wq)
    ref.assert_close(y, want, ref.random_error(magnitudes, 16, jax.default_backend() == "gpu"))
    ref.assert_same_bits(new.activation, history(9.0, 1.0, 7.0))


def test_an_empty_history_is_a_scale_of_one():
    state = jax_fp8.init_scaling(delayed(history=4))
    x = jnp.full((4, 16), 0.3)
    y, _ = jax_fp8.dot_general(x, W, FLAX, recipe=delayed(history=4), state=state)
    assert y[0, 0] == pytest.approx(16 * 2 * float(jnp.float8_e4m3fn(0.3)), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_step_shows_and_does_not_stay(bad):
    recipe = delayed(history=4)
    state = jax_fp8.init_scaling(recipe, activation=X, weight=W)
    y, state = jax_fp8.dot_general(X.at[1, 2].set(bad), W, FLAX, recipe=recipe, state=state)
    assert np.isnan(y[1]).all() and np.isfinite(y[0]).all()
    ref.assert_same_bits(state.activation, history(0.0, 3.0))
    y, _ = jax_fp8.dot_general(X, W, FLAX, recipe=recipe, state=state)
    assert np.isfinite(y).all()


def test_nothing_comes_of_a_static_scale_that_was_not_calibrated():
    state = jax_fp8.init_scaling("static")
    y, after = jax_fp8.dot_general(X, W, FLAX, recipe="static", state=state)
    assert np.isnan(y).all() and np.isnan(after.activation).all()


def test_calibration_keeps_the_largest():
    state = jax_fp8.init_scaling("static")
    for factor in (1.0, 5.0, 2.0, np.nan, np.inf):
        state = jax_fp8.calibrate("static", state, activation=factor * X)
    assert state.activation.tolist() == [15.0]
    y, after = jax_fp8.dot_general(X, W, FLAX, recipe="static", state=state)
    assert y[0, 0] == pytest.approx(16 * 6, rel=0.04)
    ref.assert_same_trees(after, state)


def test_calibration_leaves_delayed_scales_alone():
    state = jax_fp8.init_scaling("delayed")
    ref.assert_same_trees(jax_fp8.calibrate("delayed", state, activation=X, weight=W), state)


def test_the_state_has_no_gradient():
    recipe = delayed(history=4)

    def loss(state):
        y, new = jax_fp8.dot_general(X, W, FLAX, recipe=recipe, state=state)
        return y.sum() + new.activation.sum()

    state = jax_fp8.init_scaling(recipe, activation=X, weight=W)
    gradient = jax.grad(loss)(state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_micro_batches_in_a_scan():
    recipe = delayed(history=4)
    state = jax_fp8.init_scaling(recipe, weight=W)

    def loss(w, x, state):
        y, state = jax_fp8.dot_general(x, w, FLAX, recipe=recipe, state=state)
        return jnp.sum(y**2), state

    def step(carry, x):
        total, state = carry
        gradient, state = jax.grad(loss, has_aux=True)(W, x, state)
        return (total + gradient, state), None

    xs = jnp.stack([X, 2 * X, 3 * X])
    (total, state), _ = jax.jit(lambda: jax.lax.scan(step, (0 * W, state), xs))()
    ref.assert_same_bits(state.activation, history(9.0, 6.0, 3.0))
    assert np.isfinite(total).all()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_dynamic_recipes_keep_nothing(recipe):
    with pytest.raises(ValueError, match="init_scaling: .* keeps no state"):
        jax_fp8.init_scaling(recipe)
    with pytest.raises(ValueError, match="the recipe has dynamic scales alone, and takes no state"):
        jax_fp8.dot_general(X, W, FLAX, recipe=recipe, state=jax_fp8.ScalingState())


@pytest.mark.parametrize(
    "state, error, message",
    [
        (None, TypeError, "state must be a ScalingState of init_scaling, got a NoneType"),
        (
            jax_fp8.ScalingState(jnp.zeros(3), jnp.zeros(16)),
            ValueError,
            r"state.activation does not fit .* takes float32\[16\], got an array float32\[3\]",
        ),
        (
            jax_fp8.ScalingState(jnp.zeros(16), None),
            ValueError,
            r"state.weight does not fit .* takes float32\[16\], got None",
        ),
        (
            jax_fp8.ScalingState(jnp.zeros(16), jnp.zeros(16, jnp.bfloat16)),
            ValueError,
            r"state.weight does not fit .*got an array bfloat16\[16\]",
        ),
    ],
)
def test_a_state_of_something_else_raises(state, error, message):
    with pytest.raises(error, match=message):
        jax_fp8.dot_general(X, W, FLAX, recipe="delayed", state=state)
