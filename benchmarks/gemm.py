"""The GEMM: bf16 through XLA, FP8 through jax_fp8, and every candidate of cublasLt from C++."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import jax_fp8
from benchmarks import heuristic, operands, tables, timing, turns
from benchmarks.server import Server, Unavailable

Row = dict[str, Any]
Problem = tuple[int, int, int]  # M, N, K

KEYS = ("m", "n", "k")
REFERENCE = "bf16"

#: N and K of the dense layers of Llama 3 8B: query, key and value; output; gate and up; down.
LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
#: The shapes of the first measurements, from which the targets come.
FIRST = (
    *((1, 4096, 4096), (8192, 4096, 4096), (2048, 6144, 4096)),
    *((m, 28672, 4096) for m in (1, 16, 128, 512, 8192)),
    *((m, 4096, 14336) for m in (1, 2048, 8192)),
    *((64, 8192, 8192), (8192, 8192, 8192), (1024, 1024, 1024)),
)
#: Of few rows and columns.
_NARROW = tuple((m, n, k) for n, k in ((1024, 14336), (512, 4096)) for m in (1, 16))
_MORE = tuple(
    (m, n, k) for n, k in (*LAYERS, (8192, 8192), (1024, 1024)) for m in (32, 256, 1024, 4096)
)
SHAPES: dict[str, tuple[Problem, ...]] = {
    "smoke": ((1, 32, 64), (16, 32, 64), (16, 48, 32), (256, 128, 256)),
    "quick": tuple((m, n, k) for n, k in LAYERS[1:3] for m in (1, 16, 128, 1024, 8192)),
    "all": tuple(dict.fromkeys((*FIRST, *_MORE, *_NARROW))),
}
#: Where the implementations that nobody takes unless by name are timed too.
OTHERS_AT = ((16, 32, 64), (16, 28672, 4096), (1024, 4096, 4096), (8192, 28672, 4096))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to multiply.

    Attributes:
      name: in the rows.
      prepare: makes an operand out of a bfloat16 array, of ``operands``.
      call: of x (M, K) and w (N, K).
      unit: whose peak rate bounds it, a key of ``timing.PEAK_FLOP_PER_S``.
      where: "gpu", "cpu" or "any".
      everywhere: whether it is timed at each problem, or only at ``OTHERS_AT``.
      options: for XLA's compiler.
      prepare_x: what makes x, where that is not ``prepare``.
      least_m: the fewest rows with which it is timed.
    """

    name: str
    prepare: operands.Prepare
    call: Callable[[Any, Any], jax.Array]
    unit: str
    where: str = "gpu"
    everywhere: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepare_x: operands.Prepare | None = None
    least_m: int = 1

    def takes(self, problem: Problem) -> bool:
        """Whether this problem is timed: with the naive kernel, only where it is small."""
        if problem[0] < self.least_m or (self.name == "naive" and problem[0] > 1024):
            return False
        return self.everywhere or problem in OTHERS_AT


def _wide(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=x.dtype)


def _scaled(implementation: str | None, precision: Any = None) -> Callable[[Any, Any], jax.Array]:
    return lambda x, w: jax_fp8.scaled_matmul(
        x,
        w,
        preferred_element_type=jnp.bfloat16,
        precision=precision,
        implementation=implementation,
    )


#: So that "bf16" and "f16" are cuBLAS, the best algorithm that XLA's autotuning finds.
_CUBLAS = {"xla_gpu_enable_triton_gemm": False}
_TENSOR, _ROW, _BLOCK = operands.tensor, operands.row, operands.block
VARIANTS = (
    Variant("bf16", operands.wide, _wide, "16bit", "any", options=_CUBLAS),
    Variant("fp8", _TENSOR, _scaled(None), "fp8", "any"),
    Variant("fp8_row", _ROW, _scaled(None), "fp8", "any"),
    Variant(
        "fp8_block",
        _BLOCK,
        _scaled(None),
        "fp8",
        "any",
        prepare_x=operands.row_block,
        least_m=256,
    ),
    Variant("f16", operands.half, _wide, "16bit", "any", False, _CUBLAS),
    Variant("cublaslt", _TENSOR, _scaled("cublaslt"), "fp8", everywhere=False),
    Variant("precise", _TENSOR, _scaled("cublaslt", "highest"), "fp8", everywhere=False),
    Variant("small_m", _TENSOR, _scaled("small_m"), "fp8", everywhere=False),
    Variant("decode", _TENSOR, _scaled("decode"), "16bit", everywhere=False),
    Variant("naive", _TENSOR, _scaled("naive"), "naive", "any", False),
)
#: Name in the rows -> whether with row scales: the fastest candidate of cublasLt, from C++.
NATIVE = {"cpp_best": False, "cpp_row_best": True}


