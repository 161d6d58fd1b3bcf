"""A layer as users can write it today, bf16 in and out: jax_fp8, XLA, flax and torch.

Activations are quantized in the call, from their values; weights ahead where a peer can.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from tqdm import tqdm

import jax_fp8
from benchmarks import ROOT, gemm, operands, tables, timing, turns
from benchmarks.hlo import ran_fp8
from benchmarks.server import Remote, Server, Unavailable

Row = dict[str, Any]
Problem = tuple[int, int, int]

KEYS = ("m", "n", "k")
REFERENCE = "bf16"
FIGURES = ("us", "rms_error")
SHAPES: dict[str, tuple[Problem, ...]] = {
    "smoke": ((16, 32, 64),),
    "quick": ((2048, 4096, 4096), (16, 28672, 4096)),
    "all": ((8192, 28672, 4096), (8192, 4096, 14336), (2048, 4096, 4096), (16, 28672, 4096)),
}

#: What XLA makes of a chain of its own kernels takes it long to compile.
MOST_CALLS = 8

E4M3, LARGEST = jnp.float8_e4m3fn, 448.0
#: Fast, as XLA accumulates in FP8 where no algorithm is named, and as the other peers do.
PRESET = lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM
_TN = (((1,), (1,)), ((), ()))  # (M, K) by (N, K)
_NN = (((1,), (0,)), ((), ()))  # (M, K) by (K, N), as flax keeps its kernels


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to write the layer.

    Attributes:
      name: in the rows.
      said: in the table.
      prepare: what is done ahead with (N, K) bfloat16 weights.
      call: of x (M, K) and what ``prepare`` gave.
      kind: "wide", "jax_fp8", "bare" (the product alone, of operands in FP8), "xla" or "flax".
    """

    name: str
    said: str
    prepare: operands.Prepare
    call: Callable[..., jax.Array]
    kind: str


def _scale(x: jax.Array, axis: int | None = None) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32) / LARGEST


