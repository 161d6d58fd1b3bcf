"""Sampling: from logits to the next token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: 0 takes the most likely token; above, logits are divided by it.
      top_k: only so many of the most likely tokens; 0: all.
      top_p: only the most likely tokens that together have this probability (Holtzman et al., arXiv
        1904.09751); 1: all. At least one stays.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ValueError(f"Sampling: temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"Sampling: top_k must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must be in (0, 1], got {self.top_p}")


def sample(logits: jax.Array, key: jax.Array, how: Sampling) -> jax.Array:
    """Int32 ``(B,)``: a token for each row of the float32 logits ``(B, vocabulary)``."""
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / how.temperature
    if how.top_k and how.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, how.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if how.top_p < 1:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # What the more likely ones leave: the first token to reach top_p still counts.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < how.top_p, ordered, jnp.inf)
        logits = jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
