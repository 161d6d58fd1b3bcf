"""bf16 to E4M3: every granularity, and a copy of the same bytes as the ceiling."""

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
    "smoke": ((1, 256), (48, 320)),
    "quick": ((1, 4096), (2048, 4096), (8192, 14336)),
    "all": (
        *((1, 4096), (16, 4096), (128, 14336)),
        *((2048, 4096), (8192, 4096), (8192, 14336), (8192, 28672)),
    ),
}


def _quantize(granularity: Any) -> Callable[..., Any]:
    def call(*operands: jax.Array) -> Any:
        scale, x = operands if len(operands) == 2 else (None, *operands)
        return jax_fp8.quantize(
            x,
            granularity=granularity,
            scale=scale,
            implementation="kernel" if timing.on_gpu() else "xla",
        )

    return call


def _copy(x: jax.Array) -> jax.Array:
    """Reads and writes as many bytes as quantizing does: 2 and 2 for 3/4 of the elements."""
    return x + jnp.bfloat16(1)


#: Name in the rows -> (function, whether a scale is given).
VARIANTS: dict[str, tuple[Callable[..., Any], bool]] = {
    "copy": (_copy, False),
    "tensor": (_quantize("tensor"), False),
    "tensor_static": (_quantize("tensor"), True),
    "row": (_quantize("row"), False),
    "1x128": (_quantize((1, 128)), False),
    "128x128": (_quantize((128, 128)), False),
}


def _measure(shape: Shape) -> Iterator[Row]:
    """Times the variants on one shape."""
    elements = shape[0] * shape[1]
    nbytes = 3.0 * elements  # The scales are left out.
    floor = timing.floor_us(nbytes)
    copies = timing.copies_for(2 * elements, timing.calls_for(floor))
    inputs = [(operands.normal(seed, shape),) for seed in range(copies)]
    copied = [(operands.normal(seed, (elements * 3 // 4,)),) for seed in range(copies)]
    scale = jnp.full((1, 1), 0.01, jnp.float32)
    prepared = timing.prepare_all(
        [
            functools.partial(
                timing.Chains,
                call,
                (scale,) if static else (),
                copied if name == "copy" else inputs,
                floor,
            )
            for name, (call, static) in VARIANTS.items()
        ]
    )
    for name, found in zip(VARIANTS, turns.by_turns(prepared), strict=True):
        row: Row = {"rows": shape[0], "columns": shape[1], "variant": name}
        if isinstance(found, Exception):
            row |= tables.failure(found)
        else:
            row |= {**found, "gb_per_s": nbytes / found["us"] * 1e-3}
        yield row


def run(shapes: str = "all") -> list[dict[str, Any]]:
    """Times quantize; ``shapes`` is a key of SHAPES.

    Returns:
      A row for each shape and variant: ``rows``, ``columns``, ``variant``, what
      ``turns.by_turns`` states and ``gb_per_s`` (input once, output once), or ``error``.
    """
    found: list[Row] = []
    with tqdm(total=len(SHAPES[shapes]) * len(VARIANTS), desc="quantize", unit="timing") as bar:
        for shape in SHAPES[shapes]:
            bar.set_postfix_str(f"{shape[0]}x{shape[1]}")
            for row in _measure(shape):
                found.append(row)
                bar.update()
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The rows of ``run`` as Markdown."""
    return tables.quantize(results)
