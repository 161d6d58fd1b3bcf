"""Speed and memory of a model as it writes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_fp8.decoder.generate import Generator
from jax_fp8.decoder.model import Decoder


@dataclasses.dataclass(frozen=True)
class Speed:
    """What writing took.

    Attributes:
      prompt_tokens: of all prompts together.
      new_tokens: of all texts together, but for the first of each, which the prefill gives.
      prefill_s: seconds until the first token of each text.
      decode_s: seconds for the new tokens.
      weight_bytes: of the model.
      cache_bytes: of the keys and values.
      used_bytes: what the process has on the device as it writes, where that can be told.
      peak_bytes: the most that the process ever had on the device, where that can be told.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    weight_bytes: int
    cache_bytes: int
    used_bytes: int | None
    peak_bytes: int | None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_rate(self) -> float:
        """New tokens a second, of all texts together."""
        return self.new_tokens / self.decode_s if self.new_tokens else float("nan")


def weight_bytes(model: Decoder) -> int:
    """Bytes of a model's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def _memory_stats(model: Decoder) -> dict[str, int]:
    """Of its device, as XLA's allocator has them; a CPU has none."""
    return next(iter(model.embedding[...].devices())).memory_stats() or {}


def warm_up(generator: Generator, prompts: Sequence[Sequence[int]]) -> None:
    """Compiles both programs, and lets the products choose their algorithms."""
    room = generator.positions - max(map(len, prompts))
    for _ in generator.stream(prompts, min(2, room), eos=()):
        pass


def measure(
    model: Decoder,
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    eos: Sequence[int] | None = None,
    on_tokens: Callable[[np.ndarray], Any] = lambda tokens: None,
) -> Speed:
    """Writes up to ``count`` tokens behind each prompt and tells how fast that was.

    Args:
      model: of which the generator was made.
      generator: warmed up, unless the time to compile is to be part of it.
      prompts: tokens of each text.
      count: new tokens of each.
      eos: as of ``Generator.stream``.
      on_tokens: is called with each step's tokens.
    """
    new, stats = 0, dict[str, int]()
    start = first = time.perf_counter()
    for index, tokens in enumerate(generator.stream(prompts, count, eos=eos)):
        if index == 0:
            first = time.perf_counter()
            stats = _memory_stats(model)  # Here the cache is one of what there is.
        else:
            new += int((tokens >= 0).sum())
        on_tokens(tokens)
    end = time.perf_counter()
    c = model.config
    per_position = 2 * c.layers * c.kv_heads * c.head_dim * np.dtype(model.dtype).itemsize
    return Speed(
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=new,
        prefill_s=first - start,
        decode_s=end - first,
        weight_bytes=weight_bytes(model),
        cache_bytes=per_position * generator.positions * len(prompts),
        used_bytes=stats.get("bytes_in_use"),
        peak_bytes=_memory_stats(model).get("peak_bytes_in_use"),
    )
