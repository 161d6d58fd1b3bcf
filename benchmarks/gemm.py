"""The GEMM: f16 and bf16 through XLA, FP8 through jax_fp8, and cublasLt called from C++."""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import jax_fp8
from benchmarks import heuristic, tables, timing

Row = dict[str, Any]
Problem = tuple[int, int, int]  # M, N, K

MS = (1, 16, 128, 2048, 8192)
#: N and K of the dense layers of Llama 3 8B: query, key and value; output; gate and up; down.
LLAMA = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
CUBE = (8192, 8192, 8192)
SHAPES: dict[str, tuple[Problem, ...]] = {
    "smoke": ((1, 32, 64), (16, 32, 64), (16, 48, 32)),
    "quick": tuple((m, n, k) for n, k in ((4096, 4096), (28672, 4096)) for m in (1, 128, 8192)),
    "llama": tuple((m, n, k) for n, k in LLAMA for m in MS),
}
SHAPES["all"] = (*SHAPES["llama"], CUBE)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to multiply.

    Attributes:
      name: in the rows.
      operands: which operands it takes: "bf16", "f16", "fp8" or "fp8_row".
      call: of x (M, K) and w (N, K).
      unit: whose peak rate bounds it, a key of ``timing.PEAK_FLOP_PER_S``.
      where: "gpu", "cpu" or "any".
      default: whether it runs without being asked for.
      options: for XLA's compiler.
    """

    name: str
    operands: str
    call: Callable[[Any, Any], jax.Array]
    unit: str
    where: str = "gpu"
    default: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def takes(self, problem: Problem) -> bool:
        """Whether this problem is timed: with the naive kernel, the small ones and one large."""
        return self.name != "naive" or problem[0] <= 128 or problem == CUBE


def _wide(dtype: Any) -> Callable[[Any, Any], jax.Array]:
    return lambda x, w: jnp.einsum("mk,nk->mn", x, w, preferred_element_type=dtype)


def _scaled(implementation: str, precision: Any = None) -> Callable[[Any, Any], jax.Array]:
    return lambda x, w: jax_fp8.scaled_matmul(
        x,
        w,
        preferred_element_type=jnp.bfloat16,
        precision=precision,
        implementation=implementation,
    )


#: So that "bf16" and "f16" are cuBLAS, the best algorithm that XLA's autotuning finds.
_CUBLAS = {"xla_gpu_enable_triton_gemm": False}
VARIANTS = (
    Variant("bf16", "bf16", _wide(jnp.bfloat16), "16bit", "any", options=_CUBLAS),
    Variant("f16", "f16", _wide(jnp.float16), "16bit", "any", options=_CUBLAS),
    Variant("bf16_autotuned", "bf16", _wide(jnp.bfloat16), "16bit", "gpu", default=False),
    Variant("naive", "fp8", _scaled("naive"), "naive", "any"),
    Variant("xla", "fp8", _scaled("xla"), "naive", "cpu"),
    Variant("cublaslt", "fp8", _scaled("cublaslt"), "fp8"),
    Variant("cublaslt_row", "fp8_row", _scaled("cublaslt"), "fp8"),
    Variant("cublaslt_precise", "fp8", _scaled("cublaslt", jax.lax.Precision.HIGHEST), "fp8"),
    Variant("decode", "fp8", _scaled("decode"), "16bit"),
)


def _itemsize(operands: str) -> int:
    return 2 if operands in ("bf16", "f16") else 1


def work(problem: Problem, operands: str) -> tuple[float, float]:
    """Fewest bytes (operands once, the 16-bit result once) and operations."""
    m, n, k = problem
    return float(_itemsize(operands) * (m * k + n * k) + 2 * m * n), 2.0 * m * n * k


def _floor(problem: Problem, variant: Variant) -> float:
    return timing.floor_us(*work(problem, variant.operands), variant.unit)


@jax.jit(static_argnums=(1, 2))
def _random(seed: int, shape: tuple[int, int], operands: str) -> Any:
    values = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    if not operands.startswith("fp8"):
        return values.astype(jnp.float16 if operands == "f16" else jnp.bfloat16)
    quantized = jax_fp8.quantize(values)
    if operands == "fp8":
        return quantized
    return jax_fp8.ScaledArray(
        quantized.data, jnp.broadcast_to(quantized.scale, (shape[0], 1)), "row"
    )


class _Weights:
    """Rotating copies of the (N, K) weights, of each kind of operand, made as they are needed."""

    def __init__(self, n: int, k: int) -> None:
        self._shape = (n, k)
        self._made: dict[str, list[tuple[Any]]] = {}
        self._lock = threading.Lock()

    def get(self, operands: str, calls: int) -> list[tuple[Any]]:
        n, k = self._shape
        count = timing.copies_for(_itemsize(operands) * n * k, calls)
        with self._lock:
            made = self._made.setdefault(operands, [])
            for seed in range(len(made), count):
                made.append((_random(1 + seed, self._shape, operands),))
            return made[:count]


def _describe(problem: Problem, variant: Variant, time: timing.Timing) -> Row:
    nbytes, flop = work(problem, variant.operands)
    return {
        **dataclasses.asdict(time),
        "tflop_per_s": flop / time.us * 1e-6,
        "gb_per_s": nbytes / time.us * 1e-3,
    }


def _base(problem: Problem, name: str) -> Row:
    m, n, k = problem
    return {"m": m, "n": n, "k": k, "variant": name}


def _measure(problem: Problem, variants: Sequence[Variant], weights: _Weights) -> Iterator[Row]:
    """Times the variants on one problem."""
    m, _, k = problem

    def prepare(variant: Variant) -> timing.Chains:
        floor = _floor(problem, variant)
        rotated = weights.get(variant.operands, timing.calls_for(floor))
        x = _random(0, (m, k), variant.operands)
        return timing.Chains(variant.call, (x,), rotated, floor, variant.options)

    prepared = timing.prepare_all([functools.partial(prepare, variant) for variant in variants])
    for variant, chains in zip(variants, prepared, strict=True):
        row = _base(problem, variant.name)
        try:
            if isinstance(chains, Exception):
                raise chains
            jax_fp8.clear_plans()
            row |= _describe(problem, variant, chains.time())
            algorithms = {plan["algorithm"] for plan in jax_fp8.plans() if "algorithm" in plan}
            if algorithms:
                row["algorithm"] = "; ".join(sorted(algorithms))
        except Exception as error:
            row |= tables.failure(error)
        yield row


def _dispatch(problem: Problem, variants: Sequence[Variant]) -> dict[str, float]:
    """The host's time in one jitted call, for each variant that runs on a problem."""
    (m, n, k), found = problem, {}
    for variant in variants:
        operands = _random(0, (m, k), variant.operands), _random(1, (n, k), variant.operands)
        try:
            found[variant.name] = timing.dispatch_us(variant.call, operands)
        except Exception as error:
            warnings.warn(f"dispatch of {variant.name}: {error}", stacklevel=2)
    return found