def _cast(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.clip(x.astype(jnp.float32) / scale, -LARGEST, LARGEST).astype(E4M3)


def _dot(
    x: jax.Array, w: jax.Array, dtype: Any, dimensions: Any = _TN, precision: Any = None
) -> jax.Array:
    return lax.dot_general(x, w, dimensions, precision, dtype)


def _bf16(x: jax.Array, w: jax.Array) -> jax.Array:
    return _dot(x, w, jnp.bfloat16)


def _transposed(w: jax.Array) -> tuple[Any, ...]:
    return (w.T,)


def _by_tensor(w: jax.Array) -> tuple[Any, ...]:
    scale = _scale(w)
    return _cast(w, scale), scale


def _by_row(w: jax.Array) -> tuple[Any, ...]:
    scale = _scale(w, -1)
    return _cast(w, scale), scale


def _dequantize(x: jax.Array, w: jax.Array, w_scale: jax.Array) -> jax.Array:
    """The pattern of XLA's guide."""
    x_scale = _scale(x)
    wide_x = _cast(x, x_scale).astype(x.dtype) * x_scale.astype(x.dtype)
    return _dot(wide_x, w.astype(x.dtype) * w_scale.astype(x.dtype), x.dtype)


def _raw_in_call(x: jax.Array, w: jax.Array) -> jax.Array:
    x_scale, w_scale = _scale(x), _scale(w)
    y = _dot(_cast(x, x_scale), _cast(w, w_scale), jnp.float32, _NN)
    return (y * (x_scale * w_scale)).astype(x.dtype)


def _raw(x: jax.Array, w: jax.Array, w_scale: jax.Array) -> jax.Array:
    x_scale = _scale(x)
    return (_dot(_cast(x, x_scale), w, jnp.float32) * (x_scale * w_scale)).astype(x.dtype)


def _raw_preset(x: jax.Array, w: jax.Array, w_scale: jax.Array) -> jax.Array:
    x_scale = _scale(x)
    y = _dot(_cast(x, x_scale), w, jnp.float32, precision=PRESET)
    return (y * (x_scale * w_scale)).astype(x.dtype)


def _raw_narrow(x: jax.Array, w: jax.Array, w_scale: jax.Array) -> jax.Array:
    x_scale = _scale(x)
    return _dot(_cast(x, x_scale), w, x.dtype) * (x_scale * w_scale).astype(x.dtype)


def _raw_row(x: jax.Array, w: jax.Array, w_scale: jax.Array) -> jax.Array:
    x_scale = _scale(x, -1)
    return (_dot(_cast(x, x_scale), w, jnp.float32) * (x_scale * w_scale.T)).astype(x.dtype)


def _nn_scaled_matmul(x: jax.Array, w: jax.Array, w_scale: jax.Array) -> jax.Array:
    x_scale = _scale(x, -1)
    one = [operand[None] for operand in (_cast(x, x_scale), w, x_scale, w_scale)]
    return jax.nn.scaled_matmul(*one, preferred_element_type=x.dtype)[0]


def _lax_scaled_dot(x: jax.Array, w: jax.Array, w_scale: jax.Array) -> jax.Array:
    x_scale = _scale(x, -1)
    return lax.scaled_dot(
        _cast(x, x_scale),
        w,
        lhs_scale=x_scale,
        rhs_scale=w_scale,
        dimension_numbers=_TN,
        preferred_element_type=x.dtype,
    )


def _flax(name: str) -> Callable[..., jax.Array]:
    """One of flax's operations with its state as it is at the start."""

    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        from flax.linen import fp8_ops

        with warnings.catch_warnings():  # One of them is deprecated.
            warnings.simplefilter("ignore")
            operation = getattr(fp8_ops, name)()
            small = jnp.ones((16, 16), x.dtype)
            state = operation.init(jax.random.key(0), small, small, _NN)
            return operation.apply(state, x, w, _NN)

    return call


def _matmul(recipe: str) -> Callable[..., jax.Array]:
    return lambda x, w: jax_fp8.matmul(x, w, recipe=recipe)


def _product(x: Any, w: Any) -> jax.Array:
    return jax_fp8.scaled_matmul(x, w, preferred_element_type=jnp.bfloat16)


PEERS = (
    Peer("bf16", "bf16", operands.wide, _bf16, "wide"),
    Peer("row", "jax_fp8 rowwise", operands.row, _matmul("rowwise"), "jax_fp8"),
    Peer("tensor", "jax_fp8 tensorwise", operands.tensor, _matmul("tensorwise"), "jax_fp8"),
    Peer("bare_row", "its product alone, rowwise", operands.row, _product, "bare"),
    Peer("bare_tensor", "its product alone, tensorwise", operands.tensor, _product, "bare"),
    Peer("xla_dequantize", "XLA: dequantize, then dot", _by_tensor, _dequantize, "xla"),
    Peer("xla_raw_in_call", "XLA: quantize both, dot, scale", _transposed, _raw_in_call, "xla"),
    Peer("xla_raw", "XLA: weights ahead, dot to f32, scale", _by_tensor, _raw, "xla"),
    Peer("xla_raw_preset", f"XLA: the same, {PRESET}", _by_tensor, _raw_preset, "xla"),
    Peer(
        "xla_raw_narrow", "XLA: weights ahead, dot to bf16, scale", _by_tensor, _raw_narrow, "xla"
    ),
    Peer("xla_raw_row", "XLA: the same, row scales in f32", _by_row, _raw_row, "xla"),
    Peer("nn_scaled_matmul", "jax.nn.scaled_matmul", _by_row, _nn_scaled_matmul, "xla"),
    Peer("lax_scaled_dot", "jax.lax.scaled_dot", _by_row, _lax_scaled_dot, "xla"),
    Peer("flax_op", "flax Fp8DotGeneralOp", _transposed, _flax("Fp8DotGeneralOp"), "flax"),
    Peer(
        "flax_direct",
        "flax Fp8DirectDotGeneralOp",
        _transposed,
        _flax("Fp8DirectDotGeneralOp"),
        "flax",
    ),
)
#: Name in the rows -> in the table.
TORCH = {
    "torch_row": "torch _scaled_mm rowwise",
    "torch_tensor": "torch _scaled_mm tensorwise",
}
NAMES = {**{peer.name: peer.said for peer in PEERS}, **TORCH}
#: What jax_fp8 is compared with.
OTHERS = tuple(peer.name for peer in PEERS if peer.kind in ("xla", "flax")) + tuple(TORCH)


def _here() -> list[Peer]:
    """Those whose library, and whose function of it, is here."""
    has = {
        "nn_scaled_matmul": hasattr(jax.nn, "scaled_matmul"),
        "lax_scaled_dot": hasattr(lax, "scaled_dot"),
    }
    flax = importlib.util.find_spec("flax") is not None
    return [p for p in PEERS if has.get(p.name, True) and (flax or p.kind != "flax")]


def _floor(problem: Problem) -> float:
    """Microseconds that a call takes at least; so many that a chain has MOST_CALLS at most."""
    m, n, k = problem
    least = timing.floor_us(float(n * k), 2.0 * m * n * k, "fp8")
    return max(least, timing.CHAIN_US / MOST_CALLS)


def _prepare(problem: Problem, peer: Peer, weights: operands.Weights) -> timing.Chains:
    m, _, k = problem
    floor = _floor(problem)
    x = operands.normal(0, (m, k))
    ahead = jax.jit(peer.prepare)(x) if peer.kind == "bare" else (x,)
    return timing.Chains(
        peer.call, ahead, weights.get(peer.prepare, timing.calls_for(floor)), floor
    )


def _start_torch() -> Server | None:
    if not timing.on_gpu() or importlib.util.find_spec("torch") is None:
        return None
    return Server([sys.executable, "-m", "benchmarks.torch_peers"], "torch_peers", ROOT)


def _open_torch(server: Server | None, problems: Sequence[Problem]) -> dict[Any, Any]:
    """(problem, name) -> what torch times there; all of it compiled before anything is timed."""
    opened: dict[Any, Any] = {}
    for problem in problems if server else ():
        m, n, k = problem
        calls = timing.calls_for(_floor(problem))
        for name in TORCH:
            size = f"{m} {n} {k} {calls} {timing.copies_for(n * k, calls)}"
            head_start_us = timing.head_start()[1]
            try:
                assert server is not None
                line = f"open {len(opened)} {name} {size} {head_start_us}"
                opened[problem, name] = Remote(server, len(opened), calls, line)
            except (Unavailable, RuntimeError) as error:
                opened[problem, name] = error
    return opened


def run(shapes: str = "all") -> list[Row]:
    """Times every peer that is here, by turns at each problem; ``shapes`` is a key of SHAPES.

    Returns:
      A row for each problem and peer: ``m``, ``n``, ``k``, ``variant``, what ``turns.by_turns``
      states, ``fp8`` (whether all that multiplies does so in FP8, as the compiled program says),
      ``version`` of another library, and ``rms_error`` against the wide product of the first
      rows; or ``us`` None and ``error``.
    """
    problems, peers = SHAPES[shapes], _here()
    rows: list[Row] = []
    with (
        tqdm(total=len(problems) * len(peers), desc="peers", unit="timing") as bar,
        ThreadPoolExecutor(1) as aside,
    ):
        server = _start_torch()
        timing.head_start()
        opening = aside.submit(_open_torch, server, problems)  # It compiles while XLA does.
        prepared, layers = {}, {p[1:]: operands.Weights(*p[1:]) for p in problems}
        pairs = [(problem, peer) for problem in problems for peer in peers]
        bar.set_postfix_str("compiling")
        for pair, chains in zip(
            pairs,
            timing.prepare_all(
                [functools.partial(_prepare, p, peer, layers[p[1:]]) for p, peer in pairs]
            ),
            strict=True,
        ):
            prepared[pair[0], pair[1].name] = chains
        prepared |= (opened := opening.result())
        for problem in problems:
            bar.set_postfix_str("x".join(map(str, problem)))
            names = [name for p, name in prepared if p == problem]
            lead_s = timing.lead_s(*gemm.work(problem, 1))
            timed = turns.by_turns([prepared[problem, name] for name in names], lead_s=lead_s)
            x = operands.normal(0, (problem[0], problem[2]))
            w = layers[problem[1:]].first(operands.wide)[0]
            expected = operands.reference(x, w)
            for name, found in zip(names, timed, strict=True):
                rows.append(_row(problem, name, found, prepared[problem, name], expected))
                bar.update((problem, name) not in opened)
        if server is not None:
            server.close()
    return rows


def _row(problem: Problem, name: str, found: Any, timed: Any, expected: jax.Array) -> Row:
    row: Row = {**dict(zip(KEYS, problem, strict=True)), "variant": name}
    if isinstance(found, Exception):
        return row | tables.failure(found)
    row |= found
    if name in TORCH:
        return row  # Its process states fp8, version and rms_error.
    if name != "bf16":
        row["fp8"] = ran_fp8(found["multiplied"])
    if name.startswith("flax"):
        row["version"] = importlib.metadata.version("flax")
    row["rms_error"] = operands.rms_error(timed.first(), expected)
    return row


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    by_problem = tables.groups(rows, KEYS)

    def cell(group: tables.Group, name: str) -> str:
        said = tables.number(tables.value(group, name))
        return said if group.get(name, {}).get("fp8", True) else f"{said} *"

    def fp8(name: str) -> str:
        ran = [group[name]["fp8"] for group in by_problem.values() if "fp8" in group.get(name, {})]
        return "-" if not ran else "yes" if all(ran) else "no" if not any(ran) else "some"

    seen = {row["variant"] for row in rows}
    names = [name for name in NAMES if name in seen]
    titles = [" x ".join(map(str, key)) for key in by_problem]
    times = tables.markdown(
        ["", "FP8 ran", *titles],
        [[NAMES[n], fp8(n), *(cell(g, n) for g in by_problem.values())] for n in names],
    )
    errors = tables.markdown(
        ["", *titles],
        [
            [
                NAMES[n],
                *(tables.number(tables.value(g, n, "rms_error")) for g in by_problem.values()),
            ]
            for n in names
        ],
    )
    parts = [
        "Device time in us at M x N x K, bf16 in and out, activations quantized in the call from "
        "their values (flax: with delayed scales), weights ahead but for flax and "
        '"quantize both". "*" where the compiled program multiplies in 16 or 32 bits after all.',
        times,
        "RMS error over the RMS of the product of the bf16 operands.",
        errors,
    ]
    return tables.assemble(parts, tables.errors(rows, KEYS))
