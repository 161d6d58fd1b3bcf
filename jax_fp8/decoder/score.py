"""What a model makes of a given text: its perplexity, its predictions, its activations."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_fp8.decoder.attention import Prompt
from jax_fp8.decoder.dense import Dense, Frozen
from jax_fp8.decoder.load import load
from jax_fp8.decoder.model import Decoder, empty_cache
from jax_fp8.decoder.text import read_tokenizer


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model says of a text, token by token but for the first of each window.

    Attributes:
      losses: float32, the negative logarithm of each token's probability, in nats.
      predictions: int32, the token that was the most likely.
    """

    losses: np.ndarray
    predictions: np.ndarray

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss."""
        return float(np.exp(self.losses.mean(dtype=np.float64)))


def score(model: Decoder, tokens: Sequence[int], *, window: int = 512) -> Score:
    """Scores a text in windows of so many tokens, each of which starts anew.

    Raises:
      ValueError: for a text of fewer than two tokens.
    """
    losses, predictions = [], []
    run = nnx.jit(_score)
    for row, length in zip(*_windows(tokens, window), strict=True):
        if length < 2:  # What is left over at the end.
            continue
        loss, predicted = run(model, row[None], jnp.array([length], jnp.int32))
        losses.append(np.asarray(loss)[0, : length - 1])
        predictions.append(np.asarray(predicted)[0, : length - 1])
    if not losses:
        raise ValueError("score: the text has fewer than two tokens")
    return Score(np.concatenate(losses), np.concatenate(predictions))


def _score(model: Decoder, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = _all_logits(model, tokens, lengths)[:, :-1]
    chances = jax.nn.log_softmax(logits)
    losses = -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1)[..., 0]
    return losses, jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _all_logits(model: Decoder, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    batch, size = tokens.shape
    cache = empty_cache(model.config, batch, size, model.dtype)
    hidden, _ = model.hidden(tokens, cache, Prompt(lengths, size))
    return model.logits(hidden)


def _windows(tokens: Sequence[int], window: int) -> tuple[np.ndarray, list[int]]:
    """The text in rows of ``window``, the last padded, and the lengths of the rows."""
    count = -(-len(tokens) // window)
    rows = np.zeros((count, window), np.int32)
    rows.reshape(-1)[: len(tokens)] = tokens
    return rows, [min(window, len(tokens) - i * window) for i in range(count)]


def calibrate(
    folder: str | pathlib.Path,
    text: str,
    *,
    dtype: Any = jnp.bfloat16,
    window: int = 512,
    progress: bool = False,
) -> dict[str, float]:
    """The amax of each linear layer's input over a text, by the layer's name in the checkpoint.

    Args:
      folder: a wide checkpoint with its tokenizer.
      text: what the model will be given, or is like it.
      dtype: that the model runs in.
      window: tokens that go through at once; each window starts anew.
      progress: shows a bar.

    Raises:
      ValueError: for an empty text, and where an amax is not finite.
    """
    tokens = read_tokenizer(folder).encode(text).ids
    if not tokens:
        raise ValueError("calibrate: the text is empty")
    model = load(folder, dtype=dtype, progress=progress)
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Dense)]
    for dense in layers:
        dense.amax = nnx.data(Frozen(jnp.zeros((), jnp.float32)))
    run = nnx.jit(lambda model, *operands: _all_logits(model, *operands)[0, 0, 0])
    rows, lengths = _windows(tokens, window)
    if progress:
        from tqdm import tqdm

        rows = tqdm(rows, desc="calibrating", unit="window")
    for row, length in zip(rows, lengths, strict=True):
        # Only what is there: padding is no part of the text.
        run(model, row[None, :length], jnp.array([length], jnp.int32))
    found = {}
    for dense in layers:
        found.update(dict.fromkeys(dense.names, float(dense.amax[...])))
    bad = [name for name, amax in found.items() if not np.isfinite(amax)]
    if bad:
        raise ValueError(f"calibrate: the input of {bad[0]} is not finite")
    return found
