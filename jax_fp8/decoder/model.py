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
        products: tuple[Any, ...] = qkv, o, gate_up, down  # Any: a Parallel has no `fused`.
        self.qkv, self.o, self.gate_up, self.down = products
        q_norm, k_norm = (None, None) if qk_norms is None else map(Frozen, qk_norms)
        self.q_norm: Any = nnx.data(q_norm)
        self.k_norm: Any = nnx.data(k_norm)

    def __call__(
        self, x: jax.Array, delta: jax.Array | None, rotation: Any, keys: Any, values: Any, at: Any
    ) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
        """One step down the residual stream.

        Args:
          x: ``(B, T, width)``, the stream without ``delta``.
          delta: what the block before adds to it, so that the norm can do it; None: nothing.
          rotation: of the rotary embedding.
          keys: of this layer's cache.
          values: likewise.
          at: how queries find what they attend to, a ``Prompt`` or a ``Step``.

        Returns:
          (x, delta, keys, values).
        """
        c, dtype = self.config, x.dtype
        # With few rows each product is one call with the norm before it and what comes after it.
        is_fused = all(product.fuses(x, norm=True) for product in (self.qkv, self.gate_up))
        is_fused = is_fused and self.o.fuses(x) and self.down.fuses(x)
        norms = self.attention_norm[...], self.mlp_norm[...]
        if is_fused:
            x = x if delta is None else x + delta
            qkv = self.qkv.fused(x, norm=norms[0], eps=c.eps)
        else:
            h, x = norm(x, delta, norms[0], c.eps, self.qkv)
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
        if is_fused:
            x = self.o.fused(attended, residual=x)
            h = self.gate_up.fused(x, norm=norms[1], eps=c.eps, activation="swiglu")
            return self.down.fused(h, residual=x), None, keys, values
        h, x = norm(x, self.o(attended), norms[1], c.eps, self.gate_up)
        gate_up = self.gate_up(h, dtype)
        options = self.down.quantization(gate_up)
        if options is None:
            gate, up = jnp.split(gate_up, 2, axis=-1)
            delta = self.down(jax.nn.silu(gate) * up)
        else:
            delta = self.down(jax_fp8.swiglu_quantize(gate_up, **options), dtype)
        return x, delta, keys, values


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

    def hidden(self, tokens: jax.Array, cache: Cache, at: Any) -> tuple[jax.Array, Cache]:
        """What the head reads, ``(B, T, width)``, for the tokens ``(B, T)`` after those cached."""
        x, delta = self.embedding[...][tokens], None
        rotation = self.config.rope.rotation(at.positions, self.config.head_dim, at.after)
        keys, values = [], []
        for block, k, v in zip(self.blocks, cache.keys, cache.values, strict=True):
            x, delta, k, v = block(x, delta, rotation, k, v, at)
            keys.append(k)
            values.append(v)
        x = x if delta is None else x + delta
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
