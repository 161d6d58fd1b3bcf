"""Where new tokens stand in a batch of texts, and what they attend to."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Whole texts: ``(B, T)`` tokens, padded on the right, before which nothing is cached.

    Attributes:
      lengths: int32 ``(B,)``, tokens that are not padding.
      size: T.
    """

    lengths: Any
    size: int

    @property
    def positions(self) -> jax.Array:
        """Of the tokens, int32 ``(1, T)``."""
        return jnp.arange(self.size)[None]

    @property
    def after(self) -> Any:
        """The lengths of the texts with these tokens."""
        return self.lengths

    def write(self, cache: jax.Array, new: jax.Array) -> jax.Array:
        """The cache with the new keys or values."""
        return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0, 0, 0, 0))

    def attend(self, q: Any, k: Any, v: Any, keys: Any, values: Any, window: int | None) -> Any:
        """Causal attention among the new tokens, ``(B, T, heads, head_dim)``."""
        return _attention(
            q,
            k,
            v,
            is_causal=True,
            query_seq_lengths=self.lengths,
            key_value_seq_lengths=self.lengths,
            local_window_size=None if window is None else (window - 1, 0),
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """One more token for each text, ``(B, 1)``.

    Attributes:
      lengths: int32 ``(B,)``, of the texts before it.
    """

    lengths: Any

    @property
    def positions(self) -> Any:
        """Of the tokens, int32 ``(B, 1)``."""
        return self.lengths[:, None]

    @property
    def after(self) -> Any:
        """The lengths of the texts with this token."""
        return self.lengths + 1

    def write(self, cache: jax.Array, new: jax.Array) -> jax.Array:
        """The cache with the new keys or values."""
        if len(cache) == 1:  # One copy, where a scatter would also look whether it is inside.
            start = (0, self.lengths[0], 0, 0)
            return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), start)
        at = jnp.arange(len(cache)), self.lengths
        return cache.at[at].set(new[:, 0].astype(cache.dtype), mode="drop", unique_indices=True)

    def attend(self, q: Any, k: Any, v: Any, keys: Any, values: Any, window: int | None) -> Any:
        """Attention to all that is cached, ``(B, 1, heads, head_dim)``."""
        mask = None
        if window is not None:
            oldest = self.lengths[:, None] - window
            mask = (jnp.arange(keys.shape[1])[None] > oldest)[:, None, None]
        return _attention(q, keys, values, mask=mask, key_value_seq_lengths=self.after)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    # cuDNN takes heads of 16 bits, in multiples of 8, up to 128 wide, from Ampere on.
    fits = q.dtype != jnp.float32 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    device = getattr(jax.config, "jax_default_device", None)
    if not isinstance(device, jax.Device):
        device = jax.devices(device)[0]
    on_gpu = float(getattr(device, "compute_capability", 0.0)) >= 8.0
    return jax.nn.dot_product_attention(
        q,
        k.astype(q.dtype),
        v.astype(q.dtype),
        implementation="cudnn" if fits and on_gpu else "xla",
        **options,
    )
