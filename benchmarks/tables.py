"""Rows of results as Markdown tables; "-" for what was not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Group = dict[str, Row]  # The rows of one problem by variant.

#: Variants of the GEMM, in the order of the table.
GEMM_NAMES = {
    "bf16": "bf16",
    "f16": "f16",
    "bf16_autotuned": "bf16, XLA's choice",
    "naive": "FP8 naive",
    "xla": "FP8 xla",
    "cublaslt": "FP8 cublaslt",
    "cublaslt_row": "row scales",
    "cublaslt_precise": "precise",
    "decode": "decode",
    "cpp_first": "first heuristic (C++)",
    "cpp_best": "best of 8 (C++)",
}
#: Those that have a column even where they are absent.
_ALWAYS = set(GEMM_NAMES) - {"bf16_autotuned", "xla"}


def failure(error: Exception) -> Row:
    """What a row states instead of a time."""
    lines = str(error).strip().splitlines() or [""]
    return {"us": None, "error": f"{type(error).__name__}: {lines[0][:300]}"}


def groups(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], Group]:
    """Problem -> variant -> row."""
    found: dict[tuple[Any, ...], Group] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["variant"]] = row
    return found


def value(group: Group, variant: str, key: str = "us") -> float | None:
    """A figure of one variant, None where there is none."""
    return group.get(variant, {}).get(key)


def ratio(group: Group, slow: str, fast: str) -> float | None:
    """How many times as long ``slow`` takes as ``fast``."""
    a, b = value(group, slow), value(group, fast)
    return a / b if a and b else None


def number(x: float | None, form: str = "{:.3g}") -> str:
    """The number, or "-"."""
    if x is None:
        return "-"
    return f"{x:.0f}" if form == "{:.3g}" and abs(x) >= 100 else form.format(x)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose columns line up."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]

    def join(line: Sequence[str]) -> str:
        return "| " + " | ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([join(cells[0]), rule, *map(join, cells[1:])])


def _errors(rows: Iterable[Row], keys: Sequence[str]) -> list[str]:
    return [
        f"- {row['variant']} at {' x '.join(str(row[key]) for key in keys)}: {row['error']}"
        for row in rows
        if row.get("error")
    ]


def _assemble(parts: list[str], errors: list[str]) -> str:
    if errors:
        parts = [*parts, "Not measured:\n\n" + "\n".join(errors)]
    return "\n\n".join(parts)


def _hidden(row: Row) -> bool:
    """Whether the host had dispatched the chain before the device turned to it."""
    head_start = row.get("head_start_us")
    return head_start is None or row["host_us"] < head_start


def gemm(rows: list[Row]) -> str:
    """Times with the speedups, then rates, then the host's dispatch."""
    by_problem = groups(rows, ("m", "n", "k"))
    seen = {row["variant"] for row in rows}
    names = [name for name in GEMM_NAMES if name in seen or name in _ALWAYS]
    problem = ("M", "N x K")
    fast = "cublaslt" if "cublaslt" in seen else "naive"

    def start(key: tuple[Any, ...]) -> list[str]:
        return [str(key[0]), f"{key[1]} x {key[2]}"]

    speedups: dict[str, Callable[[Group], float | None]] = {
        "over bf16": lambda g: ratio(g, "bf16", fast),
        "over f16": lambda g: ratio(g, "f16", fast),
        "over naive": lambda g: ratio(g, "naive", fast),
        "of first (C++)": lambda g: ratio(g, fast, "cpp_first"),
    }
    times = markdown(
        [*problem, *(GEMM_NAMES[name] for name in names), *speedups],
        [
            start(key)
            + [number(value(group, name)) for name in names]
            + [number(speedup(group), "{:.2f}") for speedup in speedups.values()]
            for key, group in by_problem.items()
        ],
    )
    rated = [name for name in names if name in seen]
    rates = markdown(
        [*problem, *(GEMM_NAMES[name] for name in rated)],
        [
            start(key)
            + [
                f"{number(value(group, name, 'tflop_per_s'))} / "
                f"{number(value(group, name, 'gb_per_s'))}"
                for name in rated
            ]
            for key, group in by_problem.items()
        ],
    )
    parts = [
        "Device time of a call in us; bf16 and f16 through XLA, FP8 with tensor scales and fast "
        f"accumulation where nothing else is said, bf16 out; speedups of FP8 {fast}, and its time "
        "as a multiple of that of cublasLt's first heuristic called from C++. The naive kernel is "
        "timed up to M = 128 and at 8192 x 8192 x 8192.",
        times,
        "TFLOP/s / GB/s (fewest bytes: operands once and result once).",
        rates,
    ]
    dispatched = {r["variant"]: r["dispatch_us"] for r in rows if r.get("dispatch_us")}
    if dispatched:
        said = ", ".join(f"{name} {number(us)}" for name, us in dispatched.items())
        parts.append(f"The host's time in dispatching one jitted call, us: {said}.")
    loud = [row for row in rows if not _hidden(row)]
    if loud:
        parts.append(
            f"In {len(loud)} timings the host was slower than the head start it was given."
        )
    return _assemble(parts, _errors(rows, ("m", "n", "k")))


def quantize(rows: list[Row]) -> str:
    """Times, GB/s, and the share of the copy's rate."""
    by_shape = groups(rows, ("rows", "columns"))
    names = list(dict.fromkeys(row["variant"] for row in rows))

    def cell(group: Group, name: str) -> str:
        share = ratio(group, "copy", name)
        percent = "-" if share is None else f"{100 * share:.0f} %"
        return (
            f"{number(value(group, name))} / {number(value(group, name, 'gb_per_s'))} / {percent}"
        )

    times = markdown(
        ["shape", *names],
        [
            [f"{key[0]} x {key[1]}", *(cell(group, name) for name in names)]
            for key, group in by_shape.items()
        ],
    )
    parts = [
        "bf16 to E4M3: us / GB/s (input once and output once) / share of the copy's rate. The "
        "copy is x + 1 in bf16 over as many bytes; `tensor_static` is given its scale.",
        times,
    ]
    return _assemble(parts, _errors(rows, ("rows", "columns")))
