"""An nnx model of the usual parts, for what works on whole models."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Block(nnx.Module):
    def __init__(self, width, attention, rngs):
        self.attention = nnx.data(None)
        if attention:
            self.attention = nnx.MultiHeadAttention(
                num_heads=2, in_features=width, decode=False, rngs=rngs
            )
        self.mlp = nnx.Dict(
            up=nnx.Linear(width, 2 * width, rngs=rngs),
            down=nnx.Einsum("...d,de->...e", (2 * width, width), (width,), rngs=rngs),
        )

    def __call__(self, x):
        if self.attention is not None:
            x = x + self.attention(x)
        return x + self.mlp["down"](nnx.relu(self.mlp["up"](x)))


class Model(nnx.Module):
    """Blocks in a List, of which the last is the first again, or, ``scanned``, stacked in one."""

    def __init__(self, count=1, *, attention=False, scanned=False, width=16):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(8, width, rngs=rngs)
        if scanned:

            @nnx.split_rngs(splits=count)
            @nnx.vmap
            def make(rngs):
                return Block(width, attention, rngs)

            self.blocks = make(rngs)
        else:
            blocks = [Block(width, attention, rngs) for _ in range(count)]
            self.blocks = nnx.List([*blocks, blocks[0]])
        self.lm_head = nnx.Linear(width, 8, rngs=rngs)
        self.scanned = scanned

    def __call__(self, tokens):
        x = self.embed(tokens)
        if self.scanned:

            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            @nnx.remat
            def run(block, x):
                return block(x)

            x = run(self.blocks, x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.lm_head(x)


def stacked_linear(count, width):
    """Dense layers for ``through_stack``."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(width, width, rngs=rngs)

    return make(nnx.Rngs(0))


def through_stack(layers, x):
    """The mean square of what a scan over stacked layers makes of ``x``."""

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return jnp.tanh(layer(x))

    return jnp.square(run(layers, x)).mean()


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    chosen = jnp.take_along_axis(nnx.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -chosen.mean()


def some_tokens(seed=0, shape=(4, 9)):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 8, shape))


def paths(state):
    return [path for path, _ in nnx.to_flat_state(state)]


def nbytes(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))
