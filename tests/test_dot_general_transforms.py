"""dot_general under checkpoint, scan and donation, and what it keeps for its gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import training
from cases import sample
from flax import nnx
from flax_cases import samples

import jax_fp8
import jax_fp8.linen
import jax_fp8.nnx

FLAX = (((1,), (0,)), ((), ()))


def block(x, w, recipe="rowwise"):
    # An activation that rounds nothing: bits do not depend on what XLA fuses it with.
    return jax.nn.relu(jax_fp8.dot_general(x, w, FLAX, recipe=recipe))


def stack(rng, depth=3, width=64):
    x = jnp.asarray(sample(rng, "normal", (32, width)))
    ws = jnp.asarray(sample(rng, "normal", (depth, width, width)) / np.sqrt(width))
    return x, ws


def loop_loss(layer):
    def loss(x, ws):
        for i in range(ws.shape[0]):
            x = layer(x, ws[i])
        return jnp.sum(x**2)

    return loss


POLICIES = {
    "nothing": None,
    "residuals and products": jax_fp8.checkpoint_policy,
    "residuals": jax.checkpoint_policies.save_only_these_names("jax_fp8_residual"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint_gives_the_same_bits(rng, policy):
    x, ws = stack(rng)
    want = jax.jit(jax.grad(loop_loss(block), (0, 1)))(x, ws)
    layer = jax.checkpoint(block, policy=POLICIES[policy])
    ref.assert_same_trees(jax.jit(jax.grad(loop_loss(layer), (0, 1)))(x, ws), want)


def casts(function, *operands):
    """How often a program quantizes, in the text before it is compiled for a GPU."""
    exported = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    return sum(
        exported.count(f"custom_call @{name}")
        for name in ("jax_fp8_cast_transpose", "jax_fp8_quantize")
    ), exported.count("custom_call @jax_fp8_scaled_matmul")


RECIPES = {name: jax_fp8.named_recipe(name) for name in training.FP8_RECIPES} | {
    "wide_wgrad": jax_fp8.named_recipe("rowwise", wide_wgrad=True)
}
#: What a layer's value and gradients quantize and multiply in FP8, where not three of each.
COUNTS = {"weight_only": (1, 2), "wide_wgrad": (3, 2)}


def check_counts(kept, plain, again, of_layer=(3, 3)):
    """Of two layers: with the policy, without checkpoint, and without a policy."""
    assert kept == plain == tuple(2 * count for count in of_layer)
    assert again[0] > plain[0] and again[1] > plain[1]


@pytest.mark.parametrize("prepared", [False, True], ids=["as it is", "prepared"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_policy_quantizes_nothing_twice(rng, name, prepared):
    recipe = RECIPES[name]
    x, ws = stack(rng, depth=2)
    x = x.astype(jnp.bfloat16)
    state = training.state_for(recipe, x, ws)

    def layer(x, w, state):
        if prepared:
            w = jax_fp8.prepare_weight(w, recipe, state=state)
        options = {"recipe": recipe, "state": state, "preferred_element_type": x.dtype}
        found = jax_fp8.dot_general(x, w, FLAX, **options)
        y, state = (found, None) if state is None else found
        return jax.nn.relu(y), state

    def count(layer):
        def loss(x, ws, state):
            for w in ws:
                x, state = layer(x, w, state)
            return jnp.sum(x**2), state

        return casts(jax.grad(loss, (0, 1), has_aux=True), x, ws, state)

    kept = count(jax.checkpoint(layer, policy=jax_fp8.checkpoint_policy))
    check_counts(kept, count(layer), count(jax.checkpoint(layer)), COUNTS.get(name, (3, 3)))


class Block(nn.Module):
    recipe: str

    @nn.compact
    def __call__(self, x):
        return nn.relu(jax_fp8.linen.Dense(32, recipe=self.recipe)(x))


@pytest.mark.parametrize("recipe", ["rowwise", "delayed"])
def test_the_policy_in_linens_remat(recipe):
    x = samples((6, 32))

    def count(kind):
        model = nn.Sequential([kind(recipe), kind(recipe)])
        variables = jax.eval_shape(model.init, jax.random.key(0), x)

        def loss(params, x, rest):
            y, state = model.apply({"params": params, **rest}, x, mutable=["fp8"])
            return jnp.sum(y**2), state

        params = variables.pop("params")
        return casts(jax.grad(loss, (0, 1), has_aux=True), params, x, variables)

    kept = nn.remat(Block, policy=jax_fp8.checkpoint_policy)
    check_counts(count(kept), count(Block), count(nn.remat(Block)))


@pytest.mark.parametrize("recipe", ["rowwise", "delayed"])
def test_the_policy_in_nnxs_remat(recipe):
    x, rngs = samples((6, 32)), nnx.Rngs(0)
    layers = nnx.List([jax_fp8.nnx.Linear(32, 32, recipe=recipe, rngs=rngs) for _ in range(2)])
    graphdef, params, rest = nnx.split(layers, nnx.Param, ...)

    def run(layer, x):
        return nnx.relu(layer(x))

    def count(run):
        def loss(params, x, rest):
            model = nnx.merge(graphdef, params, rest, copy=True)
            for layer in model:
                x = run(layer, x)
            return jnp.sum(x**2), nnx.state(model, jax_fp8.nnx.ScalingVariable)

        return casts(jax.grad(loss, (0, 1), has_aux=True), params, x, rest)

    kept = nnx.remat(run, policy=jax_fp8.checkpoint_policy)
    check_counts(count(kept), count(run), count(nnx.remat(run)))


def test_scan_over_layers(rng):
    x, ws = stack(rng)

    def loss(x, ws):
        layer = jax.checkpoint(block, policy=jax_fp8.checkpoint_policy)
        return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0] ** 2)

    ref.assert_same_trees(
        jax.jit(jax.grad(loss, (0, 1)))(x, ws), jax.jit(jax.grad(loop_loss(block), (0, 1)))(x, ws)
    )


def test_donated_parameters(rng):
    x, ws = stack(rng)
    step = lambda ws, x: ws - 0.01 * jax.grad(loop_loss(block), 1)(x, ws)  # noqa: E731
    want = np.asarray(jax.jit(step)(ws, x))
    ref.assert_same_bits(jax.jit(step, donate_argnums=0)(ws + 0, x), want)


def saved_bytes(recipe, x, w):
    """Of what the forward pass keeps for the gradient of w alone, and of x alone."""

    def of(function, operand):
        _, pull = jax.vjp(function, operand)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(pull))

    state = training.state_for(recipe, x, w)

    def call(x, w):
        y = jax_fp8.dot_general(x, w, FLAX, recipe=recipe, state=state)
        return y if state is None else y[0]

    return of(lambda w: call(x, w), w), of(lambda x: call(x, w), x)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "static", "delayed"])
def test_saved_activations_are_half_of_bf16(rng, recipe):
    x = jnp.asarray(sample(rng, "normal", (1024, 512))).astype(jnp.bfloat16)
    w = jnp.asarray(sample(rng, "normal", (512, 256))).astype(jnp.bfloat16)
    activations, weights = saved_bytes(recipe, x, w)
    assert activations <= 0.6 * x.nbytes
    assert weights <= 0.6 * w.nbytes


def test_what_needs_no_gradient_is_not_kept(rng):
    x, ws = stack(rng, depth=1)
    assert casts(lambda x, w: jax.grad(loop_loss(block), 0)(x, w), x, ws)[1] == 2
    _, pull = jax.vjp(lambda x: jax_fp8.dot_general(x, ws[0], FLAX), x)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) <= 1.1 * ws[0].size


def test_one_traced_function_with_and_without_a_gradient_of_x():
    """What is kept for gradients may differ from one use of a traced function to the next."""
    layer = jax.jit(lambda x, w: jax_fp8.dot_general(x, w, FLAX))
    w = jnp.eye(16)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(layer(layer(jnp.ones((4, 16)), w), w) ** 2)))(w)
    assert gradient.shape == w.shape
