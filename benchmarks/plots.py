"""Pictures of results."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import tables

_COLORS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774")
_MARKS = "osD^v*"


def _log_m(axes: Any, values: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()


def _speedup(axes: Any, by_problem: dict[Any, tables.Group], fast: str) -> None:
    """Speedup over bf16 by M, a line for each layer."""
    layers = list(dict.fromkeys(key[1:] for key in by_problem))
    for i, layer in enumerate(layers):
        points = [
            (key[0], speedup)
            for key, group in by_problem.items()
            if key[1:] == layer and (speedup := tables.ratio(group, "bf16", fast)) is not None
        ]
        if points:
            axes.plot(
                *zip(*sorted(points), strict=True),
                marker=_MARKS[i % len(_MARKS)],
                color=_COLORS[i % len(_COLORS)],
                label=f"{layer[0]} x {layer[1]}",
            )
    _log_m(axes, sorted({key[0] for key in by_problem}))
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("M")
    axes.set_ylabel("times as fast as bf16")
    axes.set_title(f"FP8 ({fast}) over bf16")
    axes.legend(title="N x K", fontsize=8, title_fontsize=8)


def _roofline(axes: Any, rows: list[dict[str, Any]], fast: str) -> None:
    """TFLOP/s by operations a byte, under the best rates of this run."""
    names = (fast, "bf16", "f16")
    timed = [row for row in rows if row["variant"] in names and row.get("us")]
    if not timed:
        return
    # TFLOP/s over GB/s is thousands of operations a byte.
    intensity = [1e3 * row["tflop_per_s"] / row["gb_per_s"] for row in timed]
    low, high = min(intensity), max(intensity)
    grid = [low * (high / low) ** (i / 99) for i in range(100)]
    bytes_roof = max(row["gb_per_s"] for row in timed)
    for i, name in enumerate(names):
        points = [
            (x, row["tflop_per_s"])
            for x, row in zip(intensity, timed, strict=True)
            if row["variant"] == name
        ]
        if not points:
            continue
        x, rates = zip(*points, strict=True)
        label = tables.GEMM_NAMES[name]
        axes.plot(x, rates, _MARKS[i], color=_COLORS[i], label=label, alpha=0.8, markersize=5)
        roof = [min(1e-3 * bytes_roof * x, max(rates)) for x in grid]
        axes.plot(grid, roof, color=_COLORS[i], linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte (fewest bytes)")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("roofline (dashed: best rates seen in this run)")
    axes.legend(fontsize=8)


def _gemm(figure: Any, rows: list[dict[str, Any]]) -> None:
    by_problem = tables.groups(rows, ("m", "n", "k"))
    fast = "cublaslt" if any(row["variant"] == "cublaslt" for row in rows) else "naive"
    left, right = figure.subplots(1, 2)
    _speedup(left, by_problem, fast)
    _roofline(right, rows, fast)


def _quantize(figure: Any, rows: list[dict[str, Any]]) -> None:
    """GB/s, a group of bars for each shape."""
    by_shape = tables.groups(rows, ("rows", "columns"))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    axes = figure.subplots()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        rates = [tables.value(group, name, "gb_per_s") or 0 for group in by_shape.values()]
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(rates))]
        color = "0.75" if name == "copy" else _COLORS[i % len(_COLORS)]
        axes.bar(places, rates, width, label=name.replace("_", ", "), color=color)
    axes.set_xticks(range(len(by_shape)), [f"{r} x {c}" for r, c in by_shape])
    axes.set_ylabel("GB/s (input once and output once)")
    axes.set_title("bf16 to E4M3")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _accuracy(figure: Any, rows: list[dict[str, Any]]) -> None:
    """RMS error by K, a panel for each kind of data."""
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        for i, name in enumerate(names):
            points = [
                (row["k"], row["rms_error_over_rms"])
                for row in rows
                if row["data"] == kind and row["variant"] == name and not row.get("error")
            ]
            if points:
                style = {"marker": _MARKS[i % len(_MARKS)], "color": _COLORS[i % len(_COLORS)]}
                axes.plot(*zip(*points, strict=True), label=name.replace("_", ", "), **style)
        axes.set_yscale("log")
        _log_m(axes, sorted({row["k"] for row in rows}))
        axes.set_xlabel("K")
        axes.set_title(f"{kind} data")
    figure.axes[0].set_ylabel("RMS error / RMS of the product")
    figure.axes[-1].legend(fontsize=8)


#: Name of the results -> what draws them into a figure.
DRAWINGS = {"gemm": _gemm, "quantize": _quantize, "accuracy": _accuracy}


def draw(results: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    """Draws results, as ``results.read`` gives them, into a PNG at ``path``; returns the path."""
    if results["name"] not in DRAWINGS:
        raise ValueError(f"there is no picture of {results['name']!r}, only of {list(DRAWINGS)}")
    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    try:
        DRAWINGS[results["name"]](figure, results["rows"])
        figure.suptitle(results["environment"]["device"], fontsize=10)
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)
    return path
