"""Rows of results as Markdown tables; "-" for what was not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Group = dict[str, Row]  # The rows of one problem by variant.

#: Variants of the GEMM, in the order of the table; those that rows have.
GEMM_NAMES = {
    "bf16": "bf16",
    "fp8": "FP8",
    "cpp_best": "best of cublasLt",
    "fp8_row": "FP8, row scales",
    "cpp_row_best": "best of cublasLt, row scales",
    "fp8_block": "FP8, block scales",
}
#: Those that are timed at few problems.
OTHER_NAMES = {
    "f16": "f16",
    "cublaslt": "cublaslt",
    "precise": "cublaslt, precise",
    "small_m": "small_m",
    "decode": "decode",
    "naive": "naive",
}


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


def errors(rows: Iterable[Row], keys: Sequence[str]) -> list[str]:
    """A line for each row that has no figure."""
    return [
        f"- {row['variant']} at {' x '.join(str(row[key]) for key in keys)}: {row['error']}"
        for row in rows
        if row.get("error")
    ]


def assemble(parts: list[str], failed: list[str]) -> str:
    """Text and tables, and at the end what failed."""
    if failed:
        parts = [*parts, "Not measured:\n\n" + "\n".join(failed)]
    return "\n\n".join(parts)


def _hidden(row: Row) -> bool:
    """Whether the host had dispatched the chain before the device turned to it."""
    head_start = row.get("head_start_us")
    return head_start is None or row["host_us"] < head_start


def _summary(by_problem: dict[tuple[Any, ...], Group]) -> str:
    """Speedups over bf16, a line for each layer and a column for each M."""
    ms = sorted({key[0] for key in by_problem})
    layers = list(dict.fromkeys(key[1:] for key in by_problem))

    def cell(key: tuple[Any, ...]) -> str:
        group = by_problem.get(key, {})
        both = (number(ratio(group, "bf16", name), "{:.2f}") for name in ("fp8", "fp8_row"))
        return " / ".join(both) if group else "-"

    return markdown(
        ["N x K", *(f"M = {m}" for m in ms)],
        [[f"{n} x {k}", *(cell((m, n, k)) for m in ms)] for n, k in layers],
    )


def gemm(rows: list[Row]) -> str:
    """Speedups by layer and M, then times, rates and the other implementations."""
    by_problem = groups(rows, ("m", "n", "k"))

    def lines(
        names: Sequence[str], cell: Callable[[Group, str], str], more: Sequence[str] = ()
    ) -> list[list[str]]:
        return [
            [str(key[0]), f"{key[1]} x {key[2]}"]
            + [cell(group, name) for name in names]
            + [number(ratio(group, *both.split(" of ")), "{:.2f}") for both in more]
            for key, group in by_problem.items()
            if any(name in group for name in names)
        ]

    def time(group: Group, name: str) -> str:
        return number(value(group, name))

    def rate(group: Group, name: str) -> str:
        flop, nbytes = (value(group, name, key) for key in ("tflop_per_s", "gb_per_s"))
        return f"{number(flop)} / {number(nbytes)}" if flop else "-"

    seen = {row["variant"] for row in rows}
    names = [name for name in GEMM_NAMES if name in seen]
    header = ["M", "N x K", *(GEMM_NAMES[name] for name in names)]
    ratios = ["fp8 of cpp_best", "fp8_row of cpp_row_best"]
    blocks = " Sums with block scales, 1 x 128 by 128 x 128, are always precise."
    times = markdown([*header, "of best", "of best, row scales"], lines(names, time, ratios))
    parts = [
        "How many times as fast as bf16 a product of operands in FP8 is, with tensor scales / with "
        "row scales, bf16 out: device time, fast accumulation.",
        _summary(by_problem),
        'Device time of a call in us. "of best": its time over that of the fastest of all '
        "candidates of cublasLt, called from C++, timed by turns with it."
        + (blocks if "fp8_block" in seen else ""),
        times,
        "TFLOP/s / GB/s (fewest bytes: operands once and result once).",
        markdown(header, lines(names, rate)),
    ]
    others = lines(list(OTHER_NAMES), time)
    if others:
        parts += [
            "Other implementations, by name, in us.",
            markdown(["M", "N x K", *OTHER_NAMES.values()], others),
        ]
    loud = [row for row in rows if not _hidden(row)]
    if loud:
        parts.append(
            f"In {len(loud)} timings the host was slower than the head start it was given."
        )
    return assemble(parts, errors(rows, ("m", "n", "k")))


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
    return assemble(parts, errors(rows, ("rows", "columns")))
