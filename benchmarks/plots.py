"""Pictures of results."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import gpt, roofline, tables

_COLORS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774")
_MARKS = "osD^v*"


def _log_m(axes: Any, values: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()


def _lines(axes: Any, points: dict[str, list[tuple[float, float]]], **style: Any) -> None:
    """A line for each name, with a colour and a mark of its own."""
    for i, (name, found) in enumerate(points.items()):
        if found:
            axes.plot(
                *zip(*sorted(found), strict=True),
                marker=_MARKS[i % len(_MARKS)],
                color=_COLORS[i % len(_COLORS)],
                label=name,
                **style,
            )


def _speedup(axes: Any, by_problem: dict[Any, tables.Group], fast: str, title: str) -> None:
    """Speedup over bf16 by M, a line for each layer."""
    points: dict[str, list[tuple[float, float]]] = {}
    for (m, n, k), group in by_problem.items():
        over = tables.ratio(group, "bf16", fast)
        if over is not None:
            points.setdefault(f"{n} x {k}", []).append((m, over))
    _lines(axes, points)
    _log_m(axes, sorted({key[0] for key in by_problem}))
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("M")
    axes.set_ylabel("times as fast as bf16")
    axes.set_title(title)
    axes.legend(title="N x K", fontsize=8, title_fontsize=8)


def _gemm(figure: Any, rows: list[dict[str, Any]]) -> None:
    by_problem = tables.groups(rows, ("m", "n", "k"))
    left, right = figure.subplots(1, 2, sharey=True)
    _speedup(left, by_problem, "fp8", "product, tensor scales")
    _speedup(right, by_problem, "fp8_row", "product, row scales")


def _peers(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Speedup over bf16, a group of bars for each shape; pale where XLA did not run FP8."""
    by_problem = tables.groups(rows, ("m", "n", "k"))
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != "bf16"]
    axes = figure.subplots()
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        for j, group in enumerate(by_problem.values()):
            over = tables.ratio(group, "bf16", name)
            if over is None:
                continue
            axes.bar(
                j + (i - (len(names) - 1) / 2) * width,
                over,
                width,
                color=plt.get_cmap("tab20")(i % 20),
                alpha=1.0 if group[name].get("fp8", True) else 0.4,
                hatch=None if group[name].get("fp8", True) else "//",
            )
        axes.bar(0, 0, 0, color=plt.get_cmap("tab20")(i % 20), label=name.replace("_", " "))
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set_xticks(range(len(by_problem)), [" x ".join(map(str, key)) for key in by_problem])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("times as fast as bf16")
    axes.set_title("bf16 in and out, dynamic activations (hatched: it did not run in FP8)")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _mlp(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Speedup over bf16 by M, and the time over that of reading the weights."""
    by_m = tables.groups(rows, ("m",))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    left, right = figure.subplots(1, 2)
    over = {
        name: [(m, x) for (m,), g in by_m.items() if (x := tables.ratio(g, "bf16", name))]
        for name in names
    }
    times = {
        name: [(m, x) for (m,), g in by_m.items() if (x := tables.value(g, name))] for name in names
    }
    _lines(left, over)
    _lines(right, times)
    for axes in (left, right):
        _log_m(axes, [m for (m,) in by_m])
        axes.set_xlabel("M")
    left.set_ylim(bottom=0)
    left.set_ylabel("times as fast as bf16")
    right.set_yscale("log")
    right.set_ylabel("us")
    right.legend(fontsize=8)
    left.set_title("MLP block of Llama 3 8B")


def _weight_only(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Time over bf16's by M, a panel for each layer; errors in the legend."""
    by_problem = tables.groups(rows, ("m", "n", "k"))
    layers = list(dict.fromkeys(key[1:] for key in by_problem))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axes, layer in zip(panels, layers, strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for name in names:
            errors = [r["rms_error"] for r in rows if r["variant"] == name and "rms_error" in r]
            label = f"{name}, error {max(errors):.1e}" if errors else name
            points[label] = [
                (key[0], over)
                for key, group in by_problem.items()
                if key[1:] == layer and (over := tables.ratio(group, "bf16", name)) is not None
            ]
        _lines(axes, points)
        _log_m(axes, sorted({key[0] for key in by_problem}))
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlabel("M")
        axes.set_title(f"N x K = {layer[0]} x {layer[1]}")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("times as fast as bf16")
    panels[-1].legend(fontsize=8)


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


def _gpt(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Loss curves of one problem, and each against bf16's on the same batches.

    Of those that were trained for 1,000 steps or, where there is none, for the most: the one with
    the most recipes.
    """

    def rank(group: tables.Group) -> tuple[int, int]:
        return min(next(iter(group.values()))["steps"], 1000), len(group)

    groups = tables.groups([r for r in rows if r.get("step_ms")], gpt.KEYS).values()
    group = max(groups, key=rank, default={})
    left, right = figure.subplots(1, 2)
    wide = group.get("bf16")
    for i, (name, row) in enumerate(group.items()):
        color = plt.get_cmap("tab10")(i % 10)
        steps = [min((j + 1) * row["report"], row["steps"]) for j in range(len(row["losses"]))]
        label = f"{name.replace('_', ' ')}, {row['step_ms']:.3g} ms a step"
        left.plot(steps, row["losses"], color=color, linewidth=1, label=label)
        left.plot(row["validated_at"], row["validation_losses"], "o", color=color, markersize=3)
        if wide is not None and row is not wide:
            off = [100 * (a / b - 1) for a, b in zip(row["losses"], wide["losses"], strict=True)]
            right.plot(steps, off, color=color, linewidth=1)
    for axes in (left, right):
        axes.set_xlabel("steps")
    left.set_ylabel("nats a byte (points: held out)")
    left.legend(fontsize=7)
    right.axhline(0, color="0.6", linewidth=1)
    right.set_ylabel("% over bf16's loss on the same batches")
    if group:
        left.set_title(f"GPT {next(iter(group.values()))['preset']}, loss", fontsize=9)


#: Name of the results -> what draws them into a figure.
DRAWINGS = {
    "gemm": _gemm,
    "peers": _peers,
    "mlp": _mlp,
    "weight_only": _weight_only,
    "quantize": _quantize,
    "accuracy": _accuracy,
    "gpt": _gpt,
}


def _save(drawing: Callable[[Any], None], title: str, path: pathlib.Path) -> pathlib.Path:
    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    try:
        drawing(figure)
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)
    return path


def draw(results: dict[str, Any], path: pathlib.Path) -> pathlib.Path | None:
    """Draws results, as ``results.read`` gives them, into a PNG at ``path``.

    Returns:
      The path; None where there is no picture of such results.
    """
    drawing = DRAWINGS.get(results["name"])
    if drawing is None:
        return None
    title = results["environment"]["device"]
    return _save(lambda figure: drawing(figure, results["rows"]), title, path)


def draw_roofline(found: dict[str, dict[str, Any]], path: pathlib.Path) -> pathlib.Path | None:
    """Draws every kernel of several results against the ceilings that were measured.

    Args:
      found: name -> results; "ceilings" must be among them, and "gemm", "quantize" and others
        with ``gb_per_s`` in their rows give the kernels.
      path: of the PNG.

    Returns:
      The path; None where the ceilings are missing.
    """
    ceilings, points = roofline.ceilings(found), roofline.points(found)
    if "copy" not in ceilings or not points:
        return None
    title = f"{found['ceilings']['environment']['device']}: against the ceilings measured"
    return _save(lambda figure: _roofline(figure, points, ceilings), title, path)


def _style(i: int) -> dict[str, Any]:
    return {"marker": _MARKS[i // 10 % len(_MARKS)], "color": plt.get_cmap("tab10")(i % 10)}


def _roofline(figure: Any, points: list[roofline.Point], ceilings: dict[str, float]) -> None:
    """Rates by operations a byte, and the share of what the ceilings allow by kernel."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    low, high = 1.0, 1e4
    for i, (name, group) in enumerate(roofline.by_kernel(points).items()):
        rated = [point for point in group if point.tflop_per_s]
        if rated:
            x, y = zip(*((point.intensity, point.tflop_per_s) for point in rated), strict=True)
            left.plot(x, y, label=name, linestyle="", alpha=0.8, markersize=4, **_style(i))
            low, high = min(low, *x), max(high, *x)
        shares = [100 * roofline.share(point, ceilings) for point in group]
        right.plot(shares, [i] * len(shares), linestyle="", alpha=0.6, **_style(i))
    grid = [low * (high / low) ** (i / 99) for i in range(100)]
    for unit, style in (("fp8", "-"), ("bf16", "--")):
        if unit in ceilings:
            roof = [min(1e-3 * ceilings["copy"] * x, ceilings[unit]) for x in grid]
            left.plot(grid, roof, color="0.4", linewidth=0.9, linestyle=style, label=f"{unit} roof")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("operations per byte (fewest bytes)")
    left.set_ylabel("TFLOP/s")
    left.legend(fontsize=6, ncols=2)
    names = list(roofline.by_kernel(points))
    right.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    right.tick_params(axis="y", labelsize=7)
    right.axvline(100, color="0.6", linewidth=1)
    right.set_xlim(left=0)
    right.set_xlabel("% of what the ceilings allow, a point a shape")
    right.invert_yaxis()
