"""Generation: a batch of prompts goes through at once, then one token of each at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_fp8.decoder.attention import Prompt, Step
from jax_fp8.decoder.model import Cache, Decoder, empty_cache
from jax_fp8.decoder.sampling import Sampling, sample

#: Prompts are padded to a multiple of this, so that few lengths are compiled.
BUCKET = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """A batch of texts as far as they are written.

    Attributes:
      token: the last of each, int32 ``(B,)``, which is not in the cache yet.
      cache: of those before.
      count: how many tokens are new, int32.
    """

    token: Any
    cache: Cache
    count: Any


_copy = jax.jit(jnp.copy)


class Generator:
    """A model's two programs: for whole prompts, and for one more token.

    Args:
      model: the model; its weights are taken as they are now.
      positions: how long a text can get, the prompt included.
      sampling: how tokens are chosen; None: the most likely ones.
      seed: of that.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        positions: int,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        most = model.config.max_length
        if model.config.rope.kind == "dynamic":  # Which stretches what the model was made for.
            most = int(most * model.config.rope.factor)
        if positions > most:
            raise ValueError(f"Generator: the model is made for {most} positions, got {positions}")
        self.config, self.positions, self.dtype = model.config, positions, model.dtype
        how = sampling or Sampling()
        graph, state = nnx.split(model)
        # A flat list, which costs the host less to pass than nnx's tree.
        self._weights, structure = jax.tree.flatten(state)
        self._key = jax.random.key(seed)
        on_devices = [weight for weight in self._weights if isinstance(weight, jax.Array)]
        one_call = all(weight.sharding.is_fully_replicated for weight in on_devices)

        def whole(weights: list[Any]) -> Decoder:
            merged: Decoder = nnx.merge(graph, jax.tree.unflatten(structure, weights))
            return merged

        def choose(
            model: Decoder, hidden: jax.Array, cache: Cache, key: jax.Array, count: Any
        ) -> Written:
            logits = model.logits(hidden)
            token = sample(logits, jax.random.fold_in(key, count), how)
            # NaN has no most likely token: -1 says so to the host.
            token = jnp.where(jnp.isnan(logits).any(axis=-1), -1, token)
            return Written(token, cache, count + 1)

        @jax.jit
        def prefill(weights: list[Any], tokens: Any, lengths: Any, key: Any) -> Written:
            model = whole(weights)
            # Here, and not before: so many arrays take the host longer than the GPU.
            cache = empty_cache(self.config, tokens.shape[0], positions, self.dtype)
            at = Prompt(lengths, tokens.shape[1])
            hidden, cache = model.hidden(tokens, cache, at, one_call=one_call)
            last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
            return choose(model, last, cache, key, jnp.int32(0))

        # All of it is donated, and there is no other result, so that a step finds its buffers where
        # they were the last time: else XLA would write all of its CUDA graph anew for each step,
        # and the GPU would wait for that.
        @functools.partial(jax.jit, donate_argnames="written")
        def step(weights: list[Any], written: Written, key: Any) -> Written:
            model, cache = whole(weights), written.cache
            at = Step(cache.lengths)
            hidden, cache = model.hidden(written.token[:, None], cache, at, one_call=one_call)
            return choose(model, hidden[:, 0], cache, key, written.count)

        self._prefill, self._step = prefill, step

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[jax.Array, Written]:
        """The token after each prompt, int32 ``(B,)``, and the texts with it."""
        tokens, lengths = self._padded(prompts)
        written = self._prefill(self._weights, tokens, lengths, self._key)
        return _copy(written.token), written

    def step(self, written: Written) -> tuple[jax.Array, Written]:
        """The next token of each text, and the texts with it; ``written`` is used up.

        There must be a position left for it: no step looks at that, ``stream`` does beforehand.
        """
        written = self._step(self._weights, written, self._key)
        return _copy(written.token), written

    def stream(
        self, prompts: Sequence[Sequence[int]], count: int, *, eos: Sequence[int] | None = None
    ) -> Iterator[np.ndarray]:
        """Goes on with the prompts.

        Args:
          prompts: tokens of each text.
          count: new tokens of each, at most.
          eos: the tokens that end a text; None: those of the model.

        Yields:
          The next token of each text, int32 ``(B,)``; -1 for a text that has ended.

        Raises:
          ValueError: for prompts that are empty, too long for ``positions``, or of other tokens.
          FloatingPointError: when logits are NaN.
        """
        if count < 1:
            raise ValueError(f"Generator.stream: count must be >= 1, got {count}")
        longest = max(map(len, prompts), default=0) + count
        if longest > self.positions:
            raise ValueError(
                f"Generator.stream: prompt and new tokens are {longest}, and there are"
                f" {self.positions} positions"
            )
        ends = np.asarray(self.config.eos if eos is None else eos, np.int32)
        token, written = self.prefill(prompts)
        ended = np.zeros(len(prompts), bool)
        for index in range(1, count + 1):
            found = token
            if index < count:  # Under way before the host waits for this one.
                token, written = self.step(written)
            new = np.asarray(found)
            if (new[~ended] < 0).any():
                raise FloatingPointError("Generator.stream: the logits are NaN")
            yield np.where(ended, -1, new)
            ended |= np.isin(new, ends)
            if ended.all():
                return

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        if not len(lengths) or not lengths.all():
            raise ValueError("Generator: each prompt needs a token, and there must be a prompt")
        size = min(-(-int(lengths.max()) // BUCKET) * BUCKET, self.positions)
        if lengths.max() > size:
            raise ValueError(
                f"Generator: a prompt has {lengths.max()} tokens, and there are {self.positions}"
                " positions"
            )
        tokens = np.zeros((len(prompts), size), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(
                f"Generator: tokens must be from 0 to {self.config.vocab_size - 1}, got"
                f" {tokens.min()} to {tokens.max()}"
            )
        return tokens, lengths
