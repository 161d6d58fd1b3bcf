"""Llama's MLP block, many in one jit: norm, gate and up, SwiGLU, down, residual."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import jax_fp8
from benchmarks import operands, tables, timing, turns

Row = dict[str, Any]

KEYS = ("m",)
REFERENCE = "bf16"
FIGURES = ("us", "rms_off_bf16")
#: Width and hidden width: those of Llama 3 8B.
SIZES = {"smoke": (64, 96), "quick": (4096, 14336), "all": (4096, 14336)}
SHAPES = {"smoke": (2,), "quick": (1, 128, 8192), "all": (1, 16, 128, 1024, 8192)}
#: Copies of the weights at least, so that neighbours in the chain have different ones.
LEAST_COPIES = 4
EPS = 1e-6
#: Scales known ahead: a norm's largest value is near 6 here, a SwiGLU's near 20.
NORM_SCALE, SWIGLU_SCALE = 8.0 / 448, 32.0 / 448

State = tuple[jax.Array, jax.Array]


def _norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + EPS) * weight.astype(jnp.float32)).astype(x.dtype)


def _swiglu(gate_up: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def _plain(multiply: Callable[[jax.Array, Any], jax.Array]) -> Callable[..., State]:
    """The block with norm and SwiGLU left to XLA.

    A state is the residual stream and what the block before adds to it, so that the addition
    stands before the norm, where it can be fused.
    """

    def block(x: jax.Array, delta: jax.Array, norm: jax.Array, up: Any, down: Any) -> State:
        x = x + delta
        return x, multiply(_swiglu(multiply(_norm(x, norm), up)), down)

    return block


def _fused(granularity: Any, static: bool = False) -> Callable[..., State]:
    """The block with jax_fp8's kernels that quantize what they compute."""

    def block(x: jax.Array, delta: jax.Array, norm: jax.Array, up: Any, down: Any) -> State:
        scales = (NORM_SCALE, SWIGLU_SCALE) if static else (None, None)
        quantized, x = jax_fp8.rms_norm_quantize(
            delta, norm, eps=EPS, residual=x, granularity=granularity, scale=_scalar(scales[0])
        )
        hidden = _product(quantized, up)
        quantized = jax_fp8.swiglu_quantize(
            hidden, granularity=granularity, scale=_scalar(scales[1])
        )
        return x, _product(quantized, down)

    return block


def _around(recipe: str) -> Callable[..., State]:
    """The block as two products with all else in them, where ``x`` has ``delta`` already."""
    scales = (NORM_SCALE, SWIGLU_SCALE) if recipe == "static" else (None, None)

    def block(x: jax.Array, delta: jax.Array, norm: jax.Array, up: Any, down: Any) -> State:
        around = {"norm": norm, "eps": EPS, "activation": "swiglu"}
        links = [
            jax_fp8.ChainLink(up, **around, scale=_scalar(scales[0])),
            jax_fp8.ChainLink(down, residual=x, scale=_scalar(scales[1])),
        ]
        _, total = jax_fp8.fused_chain(x, links, recipe=recipe)
        return total, total - x  # Which nothing but the comparison of errors takes.

    return block


def _scalar(scale: float | None) -> jax.Array | None:
    return None if scale is None else jnp.full((1, 1), scale, jnp.float32)


def _product(x: Any, w: Any) -> jax.Array:
    return jax_fp8.scaled_matmul(x, w, preferred_element_type=jnp.bfloat16)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=x.dtype)


def _matmul(recipe: str) -> Callable[[jax.Array, Any], jax.Array]:
    return lambda x, w: jax_fp8.matmul(x, w, recipe=recipe)


#: Name in the rows -> (in the table, how weights are prepared, the block).
VARIANTS: dict[str, tuple[str, operands.Prepare, Callable[..., State]]] = {
    "bf16": ("bf16", operands.wide, _plain(_dot)),
    "rowwise": ("rowwise", operands.row, _fused("row")),
    "tensorwise": ("tensorwise", operands.tensor, _fused("tensor")),
    "static": ("static tensor scales", operands.tensor, _fused("tensor", static=True)),
    "weight_only": ("weight_only", operands.row, _plain(_matmul("weight_only"))),
    "around": ("weight_only, all in its two products", operands.row, _around("weight_only")),
    "rowwise_around": ("rowwise, all in its two products", operands.row, _around("rowwise")),
    "static_around": ("static, all in its two products", operands.tensor, _around("static")),
    "unfused": ("rowwise, norm and SwiGLU by XLA", operands.row, _plain(_matmul("rowwise"))),
}


#: The variants that are in two products, and the rows for which they are taken.
AROUND: dict[str, Callable[[int], bool]] = {
    "around": lambda m: m <= 8,
    "rowwise_around": lambda m: m <= 16 or m >= 1024,
    "static_around": lambda m: m <= 16 or m >= 1024,
}


def start(m: int, name: str, size: tuple[int, int]) -> State:
    """What the first of the blocks gets."""
    x, delta = operands.normal(0, (m, size[0])), operands.normal(1, (m, size[0]))
    return (x + delta, delta) if name in AROUND else (x, delta)