def work(problem: Problem, itemsize: int) -> tuple[float, float]:
    """Fewest bytes (operands once, the 16-bit result once) and operations."""
    m, n, k = problem
    return float(itemsize * (m * k + n * k) + 2 * m * n), 2.0 * m * n * k


def _itemsize(prepare: operands.Prepare) -> int:
    return 1 if prepare in (_TENSOR, _ROW, _BLOCK) else 2


def _floor(problem: Problem, variant: Variant) -> float:
    return timing.floor_us(*work(problem, _itemsize(variant.prepare)), variant.unit)


def _describe(problem: Problem, name: str, itemsize: int, found: Row | Exception) -> Row:
    m, n, k = problem
    row: Row = {"m": m, "n": n, "k": k, "variant": name}
    if isinstance(found, Exception):
        return row | tables.failure(found)
    nbytes, flop = work(problem, itemsize)
    us = found["us"]
    return {**row, **found, "tflop_per_s": flop / us * 1e-6, "gb_per_s": nbytes / us * 1e-3}


def _prepare(problem: Problem, variant: Variant, weights: operands.Weights) -> timing.Chains:
    floor = _floor(problem, variant)
    rotated = weights.get(variant.prepare, timing.calls_for(floor))
    prepare_x = variant.prepare_x or variant.prepare
    x = jax.jit(prepare_x)(operands.normal(0, (problem[0], problem[2])))
    return timing.Chains(variant.call, x, rotated, floor, variant.options)


def _measure(
    problem: Problem, variants: Sequence[Variant], prepared: list[Any], server: Server | None
) -> Iterator[Row]:
    """Times the variants and cublasLt's best by turns, on one problem."""
    fp8 = timing.floor_us(*work(problem, 1), "fp8")
    native: list[Any] = []
    if server is not None:
        for slot, row in enumerate(NATIVE.values()):
            try:
                native.append(heuristic.best(server, slot, problem, row, fp8))
            except Exception as error:  # The other candidates, and ours, are still timed.
                native.append(error)
    found = turns.by_turns([*prepared, *native], lead_s=timing.lead_s(*work(problem, 1)))
    for variant, result in zip(variants, found, strict=False):
        yield _describe(problem, variant.name, _itemsize(variant.prepare), result)
    for name, result in zip(NATIVE, found[len(variants) :], strict=False):
        yield _describe(problem, name, 1, result)
    if server is not None:
        server.ask("close")


def _start() -> Server | None:
    try:
        return heuristic.start()
    except Unavailable as error:
        warnings.warn(f"cublasLt from C++ is left out: {error}", stacklevel=2)
        return None


def run(shapes: str = "all", names: Sequence[str] | None = None) -> list[Row]:
    """Times the GEMM.

    Args:
      shapes: "smoke", "quick" or "all"; a key of SHAPES.
      names: of the variants to time; None for all of them, each where it is worth its time.

    Returns:
      A row for each problem and variant: ``m``, ``n``, ``k``, ``variant``, what
      ``turns.by_turns`` states, ``tflop_per_s`` and ``gb_per_s``, or ``us`` None and ``error``.
    """
    known = {variant.name for variant in VARIANTS}
    if not known.issuperset(names or ()):
        raise ValueError(f"unknown among {', '.join(names or ())}; there are {', '.join(known)}")
    here = "gpu" if timing.on_gpu() else "cpu"
    variants = [
        variant
        for variant in VARIANTS
        if variant.where in (here, "any") and (names is None or variant.name in names)
    ]
    problems = SHAPES[shapes]
    jobs = {p: [v for v in variants if v.takes(p)] for p in problems}
    native = here == "gpu"
    rows: list[Row] = []
    total = sum(map(len, jobs.values())) + len(NATIVE) * len(problems) * native
    with tqdm(total=total, desc="gemm", unit="timing") as bar, ThreadPoolExecutor(1) as aside:
        starting = aside.submit(_start if native else lambda: None)
        for layer in dict.fromkeys(problem[1:] for problem in problems):
            weights = operands.Weights(*layer)
            of_layer = [problem for problem in problems if problem[1:] == layer]
            pairs = [(problem, variant) for problem in of_layer for variant in jobs[problem]]
            bar.set_postfix_str("compiling " + "x".join(map(str, layer)))
            prepared = timing.prepare_all(
                [functools.partial(_prepare, problem, v, weights) for problem, v in pairs]
            )
            server = starting.result()
            for problem in of_layer:
                bar.set_postfix_str("x".join(map(str, problem)))
                mine = [c for (p, _), c in zip(pairs, prepared, strict=True) if p == problem]
                for row in _measure(problem, jobs[problem], mine, server):
                    rows.append(row)
                    bar.update()
    return rows


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    return tables.gemm(rows)
