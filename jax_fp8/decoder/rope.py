"""Rotary position embedding (Su et al., arXiv 2104.09864) and the ways to stretch it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model.

    Attributes:
      kind: one of KINDS.
      theta: the base of the wavelengths.
      factor: how much longer texts are than those the model was first trained on.
      original_length: how long those were.
      low: llama3: ``low_freq_factor``; yarn: ``beta_slow``.
      high: llama3: ``high_freq_factor``; yarn: ``beta_fast``.
      attention_factor: yarn: of the cosines and sines.
      truncate: yarn: whether the range of dimensions is rounded to whole ones.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 0
    low: float = 1.0
    high: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def inverse_frequencies(self, dim: int, length: Any) -> Any:
        """Radians a position, float32 ``(dim / 2,)``; ``length`` is that of the text so far."""
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        if self.kind == "dynamic":
            # The base grows with the text, once it is longer than the model was made for.
            longest = jnp.maximum(length, self.original_length).astype(jnp.float32)
            stretch = self.factor * longest / self.original_length - (self.factor - 1)
            return 1.0 / (self.theta * stretch ** (dim / (dim - 2))) ** exponents
        plain = (1.0 / self.theta**exponents).astype(np.float32)
        if self.kind == "linear":
            return plain / np.float32(self.factor)
        if self.kind == "llama3":
            return self._llama3(plain)
        return self._yarn(plain, dim) if self.kind == "yarn" else plain

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        """Long waves are stretched, short ones kept, those between interpolated."""
        turns = self.original_length * plain / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return (plain * (kept + (1 - kept) / self.factor)).astype(np.float32)

    def _yarn(self, plain: np.ndarray, dim: int) -> np.ndarray:
        """As above, linearly in the dimension (Peng et al., arXiv 2309.00071)."""

        def dimension(turns: float) -> float:
            wave = self.original_length / (turns * 2 * math.pi)
            return dim * math.log(wave) / (2 * math.log(self.theta))

        first, last = dimension(self.high), dimension(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        ramp = (np.arange(dim // 2) - first) / max(last - first, 1e-3)
        kept = 1 - np.clip(ramp, 0.0, 1.0)
        return (plain * (kept + (1 - kept) / self.factor)).astype(np.float32)

    def rotation(
        self, positions: jax.Array, dim: int, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines, float32 ``(..., T, 1, dim / 2)``, of positions ``(..., T)``.

        ``lengths`` are those of the texts so far, of which the longest tells how far "dynamic"
        stretches them all.
        """
        frequencies = self.inverse_frequencies(dim, jnp.max(lengths))
        angles = positions[..., None, None].astype(jnp.float32) * frequencies
        return self.attention_factor * jnp.cos(angles), self.attention_factor * jnp.sin(angles)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates ``(..., T, heads, dim)``: the first half of each head against the second."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def is_positive(value: Any) -> TypeGuard[float]:
    """Whether it is a number above 0 that float32 holds."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 < value <= float(np.finfo(np.float32).max)
    )


def read_rope(fields: Any, max_length: int) -> Rope:
    """Reads ``rope_parameters``, or ``rope_theta`` and ``rope_scaling``, of a config.json."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ValueError(f"config.json: rope_scaling must be an object, got {given!r}")
    if any(isinstance(value, dict) for value in given.values()):
        raise NotImplementedError(f"config.json: a rope of its own for each kind of layer: {given}")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError("config.json: partial_rotary_factor other than 1")
    given = {"rope_theta": fields.get("rope_theta", 10000.0), **given}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in KINDS:
        raise NotImplementedError(f"config.json: rope_type {kind!r}; accepted are {KINDS}")

    def number(name: str, default: float | None = None) -> float:
        value = given.get(name)
        value = default if value is None else value
        if not is_positive(value):
            raise ValueError(
                f"config.json: {name} of the rope_type {kind!r} must be a number > 0, got {value!r}"
            )
        return float(value)

    theta = number("rope_theta")
    if kind == "default":
        return Rope(theta=theta)
    original = int(number("original_max_position_embeddings", max_length))
    factor = number("factor", max_length / original if kind == "yarn" else None)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if not low < high:
            raise ValueError(f"config.json: low_freq_factor {low} is not below {high}")
        return Rope(kind, theta, factor, original, low, high)
    if kind == "yarn":
        low, high = number("beta_slow", 1), number("beta_fast", 32)
        attention = number("attention_factor", _yarn_attention(factor, given))
        truncate = bool(given.get("truncate", True))
        return Rope(kind, theta, factor, original, low, high, attention, truncate)
    return Rope(kind, theta, factor, max_length)  # Which is what "dynamic" goes by.


def _yarn_attention(factor: float, given: dict[str, Any]) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    both = given.get("mscale"), given.get("mscale_all_dim")
    return scale(both[0]) / scale(both[1]) if both[0] and both[1] else scale(1.0)
