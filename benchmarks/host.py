"""What a call inside a jit costs the host once XLA has captured it: it should be nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import jax_fp8
from benchmarks import operands, tables, timing

Row = dict[str, Any]

KEYS = ("n",)
REFERENCE = "bf16"
FIGURES = ("host_us",)
#: Calls of the short chain, and the size of each: so small that the device is never waited for.
CALLS = {"smoke": 2, "quick": 64, "all": 64}
M, SIZE = 16, 256
#: Of each chain in a row, and how often it is its turn.
RUNS, ROUNDS = 30, 5


def _bf16(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=x.dtype)


def _matmul(recipe: str) -> Callable[[jax.Array, Any], jax.Array]:
    return lambda x, w: jax_fp8.matmul(x, w, recipe=recipe)


VARIANTS: dict[str, tuple[operands.Prepare, Callable[..., jax.Array]]] = {
    "bf16": (operands.wide, _bf16),
    "tensorwise": (operands.tensor, _matmul("tensorwise")),
    "rowwise": (operands.row, _matmul("rowwise")),
    "weight_only": (operands.row, _matmul("weight_only")),
}


def _chain(call: Callable[..., jax.Array], calls: int) -> Callable[..., jax.Array]:
    def run(x: jax.Array, w: Any) -> jax.Array:
        for _ in range(calls):
            x = call(x, w) * jnp.asarray(SIZE**-0.5, x.dtype)
        return x

    return run


def _handler_calls() -> int:
    return sum(plan["count"] for plan in jax_fp8.plans() if plan["when"] == "run")


def _measure(name: str, calls: int) -> Row:
    prepare, call = VARIANTS[name]
    given = (operands.normal(0, (M, SIZE)), *jax.jit(prepare)(operands.normal(1, (SIZE, SIZE))))
    chains = {length: _chain(call, length) for length in (calls, 2 * calls)}
    # By turns, so that all of them see the host as it is at the time.
    cases = [(length, moving) for length in chains for moving in (False, True)]
    found: dict[tuple[int, bool], list[float]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for length, moving in cases:
            us = timing.dispatch_us(chains[length], given, RUNS, moving=moving)
            found[length, moving].append(us)
    medians = {case: statistics.median(times) for case, times in found.items()}
    short = medians[calls, False]
    program = jax.jit(chains[calls]).lower(*given).compile()
    for _ in range(5):
        program(*given).block_until_ready()
    jax_fp8.clear_plans()
    for _ in range(10):
        program(*given).block_until_ready()
    return {
        "us": short / calls,
        "host_us": (medians[2 * calls, False] - short) / calls,
        "dispatch_us": short,
        "moved_dispatch_us": medians[calls, True],
        "handler_calls": _handler_calls(),
    }


def run(shapes: str = "all") -> list[Row]:
    """Times the dispatch of chains of n and 2n calls that feed each other.

    Returns:
      A row for each variant: ``n``, ``variant``, ``dispatch_us`` (the host's time in a chain of
      n, until it returns), ``moved_dispatch_us`` (the same where results come to lie elsewhere
      than the last time, so that XLA writes its graphs anew), ``host_us`` (what each of n more
      calls adds to the former), ``us`` (``dispatch_us`` over n) and ``handler_calls`` (how often a
      handler of jax_fp8 was entered in 10 runs after the first ones, in which XLA captures its
      graphs), or ``error``.
    """
    rows: list[Row] = []
    for name in tqdm(VARIANTS, desc="host"):
        row: Row = {"n": CALLS[shapes], "variant": name}
        try:
            row |= _measure(name, CALLS[shapes])
        except Exception as error:
            row |= tables.failure(error)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    lines = [
        [
            row["variant"],
            tables.number(row.get("dispatch_us")),
            tables.number(row.get("moved_dispatch_us")),
            tables.number(row.get("host_us")),
            tables.number(row.get("handler_calls")),
        ]
        for row in rows
    ]
    n = rows[0]["n"]
    title = (
        f"The host's time in us for a jitted chain of n = {n} products of {M} x {SIZE} x {SIZE}, "
        "also where results come to lie elsewhere than the last time and XLA writes its graphs "
        "anew, what each call adds to the former (from a chain of 2n), and how often a handler was "
        "entered in 10 runs after XLA had captured its graphs."
    )
    header = ["", "dispatch of n", "with other buffers", "each call", "handlers entered"]
    parts = [title, tables.markdown(header, lines)]
    return tables.assemble(parts, tables.errors(rows, KEYS))
