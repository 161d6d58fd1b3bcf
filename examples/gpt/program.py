"""Trains a GPT of 100M parameters on Python's own sources, in bf16 and with each recipe.

    python examples/gpt                   # 1,000 steps with each recipe, on a GPU
    python examples/gpt --preset wide     # 4096 wide, two layers: for its speed
    python examples/gpt --preset tiny     # anywhere

The results, a table and a picture of the loss curves are written after each recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import pathlib
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from benchmarks import gpt as report
from benchmarks import plots, results, tables
from gpt import data, recipes
from gpt.train import PRESETS, Training, dense_share, time_steps, train

Row = dict[str, Any]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python examples/gpt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default="100m", help="what the options below change")
    add("--recipes", default=",".join(recipes.DEFAULT), help=", ".join(recipes.NAMES))
    add("--steps", type=int)
    add("--layers", type=int)
    add("--width", type=int, help="the hidden width and the heads go with it")
    add("--batch", type=int, help="sequences in a step")
    add("--length", type=int, help="bytes of a sequence")
    add("--unroll", type=int, help="layers in one turn of the loop over them")
    add("--attention", choices=("cudnn", "xla"), help="cuDNN's on a GPU, if not given")
    add("--seed", type=int, help="of the weights and the batches")
    add("--devices", type=int, help="that share the batch (1)")
    add("--out", type=pathlib.Path, default=pathlib.Path("out"), metavar="DIR")
    add("--alone", metavar="NAME,...", help="recipes whose layers are timed alone too (all)")
    add("--resume", action="store_true", help="leave out the recipes that DIR has results of")
    options = parser.parse_args(arguments)
    options.recipes = options.recipes.split(",")
    options.alone = options.alone and options.alone.split(",")
    if unknown := sorted({*options.recipes, *(options.alone or ())} - set(recipes.NAMES)):
        parser.error(f"no recipe {', '.join(unknown)}")
    return options


def _training(options: argparse.Namespace) -> Training:
    """The preset with what the command line changes of it."""
    training = PRESETS[options.preset]

    def given(*names: str) -> dict[str, Any]:
        return {n: value for n in names if (value := getattr(options, n)) is not None}

    config = dataclasses.replace(
        training.config, **given("layers", "width", "length", "unroll", "attention")
    )
    if options.width is not None:
        hidden = -(-8 * options.width // (3 * 128)) * 128
        size = 128 if options.width >= 2048 else 64 if options.width >= 256 else 32
        config = dataclasses.replace(config, hidden=hidden, heads=max(1, options.width // size))
    return dataclasses.replace(
        training, config=config, **given("steps", "batch", "seed", "devices")
    )


def describe(preset: str, training: Training) -> Row:
    """What tells the problem in a row, and more of it."""
    config = training.config
    return {
        "preset": preset,
        **{name: getattr(config, name) for name in ("width", "layers", "length")},
        **{name: getattr(training, name) for name in ("batch", "steps", "seed")},
        "report": training.report,
        "devices": training.devices,
        "unroll": config.unroll,
        "attention": config.kernel,
        "tokens_per_step": training.batch * config.length,
        "dense_share": dense_share(training),
    }


def sweep(
    preset: str,
    training: Training,
    names: Sequence[str],
    bf16_is_known: bool = False,
    alone: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Trains with one recipe after the other; a row for each as it ends, with its ``variant``.

    The dense layers of those in ``alone`` (None: of all) are timed alone too, for which XLA may
    compile longer than for the step. Where bf16 is not among them but known from before, its step
    is timed again first: speeds are compared on one card and in one process.
    """
    corpus = data.load()
    bf16_ms = None
    if bf16_is_known and "bf16" not in names and names:
        bf16_ms = time_steps(training, "bf16", corpus)
    for name in names:
        row = {**describe(preset, training), "variant": name, "corpus": corpus.facts}
        start = time.perf_counter()
        try:
            row |= train(training, name, corpus, alone is None or name in alone)
            bf16_ms = row["step_ms"] if name == "bf16" else bf16_ms
        except Exception as error:  # The others are still trained.
            traceback.print_exc()
            row |= tables.failure(error)
        gc.collect()  # A model has cycles, and holds its weights until it goes.
        device = jax.devices()[0].device_kind
        yield row | {
            "bf16_step_ms": bf16_ms,
            "seconds": round(time.perf_counter() - start, 1),
            "device": device,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a recipe failed."""
    options = _parse(arguments)
    training = _training(options)
    path = results.path_of(report.NAME, options.out)
    rows: list[Row] = results.read(path)["rows"] if path.exists() else []

    def same(row: Row) -> bool:
        problem = describe(options.preset, training)
        return all(row[key] == problem[key] for key in report.KEYS)

    def keeps(row: Row) -> bool:
        if not same(row):
            return True
        return options.resume and not row.get("error")

    rows = [row for row in rows if keeps(row)]
    done = [row["variant"] for row in rows if same(row)]
    todo = [name for name in options.recipes if name not in done]
    failed = False
    for row in sweep(options.preset, training, todo, "bf16" in done, options.alone):
        rows.append(row)
        failed |= bool(row.get("error"))
        results.write(report.NAME, rows, report.table, options.out)
        plots.draw(results.read(path), path.with_suffix(".png"))
    if rows:
        print(f"\n{report.table(rows)}\n\n{path}, and .md and .png beside it", flush=True)
    return int(failed)
