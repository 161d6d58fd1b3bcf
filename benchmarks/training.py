"""A dense layer in training, bf16 in and out: value and gradients, by jax_fp8, XLA and flax.

Its parts, alone, tell where the time goes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from tqdm import tqdm

import jax_fp8
from benchmarks import operands, tables, timing, turns
from benchmarks.dense_layers import E4M3, E5M2, LAYERS, Problem, kept_bytes
from benchmarks.hlo import ran_fp8

Row = dict[str, Any]

KEYS = ("part", "m", "n", "k")
REFERENCE = "bf16"
SHAPES: dict[str, tuple[Problem, ...]] = {
    "smoke": ((32, 48, 64),),
    "quick": ((4096, 4096, 4096),),
    "all": ((8192, 14336, 4096), (4096, 4096, 4096)),
}

#: Value and gradients; every other part is a product, or a quantization, of these.
STEP = "step"

#: With the shapes "smoke" few are timed: they take a CPU long to compile.
_SMOKE_LAYERS = ("bf16", "delayed", "flax_direct")
_SMOKE_PARTS = (("forward", "bf16"), ("dgrad", "row"), ("cast w", "block"))


def _layers(shapes: str) -> list[str]:
    flax = importlib.util.find_spec("flax") is not None
    names = _SMOKE_LAYERS if shapes == "smoke" else LAYERS
    return [name for name in names if flax or not name.startswith("flax")]


# --- The parts ------------------------------------------------------------------------------------

#: Name in the rows -> granularity of (activations and gradients, weights).
GRANULARITIES: dict[str, tuple[Any, Any]] = {
    "tensor": ("tensor", "tensor"),
    "delayed": ("tensor", "tensor"),
    "row": ("row", "row"),
    "block": ((1, 128), (128, 128)),
}
#: A product: what it multiplies, each as (operand, whether it is transposed); both contract their
#: last axis. The forward one alone accumulates fast.
PRODUCTS = {
    "forward": (("x", False), ("w", True)),
    "dgrad": (("dy", False), ("w", False)),
    "wgrad": (("x", True), ("dy", True)),
}
CASTS = {"cast x": "x", "cast w": "w", "cast dy": "dy"}


def _shape(problem: Problem, operand: str) -> tuple[int, int]:
    m, n, k = problem
    return {"x": (m, k), "w": (k, n), "dy": (m, n)}[operand]


def _both(x: jax.Array, operand: str, variant: str, layouts: tuple[bool, bool]) -> Any:
    """The operand in FP8, as it lies and transposed, as the recipe of the variant does it."""
    granularity = GRANULARITIES[variant][operand == "w"]
    dtype = E5M2 if operand == "dy" else E4M3
    # Gradients have dynamic scales. A scale that fits is as good here as a known one.
    known = variant == "delayed" and operand != "dy"
    return jax_fp8.cast_transpose(
        x,
        dtype=dtype,
        granularity=granularity,
        scale=jnp.float32(5 / 448) if known else None,
        straight=layouts[0],
        transposed=layouts[1],
        return_amax=known,
    )


def _product(variant: str, part: str) -> Callable[..., jax.Array]:
    if variant == "bf16":
        (_, turned_a), (_, turned_b) = PRODUCTS[part]
        dimensions = (((0 if turned_a else 1,), (0 if turned_b else 1,)), ((), ()))
        return lambda a, b: lax.dot_general(a, b, dimensions, preferred_element_type=a.dtype)
    return functools.partial(
        jax_fp8.scaled_matmul,
        preferred_element_type=jnp.bfloat16,
        precision=None if part == "forward" else "highest",
    )


def _operands(variant: str, part: str, problem: Problem, seed: int) -> tuple[Any, ...]:
    """Of a product: two, ready for it."""

    def ready(i: int, operand: str, turned: bool) -> Any:
        wide = operands.normal(2 * seed + i, _shape(problem, operand))
        if variant == "bf16":
            return wide
        return _both(wide, operand, variant, (not turned, turned))[turned]

    return tuple(ready(i, *one) for i, one in enumerate(PRODUCTS[part]))


def _prepare_part(problem: Problem, part: str, variant: str) -> timing.Chains:
    m, n, k = problem
    make: Callable[[int], tuple[Any, ...]]
    call: Callable[..., Any]
    if part in PRODUCTS:
        unit = "16bit" if variant == "bf16" else "fp8"
        floor = timing.floor_us(0.0, 2.0 * m * n * k, unit)
        make = jax.jit(functools.partial(_operands, variant, part, problem))
        call = _product(variant, part)
    else:
        operand = CASTS[part]
        rows, columns = _shape(problem, operand)
        floor = timing.floor_us(4.0 * rows * columns)
        make = lambda seed: (operands.normal(seed, (rows, columns)),)  # noqa: E731
        call = functools.partial(_both, operand=operand, variant=variant, layouts=(True, True))
    count = timing.copies_for(operands.nbytes(jax.eval_shape(make, 1)), timing.calls_for(floor))
    return timing.Chains(call, (), [make(seed) for seed in range(count)], floor)


def _parts(shapes: str) -> tuple[tuple[str, str], ...]:
    """Part and variant."""
    if shapes == "smoke":
        return _SMOKE_PARTS
    # Known scales make no other product.
    products = [(part, name) for part in PRODUCTS for name in ("bf16", "tensor", "row", "block")]
    return (*products, *((part, name) for part in CASTS for name in GRANULARITIES))


# --- Timing ---------------------------------------------------------------------------------------


def _lead_s(problem: Problem) -> float:
    """Of one of the three products."""
    m, n, k = problem
    return timing.lead_s(2.0 * (m * k + k * n + m * n), 2.0 * m * n * k)


def _prepare_step(problem: Problem, name: str, weights: operands.Weights) -> timing.Chains:
    m, n, k = problem
    floor = timing.floor_us(0.0, 3 * 2.0 * m * n * k, "fp8")
    x, dy = operands.normal(0, (m, k)), operands.normal(3, (m, n))
    rotated = weights.get(operands.wide, timing.calls_for(floor))
    state = jax.jit(LAYERS[name].start)(x, *rotated[0])
    return timing.Chains(LAYERS[name].step, (state, x, dy), rotated, floor)


@jax.jit
def _off(result: jax.Array, expected: jax.Array) -> jax.Array:
    a, b = result.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(b**2))


def _steps(problem: Problem, prepared: dict[str, Any]) -> Iterator[Row]:
    """The layers by turns, and how far their results are from bf16's."""
    m, n, k = problem
    wide: Any = None
    timed = turns.by_turns(list(prepared.values()), lead_s=_lead_s(problem))
    for name, found in zip(prepared, timed, strict=True):
        row: Row = {"part": STEP, "m": m, "n": n, "k": k, "variant": name}
        if isinstance(found, Exception):
            yield row | tables.failure(found)
            continue
        row |= found
        results = prepared[name].first()[:3]
        wide = results if name == "bf16" else wide
        if wide is not None:
            for what, result, expected in zip(("y", "dx", "dw"), results, wide, strict=True):
                row[f"{what}_off_bf16"] = float(_off(result, expected))
        if name != "bf16":
            row["fp8"] = ran_fp8(found["multiplied"])
        if name.startswith("flax"):
            row["version"] = importlib.metadata.version("flax")
        if m != n:  # Else sizes do not tell activations from weights.
            kept = kept_bytes(LAYERS[name], problem)
            row |= dict(zip(("activation_bytes", "weight_bytes"), kept, strict=True))
        yield row


