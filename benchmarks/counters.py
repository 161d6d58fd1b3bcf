"""What limits a kernel: the counters of the hardware while it runs, read by Nsight Compute (ncu).

``ncu`` runs ``python -m benchmarks.counters CASE``, which calls an operation twice, and reads its
second kernel. The time is that of a cold L2 cache with nothing in front; other benchmarks have that
of a chain.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import jax_fp8
from benchmarks import ROOT, operands, tables, timing
from benchmarks.nvcc import find_nvcc
from benchmarks.server import Unavailable

Row = dict[str, Any]

KEYS = ("work",)
BY_NAME = True

#: Field of a row -> (ncu's name for it, what it is in the table).
COUNTERS = {
    "us": ("Duration", "us"),
    "memory_percent": ("DRAM Throughput", "memory, %"),
    "issue_percent": ("Issue Slots Busy", "issue slots, %"),
    "warps_percent": ("Achieved Occupancy", "warps, %"),
    "cycles": ("Warp Cycles Per Issued Instruction", "cycles an instruction"),
    "registers": ("Registers Per Thread", "registers"),
}
_SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
_MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3}
TIMEOUT_S = 120.0

#: What is called, and with what.
Call = tuple[Callable[..., Any], tuple[Any, ...]]


def _norm(operation: Callable[..., Any], vectors: int, shape: tuple[int, int]) -> Call:
    weights = [jnp.ones(shape[1:], jnp.bfloat16)] * vectors
    return functools.partial(operation, granularity="row"), (operands.normal(0, shape), *weights)


def _gelu(granularity: str, shape: tuple[int, int]) -> Call:
    call = functools.partial(jax_fp8.gelu_quantize, granularity=granularity)
    return call, (operands.normal(0, shape),)


def _product(m: int) -> Call:
    (x,), (w,) = (operands.row(operands.normal(i, (s, 4096))) for i, s in enumerate((m, 28672)))
    call = functools.partial(jax_fp8.scaled_matmul, preferred_element_type=jnp.bfloat16)
    return call, (x, w)


def cases(shapes: str) -> dict[str, tuple[str, Callable[[], Call]]]:
    """Name -> (the kernel's name, what makes the call); less and smaller ones for "smoke"."""
    found: dict[str, tuple[str, Callable[[], Call]]] = {}
    for rows in (3,) if shapes == "smoke" else (2048, 8192):
        for name, operation, vectors in (
            ("rms_norm", jax_fp8.rms_norm_quantize, 1),
            ("layer_norm", jax_fp8.layer_norm_quantize, 2),
        ):
            make = functools.partial(_norm, operation, vectors, (rows, 4096))
            found[f"{name} {rows} x 4096, row"] = ("row_kernel", make)
    if shapes == "smoke":
        return found
    for granularity in ("row", "tensor"):
        make = functools.partial(_gelu, granularity, (2048, 14336))
        found[f"gelu 2048 x 14336, {granularity}"] = ("row_kernel", make)
    for m in (1, 16):
        make = functools.partial(_product, m)
        found[f"product {m} x 28672 x 4096, row"] = ("small_m_hopper_kernel", make)
    return found


def _find_ncu() -> str:
    beside = str(pathlib.Path(find_nvcc()).parent)
    for path in (None, beside):
        if found := shutil.which("ncu", path=path):
            return found
    raise Unavailable("no ncu: put Nsight Compute's on PATH")


def parse(text: str) -> Row:
    """The fields of ``COUNTERS`` from what ncu says of the last kernel in its report."""
    row: Row = {}
    for field, (name, _) in COUNTERS.items():
        lines = re.findall(rf"^ +{re.escape(name)} +(\S*?) +([\d,.]+)$", text, re.MULTILINE)
        if not lines:
            raise RuntimeError(f"ncu says nothing of {name!r}:\n{text.strip()[-500:]}")
        unit, value = lines[-1]
        row[field] = float(value.replace(",", "")) * _MICROSECONDS.get(unit, 1.0)
    return row


def _read(name: str, kernel: str) -> Row:
    command = [_find_ncu(), "--clock-control", "none", "--page", "details"]
    command += [part for section in _SECTIONS for part in ("--section", section)]
    command += ["--kernel-name", f"regex:{kernel}", "--launch-skip", "1", "--launch-count", "1"]
    command += [sys.executable, "-m", "benchmarks.counters", name]
    # A kernel of a graph would be no launch of its own.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    own = {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        env={**os.environ, **own},
    )
    if done.returncode:
        raise RuntimeError(f"ncu: {(done.stdout + done.stderr).strip()[-500:]}")
    return parse(done.stdout)


def _call_twice(make: Callable[[], Call]) -> float:
    """Microseconds of the host in the second."""
    call, arrays = make()
    call = jax.jit(call)
    jax.block_until_ready(call(*arrays))
    start = time.perf_counter()
    jax.block_until_ready(call(*arrays))
    return 1e6 * (time.perf_counter() - start)


def run(shapes: str = "all") -> list[Row]:
    """Reads the counters; ``shapes`` is "smoke", "quick" or "all".

    Returns:
      A row for each case: ``work``, ``variant``, which is the kernel's name, and the fields of
      ``COUNTERS``, or ``us`` None and ``error``. Where there is no GPU, ``us`` is the host's and
      there is nothing else.
    """
    rows = []
    for name, (kernel, make) in tqdm(cases(shapes).items(), desc="counters", unit="kernel"):
        row: Row = {"work": name, "variant": kernel}
        try:
            row |= _read(name, kernel) if timing.on_gpu() else {"us": _call_twice(make)}
        except Exception as error:
            row |= tables.failure(error)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """The rows of ``run`` as Markdown."""
    lines = [
        [row["work"], *(tables.number(row.get(field), "{:.3g}") for field in COUNTERS)]
        for row in rows
        if row.get("us") is not None
    ]
    title = (
        "What limits a kernel, by the hardware's counters: shares of memory's peak, of the"
        " multiprocessors' issue slots and of the warps that they can hold, the cycles from one"
        " instruction of a warp to its next one, and registers a thread. The time is of a cold L2"
        " cache, and longer than elsewhere."
    )
    header = ["", *(said for _, said in COUNTERS.values())]
    return tables.assemble([title, tables.markdown(header, lines)], tables.errors(rows, KEYS))


if __name__ == "__main__":
    _call_twice((cases("smoke") | cases("all"))[sys.argv[1]][1])
