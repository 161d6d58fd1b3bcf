"""The command ``jax-fp8 generate``."""

from __future__ import annotations

import argparse
import gc
import pathlib
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fp8.decoder.generate import Generator
from jax_fp8.decoder.load import load
from jax_fp8.decoder.measure import Speed, measure, warm_up
from jax_fp8.decoder.sampling import Sampling
from jax_fp8.decoder.score import Score, score
from jax_fp8.decoder.text import TextStream, read_tokenizer

DTYPES = ("bfloat16", "float16", "float32")
COMPARED = "rowwise"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    add("model", type=pathlib.Path, help="a folder of the Hugging Face hub, with tokenizer.json")
    add("prompts", nargs="+", metavar="prompt", help="what the text begins with; several: a batch")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="(%(default)s)")
    add("--recipe", help="quantizes a wide checkpoint: rowwise, tensorwise, blockwise, weight_only")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of what is wide (%(default)s)")
    add(
        "--ignore",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="stored tensors to leave out, such as '*.k_scale' of a cache in FP8",
    )
    add("--temperature", type=float, default=0.0, metavar="T", help="0: the most likely token")
    add("--top-k", type=int, default=0, metavar="K", help="of the K most likely tokens; 0: all")
    add("--top-p", type=float, default=1.0, metavar="P", help="of the most likely, up to P in all")
    add("--seed", type=int, default=0, help="of the sampling")
    add(
        "--compare",
        action="store_true",
        help="wide weights against FP8: speed, memory, and what each makes of --text",
    )
    add("--text", type=pathlib.Path, metavar="FILE", help="for --compare: perplexity, agreement")


def run(arguments: argparse.Namespace) -> int:
    """Writes, and tells on stderr how fast; with ``--compare`` prints a table."""
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    tokenizer = read_tokenizer(arguments.model)
    prompts = [tokenizer.encode(prompt).ids for prompt in arguments.prompts]
    if arguments.compare:
        text = arguments.text and tokenizer.encode(arguments.text.read_text()).ids
        print(_compare(arguments, prompts, sampling, text))
        return 0
    start = time.perf_counter()
    model = load(
        arguments.model,
        dtype=getattr(jnp, arguments.dtype),
        recipe=arguments.recipe,
        progress=sys.stderr.isatty(),
        ignore=arguments.ignore,
    )
    loaded = time.perf_counter()
    generator = _generator(model, prompts, arguments, sampling)
    warm_up(generator, prompts)
    compiled = time.perf_counter()
    printer = _Printer(tokenizer, arguments.prompts)
    speed = measure(model, generator, prompts, arguments.max_new_tokens, on_tokens=printer.add)
    printer.close()
    print(f"loading {loaded - start:.1f} s, compiling {compiled - loaded:.1f} s", file=sys.stderr)
    print(_said(speed), file=sys.stderr)
    return 0


class _Printer:
    """One text comes as it is written; of several, each when it has ended."""

    def __init__(self, tokenizer: Any, prompts: list[str]) -> None:
        self._streams = [TextStream(tokenizer) for _ in prompts]
        self._texts, self._open = list(prompts), set(range(len(prompts)))
        if len(prompts) == 1:
            print(prompts[0], end="", flush=True)

    def add(self, tokens: np.ndarray) -> None:
        for i, token in enumerate(tokens.tolist()):
            if token < 0:
                self._end(i)
                continue
            new = self._streams[i].add(token)
            self._texts[i] += new
            if len(self._texts) == 1:
                print(new, end="", flush=True)

    def close(self) -> None:
        for i in range(len(self._texts)):
            self._end(i)

    def _end(self, i: int) -> None:
        if i in self._open:
            self._open.remove(i)
            print("" if len(self._texts) == 1 else f"[{i}] {self._texts[i]}", flush=True)


def _generator(model: Any, prompts: Any, arguments: Any, sampling: Sampling) -> Generator:
    positions = max(map(len, prompts)) + arguments.max_new_tokens
    return Generator(model, positions=positions, sampling=sampling, seed=arguments.seed)


def _said(speed: Speed) -> str:
    said = (
        f"prefill {speed.prompt_tokens} tokens, {speed.prefill_rate:.0f} tokens/s;"
        f" decode {speed.new_tokens} tokens, {speed.decode_rate:.1f} tokens/s;"
        f" weights {speed.weight_bytes / 2**30:.2f} GiB, cache {speed.cache_bytes / 2**30:.2f} GiB"
    )
    if speed.peak_bytes is not None:
        said += f", peak {speed.peak_bytes / 2**30:.2f} GiB"
    return said


def _memory(speed: Speed) -> int:
    """Of all that writing takes on the device; where that is not told, of weights and cache."""
    return speed.used_bytes or speed.weight_bytes + speed.cache_bytes


def _compare(arguments: Any, prompts: Any, sampling: Sampling, text: Any) -> str:
    """A table: the wide model, and the FP8 one of the checkpoint or of the recipe."""
    dtype = getattr(jnp, arguments.dtype)
    rows: list[tuple[str, Speed, Score | None]] = []
    recipe = arguments.recipe
    for name in (arguments.dtype, "FP8"):
        model = load(
            arguments.model,
            dtype=dtype,
            recipe=recipe if name == "FP8" else None,
            dequantize=name != "FP8",
            progress=sys.stderr.isatty(),
            ignore=arguments.ignore,
        )
        if model.format is None:  # One in FP8 says itself how it is run, and takes no recipe.
            recipe = recipe or COMPARED
        generator = _generator(model, prompts, arguments, sampling)
        warm_up(generator, prompts)
        # To the end in each: how long a text gets must not depend on what it says.
        speed = measure(model, generator, prompts, arguments.max_new_tokens, eos=())
        rows.append((name, speed, score(model, text) if text else None))
        del model, generator
        gc.collect()  # A model has cycles, and its memory is not to count as the next one's.
    header = f"{'':10}{'prefill':>16}{'decode':>16}{'weights':>12}{'memory':>12}"
    lines = [header + (f"{'perplexity':>12}{'agreement':>12}" if text else "")]
    for name, speed, scored in rows:
        line = (
            f"{name:10}{speed.prefill_rate:>12.0f} t/s{speed.decode_rate:>12.1f} t/s"
            f"{speed.weight_bytes / 2**30:>8.2f} GiB{_memory(speed) / 2**30:>8.2f} GiB"
        )
        if scored is not None and rows[0][2] is not None:
            same = np.mean(scored.predictions == rows[0][2].predictions)
            line += f"{scored.perplexity:>12.3f}{100 * same:>10.1f} %"
        lines.append(line)
    return "\n".join(lines)