def run(shapes: str = "all") -> list[Row]:
    """Times the step of every layer that is here, and its parts; ``shapes`` is a key of SHAPES.

    Returns:
      A row for each problem, part and variant: ``part``, ``m``, ``n``, ``k``, ``variant`` and what
      ``turns.by_turns`` states, or ``us`` None and ``error``. Rows of the step also have ``fp8``
      (whether all that multiplies does so in FP8), ``y_off_bf16``, ``dx_off_bf16`` and
      ``dw_off_bf16`` (RMS of the difference over RMS), ``activation_bytes`` and ``weight_bytes``
      (what is kept for the gradients), and ``version`` of flax.
    """
    rows: list[Row] = []
    names, parts = _layers(shapes), _parts(shapes)
    total = len(SHAPES[shapes]) * (len(names) + len(parts))
    with tqdm(total=total, desc="training", unit="timing") as bar:
        for problem in SHAPES[shapes]:
            m, n, k = problem
            weights = operands.Weights(k, n)
            bar.set_postfix_str("x".join(map(str, problem)))
            timing.head_start()
            jobs = [functools.partial(_prepare_step, problem, name, weights) for name in names]
            prepared = dict(zip(names, timing.prepare_all(jobs), strict=True))
            for row in _steps(problem, prepared):
                rows.append(row)
                bar.update()
            del prepared, weights
            for part in dict.fromkeys(part for part, _ in parts):
                variants = [variant for p, variant in parts if p == part]
                alone = timing.prepare_all(
                    [functools.partial(_prepare_part, problem, part, v) for v in variants]
                )
                timed = turns.by_turns(alone, lead_s=_lead_s(problem) if part in PRODUCTS else 0.0)
                for variant, found in zip(variants, timed, strict=True):
                    row = {"part": part, "m": m, "n": n, "k": k, "variant": variant}
                    failed = isinstance(found, Exception)
                    rows.append(row | (tables.failure(found) if failed else found))
                    bar.update()
    return rows


