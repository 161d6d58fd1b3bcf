"""What a dense layer costs before it runs: compilation and first call, in fresh processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from tqdm import tqdm

from benchmarks import tables

Row = dict[str, Any]
Shape = tuple[int, int, int]

KEYS = ("m", "n", "k")
REFERENCE = "bf16"
FIGURES = ("until_first_ms",)
SHAPES: dict[str, tuple[Shape, ...]] = {
    "smoke": ((16, 64, 64),),
    "quick": ((2048, 4096, 4096),),
    "all": ((2048, 4096, 4096),),
}
REPEATS = {"smoke": 1, "quick": 1, "all": 3}

#: Name in the rows -> (what the process runs, whether cublasLt's algorithms are chosen already).
VARIANTS: dict[str, tuple[str, bool]] = {
    "bf16": ("x @ w.T", False),
    "matmul": ("jax_fp8.matmul(x, wq)", False),
    "matmul_cached": ("jax_fp8.matmul(x, wq)", True),
    "quantize_matmul": ("jax_fp8.matmul(x, jax_fp8.quantize(w))", False),
    "quantize_matmul_cached": ("jax_fp8.matmul(x, jax_fp8.quantize(w))", True),
}

#: The backend is up and the operands are there before anything is timed.
PROCESS = """
import json, time
import jax, jax.numpy as jnp
import jax_fp8
x = jax.random.normal(jax.random.key(0), ({m}, {k}), jnp.bfloat16)
w = jax.random.normal(jax.random.key(1), ({n}, {k}), jnp.bfloat16)
wq = jax_fp8.quantize(w)
jax.block_until_ready((x, wq))
times = [time.perf_counter()]
def step(result):
    times.append(time.perf_counter())
    return result
lowered = step(jax.jit(lambda x, w, wq: {call}).lower(x, w, wq))
compiled = step(lowered.compile())
for _ in range(4):
    step(compiled(x, w, wq).block_until_ready())
names = ("lower_ms", "compile_ms", "first_ms", "second_ms", "third_ms", "fourth_ms")
found = {{name: 1e3 * (b - a) for name, a, b in zip(names, times, times[1:])}}
choices = [p["choice"] for p in jax_fp8.plans() if "choice" in p]
print(json.dumps({{**found, "choice": ", ".join(choices)}}))
"""


def _process(shape: Shape, call: str, cache: str) -> Row:
    m, n, k = shape
    environment = {**os.environ, "JAX_FP8_CACHE_DIR": cache, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # This process has a share.
    script = PROCESS.format(m=m, n=n, k=k, call=call)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise RuntimeError(next((line for line in lines[::-1] if "Error" in line), lines[-1]))
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(shape: Shape, name: str, repeats: int) -> Row:
    call, cached = VARIANTS[name]
    row: Row = {"m": shape[0], "n": shape[1], "k": shape[2], "variant": name}
    try:
        found = []
        with tempfile.TemporaryDirectory() as folder:
            if cached:
                _process(shape, call, folder)
            for i in range(repeats):
                found.append(_process(shape, call, folder if cached else f"{folder}/{i}"))
    except Exception as error:  # One that cannot run must not lose the others.
        return row | tables.failure(error)
    row["choice"] = found[0].pop("choice")
    row |= {key: statistics.median(each[key] for each in found) for key in found[0]}
    row["until_first_ms"] = row["lower_ms"] + row["compile_ms"] + row["first_ms"]
    return row | {"processes": repeats}


def run(shapes: str = "all") -> list[Row]:
    """Times compilation and the first calls; ``shapes`` is a key of SHAPES.

    Returns:
      A row for each shape and variant: ``m``, ``n``, ``k``, ``variant``, ``lower_ms``,
      ``compile_ms``, ``first_ms`` to ``fourth_ms`` (host time until the result is there),
      ``until_first_ms`` (the first three together), ``choice`` (of the algorithms), medians over
      ``processes`` fresh ones; or ``error``.
    """
    rows = []
    with tqdm(total=len(SHAPES[shapes]) * len(VARIANTS), desc="compile", unit="variant") as bar:
        for shape in SHAPES[shapes]:
            for name in VARIANTS:
                bar.set_postfix_str(f"{' x '.join(map(str, shape))} {name}")
                rows.append(_measure(shape, name, REPEATS[shapes]))
                bar.update()
    return rows


def table(results: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    header = ["M", "N x K", "dense layer", "trace", "compile", "first call", "second call"]
    header += ["until the first result", "more than bf16"]
    bf16 = {
        (row["m"], row["n"], row["k"]): row.get("until_first_ms")
        for row in results
        if row["variant"] == "bf16"
    }
    lines = []
    for row in results:
        total, base = row.get("until_first_ms"), bf16.get((row["m"], row["n"], row["k"]))
        name = row["variant"].replace("_cached", ", algorithms known").replace("_", " + ")
        times = [row.get(f"{key}_ms") for key in ("lower", "compile", "first", "second")]
        more = total - base if total is not None and base is not None else None
        lines.append(
            [str(row["m"]), f"{row['n']} x {row['k']}", name]
            + [tables.number(time) for time in (*times, total)]
            + [tables.number(more, "{:+.0f}")]
        )
    said = (
        "In ms, in fresh processes whose backend is up. `matmul` quantizes the activations,"
        " `quantize + matmul` the weights too; compiling times cublasLt's algorithms, unless"
        " they are known from an earlier process."
    )
    return f"{said}\n\n{tables.markdown(header, lines)}"
