"""jax.vmap of matmul, dot_general, einsum and layers, and of their gradients: a loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import training
from cases import is_fast, operand, pair_id, sample
from flax import nnx

import jax_fp8
import jax_fp8.linen
import jax_fp8.nnx

pytestmark = pytest.mark.slow

SIZE = 3
FLAX = (((1,), (0,)), ((), ()))


def stacked(rng, *shape, dtype=jnp.float32):
    """Values of entries whose sizes differ, so that no scale is another's."""
    x = sample(rng, "normal", (SIZE, *shape))
    return jnp.asarray(x * np.array([1, 30, 0.02]).reshape(-1, *(1,) * len(shape)), dtype)


def entry(tree, i, batched=True):
    return jax.tree.map(lambda leaf: leaf[i if batched else 0], tree)


def assert_near(implementation, got, want, magnitudes, k, is_fp8=True):
    """Holds a result to that of the loop: its bits, or twice what either may be off by."""
    if implementation == "naive" and is_fp8:
        ref.assert_same_bits(got, want)
        return
    if implementation in ("naive", "xla") or not is_fp8:
        error = ref.sum_error(magnitudes, k)
    else:
        error = ref.random_error(magnitudes, k, is_fast(implementation))
    want = np.asarray(want).astype(np.float64)
    ref.assert_close(got, want, 2 * error + ref.half_ulp(want, np.asarray(got).dtype))


# --- dot_general ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, batched",
    [
        *((recipe, (True, False)) for recipe in training.FP8_RECIPES),
        *((recipe, (True, True)) for recipe in ("rowwise", "delayed")),
        *((recipe, (False, True)) for recipe in ("tensorwise", "blockwise")),
    ],
    ids=pair_id,
)
def test_dot_general_and_its_gradients(implementation, rng, recipe, batched):
    if recipe == "weight_only" and implementation == "cublaslt":
        pytest.skip("cublasLt has no product of 16-bit by FP8 values")
    if recipe == "blockwise" and implementation == "cublaslt" and not on_hopper():
        pytest.skip("cublasLt has block scales on Hopper alone")
    dtype = jnp.bfloat16 if recipe == "weight_only" else jnp.float32
    operands = stacked(rng, 7, 144, dtype=dtype), stacked(rng, 144, 16)
    dy = stacked(rng, 7, 16)
    states = None
    if jax_fp8.named_recipe(recipe).has_state:
        states = jax.vmap(lambda x, w: training.state_for(recipe, x, w))(*operands)

    def run(x, w, dy, state):
        def call(x, w):
            found = jax_fp8.dot_general(
                x, w, FLAX, recipe=recipe, state=state, implementation=implementation
            )
            return found if state is not None else (found, None)

        y, pull, state = jax.vjp(call, x, w, has_aux=True)
        return y, *pull(dy), state

    axes = (*(0 if b else None for b in batched), 0, 0)
    x, w = (entry(a, 0) if not b else a for a, b in zip(operands, batched, strict=True))
    got = jax.jit(jax.vmap(run, axes))(x, w, dy, states)
    one = jax.jit(run)
    for i in range(SIZE):
        x, w = (entry(a, i, b) for a, b in zip(operands, batched, strict=True))
        want = one(x, w, dy[i], entry(states, i))
        ref.assert_same_trees(entry(got[3], i), want[3])
        of_this = training.expected(
            jax_fp8.named_recipe(recipe), FLAX, *(np.asarray(a) for a in (x, w, dy[i]))
        )
        for one_got, one_want, (_, magnitudes, k, is_fp8) in zip(
            entry(got[:3], i), want[:3], of_this, strict=True
        ):
            assert_near(implementation, one_got, one_want, magnitudes, k, is_fp8)


def on_hopper():
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_shared_weight_gets_the_sum_of_gradients(handlers, rng, recipe):
    """Of a vmap within the gradient, and nested."""
    x, w, dy = stacked(rng, 2, 7, 48), entry(stacked(rng, 48, 16), 0), stacked(rng, 2, 7, 16)

    def multiply(x, w):
        return jax_fp8.dot_general(x, w, FLAX, recipe=recipe, implementation="naive")

    nested = jax.vmap(jax.vmap(multiply, (0, None)), (0, None))
    _, pull = jax.vjp(nested, x, w)
    dx, dw = jax.jit(pull)(dy)
    parts = []
    for i, j in np.ndindex(SIZE, 2):
        _, pull = jax.vjp(multiply, x[i, j], w)
        dx_ij, dw_ij = pull(dy[i, j])
        ref.assert_same_bits(dx[i, j], dx_ij)
        parts.append(np.asarray(dw_ij, np.float64))
    ref.assert_close(dw, sum(parts), ref.sum_error(sum(np.abs(part) for part in parts), 2 * SIZE))


