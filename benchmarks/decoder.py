"""A decoder of Llama 3 8B's shape with random weights: tokens a second, bf16 against FP8.

Both are the decoder of ``jax_fp8.decoder``, with the same attention. Steps are dispatched one
after the other, as when text is written, and timed on the host's clock, by turns.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import tables, targets

Row = dict[str, Any]
Timer = Callable[[], float]

NAME = "decoder"
KEYS = ("model", "phase", "batch", "tokens")
REFERENCE = "bf16"
BY_NAME = True
RECIPES = ("rowwise", "tensorwise")
ROUNDS = 5
#: Steps of a round, and how many tokens the texts have before them.
STEPS, PROMPT = 64, 128

LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
TINY = {
    **LLAMA_3_8B,
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
#: Model, (batch, steps) of the decoding and (batch, tokens) of the prefill.
SHAPES: dict[str, tuple[str, dict[str, Any], list[tuple[int, int]], list[tuple[int, int]]]] = {
    "smoke": ("tiny", TINY, [(2, 2)], [(1, 16)]),
    "quick": ("llama-3-8b", LLAMA_3_8B, [(1, STEPS)], []),
    "all": ("llama-3-8b", LLAMA_3_8B, [(1, STEPS), (16, STEPS)], [(1, 8192)]),
}


def run(shapes: str = "all") -> list[Row]:
    """Times steps and prefills; ``shapes`` is a key of SHAPES.

    Returns:
      A row for each problem and variant: ``us`` of a step or a prefill, ``tokens_per_s``,
      ``weight_bytes`` of the model, ``read_bytes`` of what a step reads of them and
      ``reading_us``, what that takes at the speed of a large copy, or None.
    """
    from jax_fp8 import decoder
    from jax_fp8.decoder.measure import weight_bytes

    name, config, steps, prefills = SHAPES[shapes]
    config = decoder.read_config(config)
    problems = [("decode", *p) for p in steps] + [("prefill", *p) for p in prefills]
    rows: list[Row] = []
    models: dict[str, Any] = {}
    facts: dict[str, Row] = {}
    recipes = RECIPES[:1] if shapes == "smoke" else RECIPES
    for variant in ("bf16", *recipes):
        model = decoder.random(config, recipe=None if variant == "bf16" else variant)
        total, read = weight_bytes(model), read_bytes(model)
        reading_us = targets.memory_us(read, jax.devices()[0].device_kind)
        facts[variant] = {"weight_bytes": total, "read_bytes": read, "reading_us": reading_us}
        models[variant] = model
    with tqdm(total=len(problems) * len(models), desc=NAME, unit="timing") as bar:
        for phase, batch, tokens in problems:
            key = {"model": name, "phase": phase, "batch": batch, "tokens": tokens}
            timers: dict[str, Timer] = {}
            failed: dict[str, Row] = {}
            for variant, model in models.items():
                try:
                    timers[variant] = _timer(model, phase, batch, tokens)
                    timers[variant]()  # Compiles, and chooses algorithms.
                except Exception as error:
                    timers.pop(variant, None)
                    failed[variant] = tables.failure(error)
            times: dict[str, list[float]] = {variant: [] for variant in timers}
            for _ in range(ROUNDS):
                for variant, timer in timers.items():
                    times[variant].append(timer())
            for variant in models:
                row = {**key, "variant": variant, **facts[variant]}
                if variant in failed:
                    row |= failed[variant]
                else:
                    us = 1e6 * statistics.median(times[variant])
                    each = batch * (1 if phase == "decode" else tokens)
                    row |= {"us": us, "tokens_per_s": 1e6 * each / us}
                rows.append(row)
                bar.update()
    return rows


def read_bytes(model: Any) -> int:
    """What a step reads of a model's weights: of the embedding no more than a few rows."""
    from jax_fp8.decoder.measure import weight_bytes

    return weight_bytes(model) - model.embedding[...].nbytes


def stepper(model: Any, batch: int, steps: int) -> Callable[[], tuple[Any, float]]:
    """A function that decodes: the last tokens, which may not be there yet, and when it began."""
    from jax_fp8 import decoder

    positions = PROMPT + steps
    generator = decoder.Generator(model, positions=positions)

    def decode() -> tuple[Any, float]:
        # What the texts say does not change the time: a cache of zeros saves compiling a prefill.
        cache = decoder.empty_cache(model.config, batch, positions, model.dtype)
        cache = dataclasses.replace(cache, lengths=jnp.full(batch, PROMPT, jnp.int32))
        written = decoder.Written(jnp.zeros(batch, jnp.int32), cache, jnp.int32(1))
        jax.block_until_ready(written)
        start = time.perf_counter()
        for _ in range(steps):
            token, written = generator.step(written)
        return token, start

    return decode


def _timer(model: Any, phase: str, batch: int, tokens: int) -> Timer:
    """Seconds of a step, the mean of so many, or of a prefill."""
    from jax_fp8 import decoder

    if phase == "decode":
        step = stepper(model, batch, tokens)

        def decode() -> float:
            token, start = step()
            jax.block_until_ready(token)
            return (time.perf_counter() - start) / tokens

        return decode
    rng = np.random.default_rng(0)
    generator = decoder.Generator(model, positions=2 * tokens)
    prompts = rng.integers(0, model.config.vocab_size, (batch, tokens)).tolist()

    def prefill() -> float:
        start = time.perf_counter()
        jax.block_until_ready(generator.prefill(prompts))
        return time.perf_counter() - start

    return prefill


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    lines = []
    for (_, phase, batch, tokens), group in tables.groups(rows, KEYS).items():
        for variant, row in group.items():
            us, other = row.get("us"), tables.ratio(group, "bf16", variant)
            reading_us = row.get("reading_us")
            is_known = us and reading_us and phase == "decode"
            share = 1 - reading_us / us if is_known else None
            lines.append(
                [
                    f"{phase} of {tokens} tokens" if phase == "prefill" else phase,
                    str(batch),
                    variant,
                    tables.number(us and us / 1e3),
                    tables.number(row.get("tokens_per_s"), "{:.0f}"),
                    tables.number(other, "{:.2f}"),
                    tables.number(row["weight_bytes"] / 1e9),
                    "-" if share is None else f"{100 * share:.0f} %",
                ]
            )
    model = next((row["model"] for row in rows), "")
    title = (
        f"{model} with random weights, head and embedding in bf16: ms of a step (a new token for"
        " each text of the batch) or of a prefill, and the share of a step that is not reading the"
        " weights at the speed of a large copy."
    )
    header = ["", "batch", "", "ms", "tokens/s", "of bf16", "weights, GB", "not reading"]
    parts = [title, tables.markdown(header, lines)]
    return tables.assemble(parts, tables.errors(rows, KEYS))