def variants(m: int) -> list[str]:
    """Those that are for so many rows."""
    return [name for name in VARIANTS if name not in AROUND or AROUND[name](m)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def block_weights(seed: int, size: tuple[int, int], prepare: operands.Prepare) -> tuple[Any, ...]:
    """Of one block, with products of unit variance from inputs of unit variance."""
    width, hidden = size
    up = operands.normal(2 * seed, (2 * hidden, width)) * jnp.bfloat16(width**-0.5)
    down = operands.normal(2 * seed + 1, (width, hidden)) * jnp.bfloat16(hidden**-0.5)
    return (jnp.ones((width,), jnp.bfloat16), *prepare(up), *prepare(down))


class _Blocks:
    """The weights of several blocks, of each kind."""

    def __init__(self, size: tuple[int, int]) -> None:
        count = LEAST_COPIES if timing.on_gpu() else 2
        self._made: dict[operands.Prepare, list[tuple[Any, ...]]] = {}
        for _, prepare, _ in VARIANTS.values():
            if prepare not in self._made:
                self._made[prepare] = [block_weights(i, size, prepare) for i in range(count)]

    def get(self, prepare: operands.Prepare) -> list[tuple[Any, ...]]:
        return self._made[prepare]


def weights_bytes(size: tuple[int, int]) -> float:
    """Of the FP8 weights of a block."""
    return 3.0 * size[0] * size[1]


def _prepare(m: int, name: str, size: tuple[int, int], blocks: _Blocks) -> timing.Chains:
    _, prepare, block = VARIANTS[name]
    nbytes = weights_bytes(size)
    floor = timing.floor_us(nbytes, 2.0 * m * nbytes, "fp8")
    return timing.Chains(block, start(m, name, size), blocks.get(prepare), floor, feed=True)


def run(shapes: str = "all") -> list[Row]:
    """Times a chain of blocks; ``shapes`` is a key of SHAPES.

    Returns:
      A row for each M and variant: ``m``, ``variant``, what ``turns.by_turns`` states,
      ``weights_bytes`` (of a block, in FP8) and ``rms_off_bf16`` (of what the first block adds,
      against bf16's), or ``us`` None and ``error``.
    """
    size, rows = SIZES[shapes], []
    blocks = _Blocks(size)
    jobs = [(m, name) for m in SHAPES[shapes] for name in variants(m)]
    with tqdm(total=len(jobs), desc="mlp", unit="timing") as bar:
        bar.set_postfix_str("compiling")
        prepared = dict(
            zip(
                jobs,
                timing.prepare_all(
                    [functools.partial(_prepare, *job, size, blocks) for job in jobs]
                ),
                strict=True,
            )
        )
        nbytes = weights_bytes(size)
        for m in SHAPES[shapes]:
            bar.set_postfix_str(f"M = {m}")
            lead_s = timing.lead_s(nbytes, 2.0 * m * nbytes)
            timed = turns.by_turns([prepared[m, name] for name in variants(m)], lead_s=lead_s)
            wide = None
            for name, found in zip(variants(m), timed, strict=True):
                row: Row = {"m": m, "variant": name, "weights_bytes": nbytes}
                if isinstance(found, Exception):
                    row |= tables.failure(found)
                else:
                    added = prepared[m, name].first()[1][: operands.COMPARED]
                    wide = added.astype(jnp.float32) if name == "bf16" else wide
                    row |= found
                    if wide is not None:
                        row["rms_off_bf16"] = operands.rms_error(added, wide)
                rows.append(row)
                bar.update()
    return rows


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    by_m = tables.groups(rows, KEYS)
    names = [name for name in VARIANTS if any(name in group for group in by_m.values())]

    def cell(group: tables.Group, name: str) -> str:
        us = tables.number(tables.value(group, name))
        over = tables.ratio(group, "bf16", name)
        return us if name == "bf16" or over is None else f"{us} ({over:.2f}x)"

    times = tables.markdown(
        ["M", *(VARIANTS[name][0] for name in names)],
        [[str(m), *(cell(group, name) for name in names)] for (m,), group in by_m.items()],
    )
    errors = tables.markdown(
        ["M", *(VARIANTS[name][0] for name in names)],
        [
            [str(m), *(tables.number(tables.value(group, n, "rms_off_bf16")) for n in names)]
            for (m,), group in by_m.items()
        ],
    )
    mega = rows[0]["weights_bytes"] * 1e-6
    parts = [
        "Device time in us of one MLP block of Llama 3 8B (RMSNorm, gate and up, SwiGLU, down, "
        f"residual) in a chain of blocks in one jit, and how many times as fast as bf16. The FP8 "
        f"weights of a block are {mega:.0f} MB.",
        times,
        "What the block adds: RMS of the difference to bf16's over the RMS of bf16's.",
        errors,
    ]
    return tables.assemble(parts, tables.errors(rows, KEYS))