def test_einsum_with_its_axes_anywhere(implementation, rng):
    x, w = stacked(rng, 2, 5, 48), stacked(rng, 48, 4, 6)

    def multiply(x, w):
        return jax_fp8.einsum(
            "bsd,dhe->bhse", x, w, recipe="rowwise", implementation=implementation
        )

    turned = jax.jit(jax.vmap(multiply, (2, -1), out_axes=1))
    got = turned(jnp.moveaxis(x, 0, 2), jnp.moveaxis(w, 0, -1))
    for i in range(SIZE):
        a, b = np.asarray(x[i]).reshape(10, 48), np.asarray(w[i]).reshape(48, 24)
        magnitudes = (np.abs(a) @ np.abs(b)).reshape(2, 5, 4, 6).transpose(0, 2, 1, 3)
        # The magnitudes of what is quantized are larger by one rounding of each operand.
        assert_near(implementation, got[:, i], multiply(x[i], w[i]), 1.2 * magnitudes, 48)


def test_keys_of_stochastic_rounding(handlers, rng):
    recipe = jax_fp8.named_recipe("rowwise", stochastic_rounding=True)
    x, w, dy = stacked(rng, 7, 48), entry(stacked(rng, 48, 16), 0), stacked(rng, 7, 16)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), SIZE)

    def gradients(x, dy, key):
        def call(x, w):
            return jax_fp8.dot_general(x, w, FLAX, recipe=recipe, key=key, implementation="naive")

        return jax.vjp(call, x, w)[1](dy)

    got = jax.jit(jax.vmap(gradients))(x, dy, keys)
    for i in range(SIZE):
        ref.assert_same_trees(entry(got, i), gradients(x[i], dy[i], keys[i]))


# --- matmul ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["tensorwise", "weight_only"])
@pytest.mark.parametrize("shared", [True, False], ids=["one w", "w each"])
def test_matmul_and_its_gradients(handlers, rng, recipe, shared):
    """With a bias for all, and with one for each."""
    x, dy = stacked(rng, 5, 48, dtype=jnp.bfloat16), stacked(rng, 5, 16)
    bias = stacked(rng, 16, dtype=jnp.bfloat16)
    w = operand(rng, (16, 48) if shared else (SIZE, 16, 48), granularity="row")

    def run(x, w, bias, dy):
        def call(x, bias):
            return jax_fp8.matmul(
                x,
                w,
                recipe=recipe,
                bias=bias,
                activation="relu",
                preferred_element_type=jnp.float32,
                implementation="naive",
            )

        y, pull = jax.vjp(call, x, bias)
        return y, call(x, bias), *pull(dy)

    one, of_w = jax.jit(run), None if shared else 0
    got = jax.jit(jax.vmap(run, (0, of_w, None, 0)))(x, w, bias[0], dy)
    each = jax.jit(jax.vmap(run, (0, of_w, 0, 0)))(x, w, bias, dy)
    for i in range(SIZE):
        w_i = w if shared else entry(w, i)
        for found, own in ((got, bias[0]), (each, bias[i])):
            want = one(x[i], w_i, own, dy[i])
            ref.assert_same_trees(entry(found[:3], i), want[:3])
            # XLA adds up the gradient of the bias, in the order it likes.
            magnitudes = np.abs(dy[i]).sum(axis=0)
            error = 2 * ref.sum_error(magnitudes, 5) + ref.half_ulp(magnitudes, ref.BF16)
            ref.assert_close(found[3][i], want[3], error)


# --- Layers ---------------------------------------------------------------------------------------


def test_a_linen_layer_in_a_vmap(handlers, rng):
    """Flax's own, of variables that are stacked; and jax.vmap of apply, with one set for all."""
    x = stacked(rng, 5, 48)
    layer = jax_fp8.linen.Dense(16, recipe="delayed", implementation="naive")
    lifted = nn.vmap(
        jax_fp8.linen.Dense,
        variable_axes={"params": 0, "fp8": 0},
        split_rngs={"params": True},
    )(16, recipe="delayed", implementation="naive")
    variables = lifted.init(jax.random.key(0), x)
    got, state = lifted.apply(variables, x, mutable=["fp8"])
    for i in range(SIZE):
        want, own = layer.apply(entry(variables, i), x[i], mutable=["fp8"])
        ref.assert_same_bits(got[i], want)
        ref.assert_same_trees(entry(state, i), own)
    first = entry(variables, 0)
    shared = jax.vmap(layer.apply, (None, 0))(first, x)
    for i in range(SIZE):
        ref.assert_same_bits(shared[i], layer.apply(first, x[i]))


def test_an_nnx_layer_in_a_vmap(handlers, rng):
    x = stacked(rng, 5, 48)

    @nnx.split_rngs(splits=SIZE)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(48, 16, rngs=rngs)

    layers = jax_fp8.nnx.convert(make(nnx.Rngs(0)), recipe="rowwise", implementation="naive")

    @nnx.vmap
    def gradients(layer, x):
        return nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 2))(layer, x)

    got = gradients(layers, x)
    graphdef, params = nnx.split(layers)
    for i in range(SIZE):
        layer = nnx.merge(graphdef, entry(params, i))
        want = nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 2))(layer, x[i])
        ref.assert_same_trees(entry(got, i), want)