def _native(problems: Sequence[Problem]) -> Iterator[Row]:
    """cublasLt without JAX, from ``heuristic.cu``."""
    fp8 = next(variant for variant in VARIANTS if variant.name == "cublaslt")
    tasks = []
    for problem in problems:
        calls = timing.calls_for(_floor(problem, fp8))
        tasks.append((*problem, calls, timing.copies_for(problem[1] * problem[2], calls)))
    for found in heuristic.run(tasks):
        problem = (found["m"], found["n"], found["k"])
        nbytes, flop = work(problem, "fp8")
        for name in ("cpp_first", "cpp_best"):
            row = _base(problem, name) | found.get(name, {"us": None})
            if row["us"]:
                row["tflop_per_s"] = flop / row["us"] * 1e-6
                row["gb_per_s"] = nbytes / row["us"] * 1e-3
            if "error" in found:
                row["error"] = found["error"]
            yield row


def run(
    shapes: str = "all", names: Sequence[str] | None = None, native: bool = True
) -> list[dict[str, Any]]:
    """Times the GEMM.

    Args:
      shapes: "smoke", "quick", "llama" or "all"; a key of SHAPES.
      names: of the variants to time; None for the default ones.
      native: whether to time cublasLt from C++ as well, where there is nvcc and a GPU.

    Returns:
      A row for each problem and variant: ``m``, ``n``, ``k``, ``variant``, what
      ``timing.Timing`` states, ``tflop_per_s`` and ``gb_per_s``, or ``us`` None and ``error``.
    """
    known = {variant.name for variant in VARIANTS}
    if not known.issuperset(names or ()):
        raise ValueError(f"unknown among {', '.join(names or ())}; there are {', '.join(known)}")
    here = "gpu" if timing.on_gpu() else "cpu"
    variants = [
        variant
        for variant in VARIANTS
        if variant.where in (here, "any") and (variant.name in names if names else variant.default)
    ]
    problems = SHAPES[shapes]
    native = native and here == "gpu"
    rows: list[Row] = []
    jobs = {p: [v for v in variants if v.takes(p)] for p in problems}
    total = sum(map(len, jobs.values())) + 2 * len(problems) * native
    with tqdm(total=total, desc="gemm", unit="timing") as bar:
        for layer in dict.fromkeys(problem[1:] for problem in problems):
            weights = _Weights(*layer)
            for problem in (problem for problem in problems if problem[1:] == layer):
                bar.set_postfix_str("x".join(map(str, problem)))
                for row in _measure(problem, jobs[problem], weights):
                    rows.append(row)
                    bar.update()
        if native:
            try:
                for row in _native(problems):
                    rows.append(row)
                    bar.update()
            except (heuristic.Unavailable, OSError, ValueError) as error:
                warnings.warn(f"cublasLt from C++ is left out: {error}", stacklevel=2)
    smallest = min(problems, key=lambda p: p[0] * p[1] * p[2])
    dispatch = _dispatch(smallest, variants)
    for row in rows:
        if (row["m"], row["n"], row["k"]) == smallest and row["variant"] in dispatch:
            row["dispatch_us"] = dispatch[row["variant"]]
    return rows


def table(results: list[dict[str, Any]]) -> str:
    """The rows of ``run`` as Markdown."""
    return tables.gemm(results)
