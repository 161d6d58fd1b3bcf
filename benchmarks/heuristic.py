"""cublasLt without JAX: compiles ``heuristic.cu``, runs it on the copy that JAX uses."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from benchmarks import ROOT

SOURCE = pathlib.Path(__file__).with_name("heuristic.cu")
Task = tuple[int, int, int, int, int]  # M, N, K, calls in a chain, copies of the weights


class Unavailable(RuntimeError):
    """There is no nvcc, or the program does not compile or run; the text says which and why."""


def find_nvcc() -> str:
    """The nvcc of CUDACXX, of PATH, of a toolkit or of pip's packages, in this order."""
    if given := os.environ.get("CUDACXX"):
        return given
    toolkits = [os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME")]
    folders = [f"{toolkit}/bin" for toolkit in (*toolkits, "/usr/local/cuda") if toolkit]
    for path in (None, os.pathsep.join(folders)):
        if found := shutil.which("nvcc", path=path):
            return found
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        nvcc = pathlib.Path(root) / "cu13" / "bin" / "nvcc"
        if nvcc.exists():
            return str(nvcc)
    raise Unavailable("no nvcc: set CUDACXX, put it on PATH or install cuda-toolkit[nvcc]")


def find_cublaslt() -> str:
    """The cublasLt in this process, else the one that jax_fp8 would load."""
    try:
        maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        maps = []
    for line in maps:
        path = line.split(maxsplit=5)[-1]
        if pathlib.Path(path).name.startswith("libcublasLt.so"):
            return path
    from jax_fp8._src import ffi

    return (ffi._cublaslt_candidates() or ["libcublasLt.so.13"])[0]


def build(folder: str, capability: str | None) -> str:
    """Compiles the program into ``folder`` and returns its path.

    Args:
      folder: an existing one.
      capability: of the device, as "9.0"; None leaves the choice to nvcc.
    """
    nvcc = find_nvcc()
    program = str(pathlib.Path(folder) / "heuristic")
    command = [nvcc, "-O2", "-std=c++20", f"-I{ROOT}", str(SOURCE), "-o", program, "-ldl"]
    if capability:
        command.append(f"-arch=sm_{capability.replace('.', '')}")
    # pip's nvcc stands beside lib/, where it does not look by itself.
    lib = pathlib.Path(nvcc).resolve().parent.parent / "lib"
    if (lib / "libcudart_static.a").exists():
        command.append(f"-L{lib}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{nvcc}: {error}") from error
    if done.returncode:
        raise Unavailable(f"{nvcc} failed:\n{done.stderr.strip()[-2000:]}")
    return program


def run(tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
    """Times cublasLt's first heuristic and the best of up to 8 for each task.

    Yields:
      For each task, as it is done, ``m``, ``n``, ``k`` with ``cpp_first`` and ``cpp_best`` (dicts
      of ``us``, ``us_min``, ``us_iqr``, ``calls``, ``pairs``, ``algorithm``, ``cublaslt``), or
      with ``error``.

    Raises:
      Unavailable: when it cannot be compiled, or ends before all tasks are done.
    """
    capability = getattr(jax.devices()[0], "compute_capability", None)
    left = len(tasks)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        command = [build(folder, capability), find_cublaslt()]
        command += [",".join(map(str, task)) for task in tasks]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            watchdog = threading.Timer(30.0 + 10.0 * left, process.kill)
            watchdog.start()
            try:
                for line in process.stdout:
                    left -= 1
                    yield json.loads(line)
            finally:
                watchdog.cancel()
        errors.seek(0)
        if process.returncode or left:
            said = errors.read().strip()[-2000:]
            raise Unavailable(f"{SOURCE.name} ended with {process.returncode}: {said}")
