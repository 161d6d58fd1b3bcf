"""The GPT of examples/gpt, in training: losses and step times of the recipes against bf16's."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import ROOT, tables

Row = dict[str, Any]

NAME = "gpt"
KEYS = ("preset", "width", "layers", "length", "batch", "steps", "seed", "unroll")
REFERENCE = "bf16"
FIGURES = ("step_ms", "validation_loss")
BY_NAME = True
_RECIPES = ("bf16", "rowwise", "tensorwise", "blockwise", "delayed", "static", "flax_direct")
_100M = ("bf16", "bf16_again", *_RECIPES[1:], "weight_only")
#: Presets, with the recipes and, where it is not the preset's, the number of steps.
SHAPES: dict[str, tuple[tuple[str, tuple[str, ...], int | None], ...]] = {
    "smoke": (("tiny", ("rowwise",), 4),),
    "quick": (("wide", _RECIPES[:3], 30),),
    "all": (
        ("wide", _RECIPES, None),
        ("100m", _100M, None),
    ),
}


def recipes(preset: str) -> list[str]:
    """What is trained in full to be compared with bf16."""
    names = next(names for name, names, _ in SHAPES["all"] if name == preset)
    return [name for name in names if not name.startswith(REFERENCE)]


def run(shapes: str = "all") -> list[Row]:
    """Trains; ``shapes`` is a key of SHAPES.

    Returns:
      A row for each problem and recipe, as ``examples/gpt/program.py`` makes it.
    """
    return [row for problem in SHAPES[shapes] for row in _rows(*problem)]


def _rows(preset: str, names: tuple[str, ...], steps: int | None) -> Iterator[Row]:
    examples = str(ROOT / "examples")
    if examples not in sys.path:
        sys.path.insert(0, examples)
    import dataclasses

    from gpt import program, train

    training = train.PRESETS[preset]
    if steps is not None:
        training = dataclasses.replace(training, steps=steps)
    yield from program.sweep(preset, training, names)


def speedup(row: Row) -> float | None:
    """How many times as fast as bf16's a step is, both timed in one process."""
    bf16, ours = row.get("bf16_step_ms"), row.get("step_ms")
    return bf16 / ours if bf16 and ours else None


def step_ratio(group: tables.Group, name: str, other: str) -> float | None:
    """The time of a step over another's, each over bf16's in its own process."""
    speeds = [speedup(group.get(variant, {})) for variant in (other, name)]
    return speeds[0] / speeds[1] if speeds[0] and speeds[1] else None


def off_percent(group: tables.Group, name: str, figure: str) -> float | None:
    """How much more than bf16's a loss is, in %."""
    bf16, ours = (tables.value(group, variant, figure) for variant in ("bf16", name))
    return 100 * (ours / bf16 - 1) if bf16 and ours else None


_AGAIN = " `bf16 again` starts from weights 2**-22 larger: what it is off is chance."


def _said(row: Row) -> str:
    return (
        f"{row['preset']}: {row['parameters'] / 1e6:.0f}M parameters, {row['layers']} layers of"
        f" width {row['width']}, steps of {row['tokens_per_step']} bytes,"
        f" {100 * row['dense_share']:.0f} % of the operations of all products in the layers that"
        " a recipe converts"
    )


def _lines(group: tables.Group) -> Iterator[list[str]]:
    number = tables.number
    for name, row in group.items():
        step, dense, temporary = row["step_ms"], row.get("dense_ms"), row.get("temporary_bytes")
        share = f" ({100 * dense / step:.0f} %)" if dense else ""
        yield [
            row["preset"],
            str(row["steps"]),
            str(row["seed"]),
            name.replace("_", " "),
            number(row["training_loss"], "{:.4f}"),
            number(row["validation_loss"], "{:.4f}"),
            number(off_percent(group, name, "validation_loss"), "{:+.2f} %"),
            number(step),
            number(speedup(row), "{:.2f}"),
            number(dense) + share,
            number(temporary and temporary / 2**30, "{:.2f}"),
        ]


def _means(groups: list[tables.Group]) -> Iterator[list[str]]:
    """Over the seeds of a problem: how much more than bf16's the losses are."""
    by_problem: dict[tuple[Any, ...], list[tables.Group]] = {}
    for group in groups:
        row = next(iter(group.values()))
        by_problem.setdefault(tuple(row[key] for key in KEYS if key != "seed"), []).append(group)
    for seeds in by_problem.values():
        for name in seeds[0]:
            if name == REFERENCE or len(seeds) == 1 or not all(name in group for group in seeds):
                continue
            found = [
                [off_percent(group, name, figure) for group in seeds]
                for figure in ("training_loss", "validation_loss")
            ]
            said = [
                f"{statistics.mean(off):+.2f} % ({min(off):+.2f} to {max(off):+.2f})"
                for off in found
            ]
            row = seeds[0][name]
            steps = str(row["steps"])
            yield [row["preset"], steps, name.replace("_", " "), str(len(seeds)), *said]


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    measured = [row for row in rows if row.get("step_ms") is not None]
    groups = list(tables.groups(measured, KEYS).values())
    problems = list(dict.fromkeys(_said(next(iter(group.values()))) for group in groups))
    again = any("bf16_again" in group for group in groups)
    title = (
        "A GPT on the bytes of Python's standard library, with the same weights and batches for"
        " each recipe. Losses in nats a byte: the mean over the last tenth of the steps, and of"
        f" files that are held out.{_AGAIN if again else ''} The median step in ms, how many times"
        " as fast as bf16's, the layers that a recipe converts alone (values and gradients; their"
        " share of the step), and"
        f" the GiB that XLA allocates for a step beside the state. {'; '.join(problems)}."
    )
    header = [
        "",
        "steps",
        "seed",
        "recipe",
        "training",
        "held out",
        "to bf16",
        "step",
        "speed",
        "layers",
    ]
    lines = [line for group in groups for line in _lines(group)]
    parts = [title, tables.markdown([*header, "GiB"], lines)]
    if means := list(_means(groups)):
        header = [
            "",
            "steps",
            "recipe",
            "seeds",
            "training loss to bf16's",
            "held-out loss to bf16's",
        ]
        parts.append("The mean over seeds, and from the least to the most:")
        parts.append(tables.markdown(header, means))
    return tables.assemble(parts, tables.errors(rows, KEYS))
