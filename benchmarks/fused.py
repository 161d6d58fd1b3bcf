"""Norms and activations with quantization, bf16 to E4M3: one kernel against two, and a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from tqdm import tqdm

import jax_fp8
from benchmarks import operands, tables, timing, turns

Row = dict[str, Any]
KEYS = ("producer", "rows", "columns")
REFERENCE = "copy"
Shape = tuple[str, int, int]  # Producer, rows and columns of the result.

#: Bytes of wide input and output for each element of the result, which itself takes one.
WIDE_BYTES = {
    "rms_norm": 2,
    "rms_norm_residual": 6,
    "layer_norm": 2,
    "layer_norm_residual": 6,
    "swiglu": 4,
    "gelu": 2,
}
#: The inner and the outer dimension of Llama-8B's MLP.
_COLUMNS = {**dict.fromkeys(WIDE_BYTES, 4096), "swiglu": 14336, "gelu": 14336}


def _shapes(*rows: int) -> tuple[Shape, ...]:
    return tuple((name, m, _COLUMNS[name]) for name in WIDE_BYTES for m in rows)


SHAPES: dict[str, tuple[Shape, ...]] = {
    "smoke": (
        ("rms_norm_residual", 3, 256),
        ("layer_norm_residual", 3, 256),
        ("swiglu", 3, 128),
    ),
    "quick": _shapes(1, 8192),
    "all": _shapes(1, 16, 128, 2048, 8192),
}

#: Name in the rows -> (granularity, whether a scale is given). "unfused" and "copy" are apart.
VARIANTS: dict[str, tuple[Any, bool]] = {
    "row": ("row", False),
    "1x128": ((1, 128), False),
    "tensor": ("tensor", False),
    "tensor_static": ("tensor", True),
}


def _fused(producer: str, granularity: Any, static: bool) -> Callable[..., Any]:
    def call(weight: jax.Array, scale: jax.Array, *arrays: jax.Array) -> Any:
        options: dict[str, Any] = {
            "granularity": granularity,
            "scale": scale if static else None,
            "implementation": "kernel" if timing.on_gpu() else "xla",
        }
        if producer == "swiglu":
            return jax_fp8.swiglu_quantize(*arrays, **options)
        if producer == "gelu":
            return jax_fp8.gelu_quantize(*arrays, **options)
        options["residual"] = arrays[1] if len(arrays) == 2 else None
        if producer.startswith("layer_norm"):
            return jax_fp8.layer_norm_quantize(arrays[0], weight, weight, **options)
        return jax_fp8.rms_norm_quantize(arrays[0], weight, **options)

    return call


def _unfused(producer: str) -> Callable[..., Any]:
    """What a user has without: XLA's own fusion writes bf16, and row scales are taken of that."""

    def call(weight: jax.Array, scale: jax.Array, *arrays: jax.Array) -> Any:
        x = arrays[0] + arrays[1] if len(arrays) == 2 else arrays[0]
        wide = x.astype(jnp.float32)
        if producer == "swiglu":
            gate, up = jnp.split(wide, 2, axis=-1)
            y = jax.nn.silu(gate) * up
        elif producer == "gelu":
            y = jax.nn.gelu(wide)
        else:
            if producer.startswith("layer_norm"):
                wide = wide - wide.mean(-1, keepdims=True)
            y = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6) * weight
            if producer.startswith("layer_norm"):
                y = y + weight
        quantized = jax_fp8.quantize(y.astype(jnp.bfloat16), granularity="row")
        return (quantized, x) if len(arrays) == 2 else quantized

    return call


def _copy(weight: jax.Array, scale: jax.Array, x: jax.Array) -> jax.Array:
    return x + jnp.bfloat16(1)


def _measure(shape: Shape) -> Iterator[Row]:
    """Times the variants of one producer on one shape."""
    producer, rows, columns = shape
    elements = rows * columns
    nbytes = (WIDE_BYTES[producer] + 1.0) * elements  # Scales and weights are left out.
    floor = timing.floor_us(nbytes)
    wide = (rows, columns * (2 if producer == "swiglu" else 1))
    count = 2 if producer.endswith("residual") else 1
    copies = timing.copies_for(2 * wide[0] * wide[1] * count, timing.calls_for(floor))
    inputs = [tuple(operands.normal(2 * i + j, wide) for j in range(count)) for i in range(copies)]
    # As many bytes, half of them read.
    copied = [(operands.normal(i, (max(1, int(nbytes) // 4),)),) for i in range(copies)]
    fixed = (operands.normal(1, (columns,)), jnp.full((1, 1), 0.01, jnp.float32))
    jobs: dict[str, tuple[Callable[..., Any], Any]] = {
        "copy": (_copy, copied),
        "unfused": (_unfused(producer), inputs),
    }
    for name, (granularity, static) in VARIANTS.items():
        jobs[name] = (_fused(producer, granularity, static), inputs)
    prepared = timing.prepare_all(
        [
            functools.partial(timing.Chains, call, fixed, rotated, floor)
            for call, rotated in jobs.values()
        ]
    )
    for name, found in zip(jobs, turns.by_turns(prepared), strict=True):
        row: Row = {"producer": producer, "rows": rows, "columns": columns, "variant": name}
        if isinstance(found, Exception):
            row |= tables.failure(found)
        else:
            row |= {**found, "gb_per_s": nbytes / found["us"] * 1e-3}
        yield row


def run(shapes: str = "all") -> list[dict[str, Any]]:
    """Times the fused producers; ``shapes`` is a key of SHAPES.

    Returns:
      A row for each producer, shape and variant: ``producer``, ``rows``, ``columns`` (of the
      result), ``variant``, what ``turns.by_turns`` states and ``gb_per_s`` (each wide array once,
      the codes once), or ``error``.
    """
    found: list[Row] = []
    total = len(SHAPES[shapes]) * (len(VARIANTS) + 2)
    with tqdm(total=total, desc="fused", unit="timing") as bar:
        for shape in SHAPES[shapes]:
            bar.set_postfix_str(f"{shape[0]} {shape[1]}x{shape[2]}")
            for row in _measure(shape):
                found.append(row)
                bar.update()
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The rows of ``run`` as Markdown: microseconds, and the row kernel against its neighbours."""
    names = ["copy", "unfused", *VARIANTS]
    lines = []
    for (producer, *shape), group in tables.groups(
        results, ("producer", "rows", "columns")
    ).items():
        times = [tables.number(tables.value(group, name)) for name in names]
        ratios = [
            tables.number(tables.ratio(group, *pair), "{:.2f}")
            for pair in (("row", "copy"), ("unfused", "row"))
        ]
        lines.append([producer, f"{shape[0]} x {shape[1]}", *times, *ratios])
    title = (
        "bf16 to E4M3 in us, by the scales of the result; shapes are those of the result. The copy"
        " is x + 1 in bf16 over as many bytes; `unfused` is the producer by XLA and `quantize` by"
        " row; `tensor_static` is given its scale."
    )
    header = ["producer", "shape", *names, "row / copy", "unfused / row"]
    return tables.assemble([title, tables.markdown(header, lines)], tables.errors(results, KEYS))
