"""Decoder: the transformer of the Llama, Qwen and Mistral families, in nnx."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_fp8
from jax_fp8.decoder.config import DecoderConfig
from jax_fp8.decoder.dense import Dense, Frozen, Parallel
from jax_fp8.decoder.rope import rotate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of what a batch of texts has so far.

    Attributes:
      keys: for each layer ``(batch, positions, kv_heads, head_dim)``; what lies beyond a text's
        length is not read.
      values: likewise.
      lengths: int32 ``(batch,)``.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    lengths: Any


def empty_cache(config: DecoderConfig, batch: int, positions: int, dtype: Any) -> Cache:
    """A cache for ``batch`` texts of up to ``positions`` tokens."""
    shape = (batch, positions, config.kv_heads, config.head_dim)
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for _ in range(2))
    return Cache(keys, values, jnp.zeros(batch, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Stream:
    """What goes from block to block.

    Attributes:
      x: the residual stream, ``(B, T, width)``.
      delta: what the block before adds to it, so that the next norm can do it; None: nothing.
      qkv: what the block's first product makes of it, where the block before has multiplied it.
    """

    x: jax.Array
    delta: jax.Array | None = None
    qkv: jax.Array | None = None


class Block(nnx.Module):
    """Attention and an MLP, each behind an RMSNorm, each added to the residual stream."""

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        *,
        norms: tuple[jax.Array, jax.Array],
        qkv: Dense | Parallel,
        o: Dense | Parallel,
        gate_up: Dense | Parallel,
        down: Dense | Parallel,
        qk_norms: tuple[jax.Array, jax.Array] | None = None,
    ) -> None:
        self.config, self.window = config, config.windows[index]
        self.attention_norm, self.mlp_norm = (Frozen(weight) for weight in norms)
        products: tuple[Any, ...] = qkv, o, gate_up, down  # Any: a Parallel has no `link`.
        self.qkv, self.o, self.gate_up, self.down = products
        q_norm, k_norm = (None, None) if qk_norms is None else map(Frozen, qk_norms)
        self.q_norm: Any = nnx.data(q_norm)
        self.k_norm: Any = nnx.data(k_norm)

    def __call__(
        self,
        stream: Stream,
        rotation: Any,
        keys: Any,
        values: Any,
        at: Any,
        following: Block | None = None,
        one_call: bool = False,
    ) -> tuple[Stream, jax.Array, jax.Array]:
        """One step down the residual stream.

        Args:
          stream: what comes in.
          rotation: of the rotary embedding.
          keys: of this layer's cache.
          values: likewise.
          at: how queries find what they attend to, a ``Prompt`` or a ``Step``.
          following: the block behind this one, whose first product may be multiplied here.
          one_call: as of ``Decoder.hidden``.

        Returns:
          (stream, keys, values).
        """
        c, x, delta, dtype = self.config, stream.x, stream.delta, stream.x.dtype
        recipe = self.fused_recipe(x, one_call)
        if stream.qkv is not None:
            qkv = stream.qkv
        elif recipe is not None:
            x = x if delta is None else x + delta
            links = [self.first_link(recipe)]
            (qkv,) = jax_fp8.fused_chain(x, links, recipe=recipe, one_call=one_call)
        else:
            h, x = norm(x, delta, self.attention_norm[...], c.eps, self.qkv)
            qkv = self.qkv(h, dtype)
        qkv = qkv.reshape(*x.shape[:-1], c.heads + 2 * c.kv_heads, c.head_dim)
        q, k, v = jnp.split(qkv, (c.heads, c.heads + c.kv_heads), axis=-2)
        if self.q_norm is not None:
            q = rms_norm(q, self.q_norm[...], c.eps)
            k = rms_norm(k, self.k_norm[...], c.eps)
        q, k = rotate(q, rotation), rotate(k, rotation)
        keys, values = at.write(keys, k), at.write(values, v)
        attended = at.attend(q, k, v, keys, values, self.window)
        attended = attended.reshape(*x.shape[:-1], c.heads * c.head_dim)
        mlp_norm = self.mlp_norm[...]
        if recipe is not None:
            links = [
                self.o.link(recipe=recipe, residual=x),
                self.gate_up.link(recipe=recipe, norm=mlp_norm, eps=c.eps, activation="swiglu"),
                self.down.link(recipe=recipe, residual=0),
            ]
            if following is not None and following.fused_recipe(x, one_call) == recipe:
                links.append(following.first_link(recipe))
            results = jax_fp8.fused_chain(attended, links, recipe=recipe, one_call=one_call)
            _, _, x, *of_next = results
            return Stream(x, qkv=of_next[0] if of_next else None), keys, values
        h, x = norm(x, self.o(attended), mlp_norm, c.eps, self.gate_up)
        gate_up = self.gate_up(h, dtype)
        options = self.down.quantization(gate_up)
        if options is None:
            gate, up = jnp.split(gate_up, 2, axis=-1)
            delta = self.down(jax.nn.silu(gate) * up)
        else:
            delta = self.down(jax_fp8.swiglu_quantize(gate_up, **options), dtype)
        return Stream(x, delta), keys, values

    def fused_recipe(self, x: jax.Array, one_call: bool = True) -> str | None:
        """The one by which ``jax_fp8.fused_chain`` takes all products, of as many rows as ``x``.

        None where there is no such one; and where a mesh may divide the weights (no ``one_call``)
        and rows are quantized, which would be brought together for that, with the weights.
        """
        with_norms = (product.fused_recipe(x, norm=True) for product in (self.qkv, self.gate_up))
        found = {*with_norms, self.o.fused_recipe(x), self.down.fused_recipe(x)}
        recipe = found.pop() if len(found) == 1 else None
        return recipe if one_call or recipe == "weight_only" else None

    def first_link(self, recipe: str) -> jax_fp8.ChainLink:
        """The first product, with the norm before it."""
        return self.qkv.link(recipe=recipe, norm=self.attention_norm[...], eps=self.config.eps)


class Decoder(nnx.Module):
    """A decoder: tokens in, logits out.

    Attributes:
      config: its shape.
      embedding: ``(vocab_size, width)``; its dtype is that of the residual stream.
      blocks: the layers.
      norm: of the last RMSNorm.
      head: to the logits; None: the embedding.
      format: of the FP8 checkpoint that it comes from, or None.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        embedding: jax.Array,
        blocks: list[Block],
        norm: jax.Array,
        head: Dense | None,
        format: str | None = None,
    ) -> None:
        self.config, self.format = config, format
        self.embedding = Frozen(embedding)
        self.blocks = nnx.List(blocks)
        self.norm = Frozen(norm)
        self.head = nnx.data(head)

    @property
    def dtype(self) -> Any:
        """Of the residual stream and the cache."""
        return self.embedding[...].dtype

    def hidden(
        self, tokens: jax.Array, cache: Cache, at: Any, *, one_call: bool = False
    ) -> tuple[jax.Array, Cache]:
        """What the head reads, ``(B, T, width)``, for the tokens ``(B, T)`` after those cached.

        With ``one_call``, products that follow one another are one call where that is faster, which
        takes weights that no mesh divides; as of ``jax_fp8.fused_chain``.
        """
        stream = Stream(self.embedding[...][tokens])
        rotation = self.config.rope.rotation(at.positions, self.config.head_dim, at.after)
        keys, values = [], []
        each = zip(self.blocks, cache.keys, cache.values, strict=True)
        for index, (block, k, v) in enumerate(each):
            following = self.blocks[index + 1] if index + 1 < len(self.blocks) else None
            stream, k, v = block(stream, rotation, k, v, at, following, one_call)
            keys.append(k)
            values.append(v)
        x = stream.x if stream.delta is None else stream.x + stream.delta
        h = rms_norm(x, self.norm[...], self.config.eps)
        return h, Cache(tuple(keys), tuple(values), at.after)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 ``(..., vocab_size)``."""
        if self.head is not None and self.head.scale is not None:
            return self.head(hidden).astype(jnp.float32)
        weight = self.embedding[...] if self.head is None else self.head.values
        return jnp.einsum("...k,nk->...n", hidden, weight, preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, in float32, in ``x``'s dtype."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


def norm(
    x: jax.Array, delta: jax.Array | None, weight: jax.Array, eps: float, reader: Any
) -> tuple[Any, jax.Array]:
    """(the RMSNorm of ``x + delta`` as ``reader`` takes it, ``x + delta``)."""
    options = reader.quantization(x)
    if options is None:
        x = x if delta is None else x + delta
        return rms_norm(x, weight, eps), x
    if delta is None:
        return jax_fp8.rms_norm_quantize(x, weight, eps=eps, **options), x
    quantized, x = jax_fp8.rms_norm_quantize(delta, weight, eps=eps, residual=x, **options)
    return quantized, x
