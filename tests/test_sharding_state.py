"""Delayed scaling where each device measures its own amaxes: a maximum makes them one again."""

import pytest
from mesh_cases import run

# Sums of these are exact in any order, and power-of-two scales lose none of them. In each step the
# largest values are those of another device.
SETUP = """
from flax import linen as nn, nnx
import jax_fp8.linen
import jax_fp8.nnx

recipe = jax_fp8.named_recipe("delayed", power_of_two=True)
dims = (((1,), (0,)), ((), ()))
x = rng.integers(-3, 4, (3, 8, 4, 32)).astype(np.float32)
for i in range(3):
    x[i] *= 2.0 ** np.roll(np.arange(8), 3 * i)[:, None, None]
t = rng.integers(-2, 3, (3, 8, 4, 24)).astype(np.float32)
w = rng.integers(-4, 5, (32, 24)).astype(np.float32)
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
"""

# By layer: what a step starts from, and a step ``(w, state, x, t, reduce) -> (gradient, state)``.
STEPS = {
    "dot_general": """
start = jax_fp8.init_scaling(recipe, weight=w)

def gradient(w, state, x, t, reduce):
    def loss(w):
        y, new = jax_fp8.dot_general(x, w, dims, recipe=recipe, state=state)
        return jnp.sum(y * t), new

    dw, state = jax.grad(loss, has_aux=True)(w)
    return dw, reduce(state)
""",
    "linen": """
layer = jax_fp8.linen.Dense(24, use_bias=False, recipe=recipe)
_, start = layer.apply({"params": {"kernel": w}}, jnp.zeros((4, 32)), mutable=["fp8"])
start = start["fp8"]

def gradient(w, state, x, t, reduce):
    def loss(w):
        y, new = layer.apply({"params": {"kernel": w}, "fp8": state}, x, mutable=["fp8"])
        return jnp.sum(y * t), new

    dw, state = jax.grad(loss, has_aux=True)(w)
    return dw, reduce(state["fp8"])
""",
    "nnx": """
model = jax_fp8.nnx.Linear(32, 24, use_bias=False, recipe=recipe, rngs=nnx.Rngs(0))
model.kernel[...] = jnp.asarray(w)
graphdef, _, start = nnx.split(jax_fp8.nnx.convert(model, recipe=recipe), nnx.Param, ...)

def gradient(w, state, x, t, reduce):
    model = nnx.merge(graphdef, nnx.State({"kernel": nnx.Param(w)}), state)
    dw = nnx.grad(lambda model: jnp.sum(model(x) * t))(model)["kernel"][...]
    nnx.update(model, reduce(nnx.state(model, jax_fp8.nnx.ScalingVariable)))
    return dw, nnx.state(model, jax_fp8.nnx.ScalingVariable)
""",
}

TRAIN = """
def step(w, state, x, t, reduce, total):
    dw, state = gradient(w, state, x, t, reduce)
    return w - total(dw) / 16, state

def train(step, x, t):
    weight, state = w, start
    for i in range(3):
        weight, state = step(weight, state, x[i], t[i])
    return jax.tree.map(np.asarray, (weight, jax.tree.leaves(state))), state

same = lambda tree: tree
over = lambda tree: jax.lax.pmax(tree, "d")
total = lambda dw: jax.lax.psum(dw, "d")

one = jax.jit(functools.partial(step, reduce=same, total=same))
want, _ = train(one, x.reshape(3, 32, 32), t.reshape(3, 32, 24))
assert all(np.count_nonzero(amaxes) >= 3 for amaxes in want[1])

def divided(reduce, check_vma):
    # With check_vma=True JAX sums the gradient of what all devices share by itself.
    own = functools.partial(step, reduce=reduce, total=same if check_vma else total)
    sharded = jax.jit(jax.shard_map(
        own, mesh=mesh, in_specs=(P(), P(), P("d"), P("d")), out_specs=P(), check_vma=check_vma
    ))
    got, state = train(sharded, x.reshape(3, 32, 32), t.reshape(3, 32, 24))
    return got, [[s.data for s in leaf.addressable_shards] for leaf in jax.tree.leaves(state)]

for check_vma in (True, False):
    got, shards = divided(over, check_vma)
    ref.assert_same_trees(got, want)
    for parts, amaxes in zip(shards, want[1], strict=True):
        assert len(parts) == 8
        for part in parts:
            ref.assert_same_bits(part, amaxes)

# Without it, JAX refuses to call the state the same on all devices; unasked, it does not look.
assert "out_specs" in message_of(divided, same, True)
_, shards = divided(same, False)
assert any(np.any(np.asarray(parts[0]) != np.asarray(part)) for parts in shards for part in parts)
"""

PMAP = """
own = functools.partial(step, reduce=over, total=total)
copied = lambda leaf: np.broadcast_to(leaf, (8, *np.shape(leaf)))
w, start = copied(w), jax.tree.map(copied, start)
got, _ = train(jax.pmap(own, axis_name="d"), x, t)
ref.assert_same_trees(got, jax.tree.map(copied, want))
"""


@pytest.mark.parametrize("layer", STEPS)
def test_a_maximum_makes_the_amaxes_those_of_one_device(layer):
    run(SETUP + STEPS[layer] + TRAIN + PMAP)