# --- The table ------------------------------------------------------------------------------------


def _said(group: tables.Group, name: str) -> str:
    us = tables.number(tables.value(group, name))
    over = tables.ratio(group, "bf16", name)
    said = us if name == "bf16" or over is None else f"{us} ({over:.2f}x)"
    return said if group.get(name, {}).get("fp8", True) else f"{said} *"


def _kept(group: tables.Group, name: str) -> list[str]:
    """Megabytes kept of activations and of weights, the former also over bf16's."""
    of_x, of_w = (tables.value(group, name, f"{what}_bytes") for what in ("activation", "weight"))
    if of_x is None or of_w is None:
        return ["-", "-"]
    wide = tables.value(group, "bf16", "activation_bytes")
    share = f" ({of_x / wide:.2f})" if wide else ""
    return [f"{of_x * 1e-6:.1f}{share}", f"{of_w * 1e-6:.1f}"]


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown: the step, then its parts, then errors."""
    steps = {key[1:]: group for key, group in tables.groups(rows, KEYS).items() if key[0] == STEP}
    first = next((g for g in steps.values() if "activation_bytes" in g.get("bf16", {})), {})
    names = [name for name in LAYERS if any(name in group for group in steps.values())]
    titles = [" x ".join(map(str, key)) for key in steps]

    def ran(name: str) -> str:
        found = [group[name] for group in steps.values() if "fp8" in group.get(name, {})]
        if not found:
            return "-"
        some = [any(kind.startswith("f8") for kind in row["multiplied"]) for row in found]
        return "yes" if all(row["fp8"] for row in found) else "partly" if any(some) else "no"

    parts = [
        "Device time in us of a dense layer's value and both gradients at M x N x K, bf16 in and"
        " out, weights quantized in the step, and how many times as fast as bf16. What is kept for"
        " the gradients, in MB: of the activation (over bf16's) and of the weight, whose own bf16"
        ' copy is an argument. "*" where the compiled program multiplies in 16 or 32 bits too.',
        tables.markdown(
            ["", "FP8 ran", *titles, "kept of x", "kept of w"],
            [
                [LAYERS[n].said, ran(n), *(_said(g, n) for g in steps.values()), *_kept(first, n)]
                for n in names
            ],
        ),
        "The same layer's products alone, of operands that are ready, and its quantizations, each"
        " with its transpose, in us. The products of `delayed` are those of `tensor`.",
        _parts_table(rows),
        "RMS of the difference to bf16's y / dx / dw over the RMS.",
        tables.markdown(
            ["", *titles],
            [[LAYERS[n].said, *(_errors(g, n) for g in steps.values())] for n in names],
        ),
    ]
    return tables.assemble(parts, tables.errors(rows, KEYS))


def _errors(group: tables.Group, name: str) -> str:
    found = (tables.value(group, name, f"{what}_off_bf16") for what in ("y", "dx", "dw"))
    return " / ".join(tables.number(x, "{:.1e}") for x in found)


def _parts_table(rows: list[Row]) -> str:
    by_part = tables.groups(rows, KEYS)
    names = ["bf16", *GRANULARITIES]
    lines = []
    for problem in dict.fromkeys(key[1:] for key in by_part):
        size, sums = " x ".join(map(str, problem)), dict.fromkeys(names, 0.0)
        for part in (*PRODUCTS, *CASTS):
            group = by_part.get((part, *problem), {})
            lines.append([size, part, *(tables.number(tables.value(group, n)) for n in names)])
            for name in names:
                us = tables.value(group, name)
                if name == "delayed" and part in PRODUCTS:
                    us = tables.value(group, "tensor")
                sums[name] += us or (0.0 if name == "bf16" and part in CASTS else float("nan"))
        known = (None if us != us else us for us in sums.values())
        lines.append([size, "sum", *map(tables.number, known)])
    return tables.markdown(["", "part", *names], lines)
