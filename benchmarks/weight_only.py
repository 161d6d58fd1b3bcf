"""FP8 weights: times 16-bit activations, or times activations quantized row by row, over M."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import jax_fp8
from benchmarks import gemm, operands, tables, timing, turns

Row = dict[str, Any]

KEYS = ("m", "n", "k")
REFERENCE = "bf16"
FIGURES = ("us", "rms_error")
LAYERS = {
    "smoke": ((32, 64),),
    "quick": ((28672, 4096),),
    "all": ((28672, 4096), (4096, 4096)),
}
MS = {
    "smoke": (1, 16),
    "quick": (1, 16, 128, 1024, 8192),
    "all": (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
}


def _bf16(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=x.dtype)


def _matmul(recipe: str) -> Callable[[jax.Array, Any], jax.Array]:
    return lambda x, w: jax_fp8.matmul(x, w, recipe=recipe)


#: Name in the rows -> (how weights are prepared, function of x and w).
VARIANTS: dict[str, tuple[operands.Prepare, Callable[..., jax.Array]]] = {
    "bf16": (operands.wide, _bf16),
    "weight_only": (operands.row, _matmul("weight_only")),
    "rowwise": (operands.row, _matmul("rowwise")),
}


def _prepare(m: int, name: str, weights: operands.Weights, layer: tuple[int, int]) -> timing.Chains:
    n, k = layer
    prepare, call = VARIANTS[name]
    floor = timing.floor_us(float(n * k), 2.0 * m * n * k, "fp8")
    rotated = weights.get(prepare, timing.calls_for(floor))
    return timing.Chains(call, (operands.normal(0, (m, k)),), rotated, floor)


def run(shapes: str = "all") -> list[Row]:
    """Times and compares them; ``shapes`` is a key of MS and LAYERS.

    Returns:
      A row for each problem and variant: ``m``, ``n``, ``k``, ``variant``, what
      ``turns.by_turns`` states, ``tflop_per_s``, ``gb_per_s`` and ``rms_error`` (against the
      wide product), or ``error``.
    """
    rows: list[Row] = []
    total = len(LAYERS[shapes]) * len(MS[shapes]) * len(VARIANTS)
    with tqdm(total=total, desc="weight_only", unit="timing") as bar:
        for layer in LAYERS[shapes]:
            weights = operands.Weights(*layer)
            jobs = [(m, name) for m in MS[shapes] for name in VARIANTS]
            bar.set_postfix_str("compiling")
            chains = timing.prepare_all(
                [functools.partial(_prepare, m, name, weights, layer) for m, name in jobs]
            )
            prepared = dict(zip(jobs, chains, strict=True))
            wide = weights.first(operands.wide)[0]
            for m in MS[shapes]:
                bar.set_postfix_str(f"{m}x{layer[0]}x{layer[1]}")
                expected = operands.reference(operands.normal(0, (m, layer[1])), wide)
                lead_s = timing.lead_s(*gemm.work((m, *layer), 1))
                timed = turns.by_turns([prepared[m, name] for name in VARIANTS], lead_s=lead_s)
                for name, found in zip(VARIANTS, timed, strict=True):
                    row: Row = {"m": m, "n": layer[0], "k": layer[1], "variant": name}
                    if isinstance(found, Exception):
                        row |= tables.failure(found)
                    else:
                        nbytes, flop = gemm.work((m, *layer), 2 if name == "bf16" else 1)
                        row |= found
                        row["tflop_per_s"] = flop / row["us"] * 1e-6
                        row["gb_per_s"] = nbytes / row["us"] * 1e-3
                        error = operands.rms_error(prepared[m, name].first(), expected)
                        row["rms_error"] = error
                    rows.append(row)
                    bar.update()
    return rows


def faster_from(rows: list[Row], n: int, k: int) -> int | None:
    """The least M from which on ``rowwise`` is never slower; None where there is none."""
    found = None
    by_problem = tables.groups(rows, KEYS)
    for key in sorted((key for key in by_problem if key[1:] == (n, k)), reverse=True):
        over = tables.ratio(by_problem[key], "weight_only", "rowwise")
        if over is None or over < 1:
            break
        found = key[0]
    return found


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    by_problem = tables.groups(rows, KEYS)
    layers = list(dict.fromkeys(key[1:] for key in by_problem))
    ms = sorted({key[0] for key in by_problem})

    def cells(layer: tuple[int, int], m: int) -> list[str]:
        group = by_problem.get((m, *layer), {})
        return [tables.number(tables.value(group, name)) for name in VARIANTS]

    header = [f"{name}, {n} x {k}" for n, k in layers for name in VARIANTS]
    times = tables.markdown(
        ["M", *header],
        [[str(m), *(cell for layer in layers for cell in cells(layer, m))] for m in ms],
    )
    said = []
    for n, k in layers:
        least = faster_from(rows, n, k)
        won = (
            "rowwise never wins for good" if least is None else f"rowwise wins from M = {least} on"
        )
        said.append(f"at N x K = {n} x {k} {won}")

    def error(name: str) -> str:
        found = [row["rms_error"] for row in rows if row["variant"] == name and "rms_error" in row]
        return f"{name} {max(found):.1e}" if found else f"{name} -"

    parts = [
        f"Device time of a call in us, bf16 in and out, weights in FP8 with row scales: "
        f"{'; '.join(said)}. RMS error over the RMS of the product of the bf16 operands, the "
        f"largest of all M: {', '.join(map(error, VARIANTS))}.",
        times,
    ]
    return tables.assemble(parts, tables.errors(rows, KEYS))
