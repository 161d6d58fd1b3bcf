"""A GPT in plain Flax: RMSNorm, rotary positions, SwiGLU, layers stacked for a scan.

There is nothing of FP8 in here: ``jax_fp8.nnx.convert`` brings it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes.

    Attributes:
      width: of the residual stream.
      hidden: of the MLP.
      heads: of the attention.
      layers: blocks.
      length: of a sequence.
      vocabulary: tokens.
      unroll: layers in one turn of the loop over them. All of them leave the compiler no loop,
        and no copies into and out of stacks, but take longer to compile.
      attention: the implementation of ``jax.nn.dot_product_attention``; None is cuDNN's on a GPU
        and XLA's elsewhere.
      dtype: of the products and the residual stream. Parameters are float32.
    """

    width: int = 768
    hidden: int = 2048
    heads: int = 12
    layers: int = 14
    length: int = 1024
    vocabulary: int = 256
    unroll: int = 1
    attention: str | None = None
    dtype: jnp.dtype = jnp.bfloat16

    @property
    def head(self) -> int:
        """The size of a head."""
        return self.width // self.heads

    @property
    def kernel(self) -> str:
        """The implementation of the attention."""
        return self.attention or ("cudnn" if jax.default_backend() == "gpu" else "xla")

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """The dense layers of a block: name -> (K, N)."""
        return {
            "qkv": (self.width, 3 * self.width),
            "out": (self.width, self.width),
            "gate_up": (self.width, 2 * self.hidden),
            "down": (self.hidden, self.width),
        }


def rotary(x: jax.Array) -> jax.Array:
    """Turns (batch, length, heads, size) by its positions: pairs are (i, i + size / 2)."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = (f(angle)[:, None, :].astype(jnp.float32) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        norm = functools.partial(nnx.RMSNorm, config.width, dtype=config.dtype, rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        # What is added to the residual stream is less the more layers add to it.
        deviation = {"out": 0.02 / (2 * config.layers) ** 0.5}
        deviation["down"] = deviation["out"]
        for name, (k, n) in config.weights.items():
            init = nnx.initializers.normal(deviation.get(name, 0.02))
            layer = nnx.Linear(
                k, n, use_bias=False, dtype=config.dtype, kernel_init=init, rngs=rngs
            )
            setattr(self, name, layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).reshape(batch, length, 3, -1, self.config.head)
        q, k, v = (qkv[:, :, i] for i in range(3))
        attended = jax.nn.dot_product_attention(
            rotary(q), rotary(k), v, is_causal=True, implementation=self.config.kernel
        )
        x = x + self.out(attended.reshape(x.shape))
        gate, up = jnp.split(self.gate_up(self.mlp_norm(x)), 2, axis=-1)
        return x + self.down(nnx.silu(gate) * up)


class GPT(nnx.Module):
    """Tokens (batch, length) to logits (batch, length, vocabulary) in float32."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocabulary, config.width, dtype=config.dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.blocks = stack(rngs)
        self.norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.head = nnx.Linear(
            config.width,
            config.vocabulary,
            use_bias=False,
            dtype=config.dtype,
            kernel_init=init,
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, unroll=self.config.unroll)
        def through(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        # The same values as `self.embed(tokens)`, whose gradient adds up one row after the other.
        chosen = jax.nn.one_hot(tokens, self.config.vocabulary, dtype=self.config.dtype)
        x = through(self.blocks, chosen @ self.embed.embedding[...].astype(self.config.dtype))
        return self.head(self.norm(x)).astype(jnp.float32)
