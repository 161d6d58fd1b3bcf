"""bf16 to E4M3 in both layouts: one read against quantizing x and its transpose, and a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import jax_fp8
from benchmarks import operands, tables, timing, turns

Row = dict[str, Any]
Shape = tuple[int, int]

KEYS = ("rows", "columns")
REFERENCE = "copy"
SHAPES: dict[str, tuple[Shape, ...]] = {
    "smoke": ((48, 320),),
    "quick": ((2048, 4096), (8192, 14336)),
    "all": ((2048, 4096), (8192, 4096), (8192, 14336)),
}

#: Name in the rows -> granularity and what is more than the default.
MODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tensor": ("tensor", {}),
    "tensor_static": ("tensor", {"static": True}),
    "row": ("row", {}),
    "1x128": ((1, 128), {}),
    "128x128": ((128, 128), {}),
    "1x128_stochastic": ((1, 128), {"stochastic": True}),
}
#: Of these the way without the kernel is timed too, as "unfused NAME".
_UNFUSED = ("tensor", "tensor_static", "row", "1x128", "128x128")


def _options(granularity: Any, static: bool, scale: jax.Array) -> dict[str, Any]:
    return {
        "granularity": granularity,
        "scale": scale if static else None,
        "implementation": "kernel" if timing.on_gpu() else "xla",
    }


def _fused(granularity: Any, static: bool = False, stochastic: bool = False) -> Callable[..., Any]:
    def call(scale: jax.Array, key: jax.Array, x: jax.Array) -> Any:
        return jax_fp8.cast_transpose(
            x, key=key if stochastic else None, **_options(granularity, static, scale)
        )

    return call


def _unfused(granularity: Any, static: bool = False) -> Callable[..., Any]:
    """What a user has without: the transpose is written by XLA, and quantized from there."""

    def call(scale: jax.Array, key: jax.Array, x: jax.Array) -> Any:
        options = _options(granularity, static, scale)
        return jax_fp8.quantize(x, **options), jax_fp8.quantize(x.T, **options)

    return call


def _copy(scale: jax.Array, key: jax.Array, x: jax.Array) -> jax.Array:
    """Reads and writes as many bytes as one read and both layouts are: 2 and 2 an element."""
    return x + jnp.bfloat16(1)


JOBS: dict[str, Callable[..., Any]] = {
    "copy": _copy,
    **{name: _fused(granularity, **more) for name, (granularity, more) in MODES.items()},
    **{f"unfused {name}": _unfused(MODES[name][0], **MODES[name][1]) for name in _UNFUSED},
}


def _measure(shape: Shape) -> Iterator[Row]:
    """Times the variants on one shape."""
    elements = shape[0] * shape[1]
    nbytes = 4.0 * elements  # The scales are left out.
    floor = timing.floor_us(nbytes)
    copies = timing.copies_for(2 * elements, timing.calls_for(floor))
    inputs = [(operands.normal(seed, shape),) for seed in range(copies)]
    fixed = (jnp.full((1, 1), 0.01, jnp.float32), jnp.zeros((2,), jnp.uint32))
    prepared = timing.prepare_all(
        [functools.partial(timing.Chains, call, fixed, inputs, floor) for call in JOBS.values()]
    )
    for name, found in zip(JOBS, turns.by_turns(prepared), strict=True):
        row: Row = {"rows": shape[0], "columns": shape[1], "variant": name}
        if isinstance(found, Exception):
            row |= tables.failure(found)
        else:
            row |= {**found, "gb_per_s": nbytes / found["us"] * 1e-3}
        yield row


def run(shapes: str = "all") -> list[dict[str, Any]]:
    """Times cast_transpose; ``shapes`` is a key of SHAPES.

    Returns:
      A row for each shape and variant: ``rows``, ``columns``, ``variant``, what
      ``turns.by_turns`` states and ``gb_per_s`` (input once, both layouts once), or ``error``.
    """
    found: list[Row] = []
    total = len(SHAPES[shapes]) * len(JOBS)
    with tqdm(total=total, desc="cast_transpose", unit="timing") as bar:
        for shape in SHAPES[shapes]:
            bar.set_postfix_str(f"{shape[0]}x{shape[1]}")
            for row in _measure(shape):
                found.append(row)
                bar.update()
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The rows of ``run`` as Markdown: a line for each shape and granularity."""
    lines = []
    for (rows, columns), group in tables.groups(results, KEYS).items():
        for name in MODES:
            unfused = f"unfused {name}"
            lines.append(
                [
                    f"{rows} x {columns}",
                    name,
                    tables.number(tables.value(group, name)),
                    tables.number(tables.value(group, "copy")),
                    tables.number(tables.ratio(group, "copy", name), "{:.2f}"),
                    tables.number(tables.value(group, unfused)),
                    tables.number(tables.ratio(group, unfused, name), "{:.2f}"),
                ]
            )
    title = (
        "bf16 to E4M3 and to its transpose in us. The copy is x + 1 in bf16, which is as many bytes"
        " as one read and both layouts; `unfused` is `quantize` of x and of the transpose that XLA"
        " writes; `tensor_static` is given its scale."
    )
    header = ["shape", "scales", "us", "copy", "copy / us", "unfused", "unfused / us"]
    return tables.assemble([title, tables.markdown(header, lines)], tables.errors(results, KEYS))
