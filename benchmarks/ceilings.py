"""What the card can do at best, measured: a copy through memory, and the largest products."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from benchmarks import gemm, heuristic, operands, tables, timing, turns
from benchmarks.server import Remote

Row = dict[str, Any]

KEYS = ("size",)
COPIED_BYTES = 1 << 30
SHAPES = {"smoke": (64, 64, 64), "quick": (8192, 8192, 8192), "all": (8192, 8192, 8192)}


def _copy() -> Row:
    """Read and written."""
    if timing.on_gpu():
        answer = heuristic.start().ask(f"copy {COPIED_BYTES}")
        rate = answer["gb_per_s"]
    else:  # There is no such program: numpy's copy stands for it.
        source = operands.normal(0, (1 << 20,))
        us = timing.Chains(lambda x: x + 1, (), [(source,)], 1e3).pair()[1]
        rate = 4e-3 * source.size / us
    return {"us": 2e-3 * COPIED_BYTES / rate, "gb_per_s": rate}


def _products(problem: gemm.Problem) -> dict[str, Any]:
    """FP8 by cublasLt's best candidate, bf16 by XLA's."""
    m, n, k = problem
    weights = operands.Weights(n, k)
    floor = timing.floor_us(0.0, 2.0 * m * n * k, "fp8")
    bf16 = next(variant for variant in gemm.VARIANTS if variant.name == "bf16")
    rotated = weights.get(operands.wide, timing.calls_for(floor))
    x = operands.normal(0, (m, k))
    timed: dict[str, Any] = {
        "bf16": timing.Chains(bf16.call, (x,), rotated, floor, bf16.options),
    }
    if timing.on_gpu():
        try:
            timed["fp8"] = heuristic.best(heuristic.start(), 0, problem, False, floor)
        except Exception as error:  # Without nvcc there is no such program.
            timed["fp8"] = error
    found = dict(zip(timed, turns.by_turns(list(timed.values()), 0.5), strict=True))
    if isinstance(timed.get("fp8"), Remote):
        heuristic.start().ask("close")
    return found


def run(shapes: str = "all") -> list[Row]:
    """Measures the ceilings.

    Returns:
      Rows of variant "copy" (``gb_per_s``), "fp8" and "bf16" (``tflop_per_s``), with ``us`` and
      ``size``, or ``error``.
    """
    problem = SHAPES[shapes]
    rows: list[Row] = []
    with tqdm(total=2, desc="ceilings") as bar:
        row: Row = {"size": f"{COPIED_BYTES} bytes", "variant": "copy"}
        try:
            row |= _copy()
        except Exception as error:
            row |= tables.failure(error)
        rows.append(row)
        bar.update()
        for name, found in _products(problem).items():
            row = {"size": " x ".join(map(str, problem)), "variant": name}
            if isinstance(found, Exception):
                row |= tables.failure(found)
            else:
                flop = 2e-6 * problem[0] * problem[1] * problem[2]
                row |= {"us": found["us"], "tflop_per_s": flop / found["us"]}
            rows.append(row)
        bar.update()
    return rows


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    lines = [
        [
            row["variant"],
            row["size"],
            tables.number(row.get("gb_per_s")),
            tables.number(row.get("tflop_per_s")),
        ]
        for row in rows
    ]
    title = (
        "The best of this card: a copy, read and written, and the products (bf16 by XLA, FP8 by "
        "cublasLt's fastest candidate)."
    )
    parts = [title, tables.markdown(["", "size", "GB/s", "TFLOP/s"], lines)]
    return tables.assemble(parts, tables.errors(rows, KEYS))
