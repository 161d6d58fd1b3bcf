"""cublasLt without JAX: compiles ``heuristic.cu``, starts it on the copy that JAX uses."""

from __future__ import annotations

import atexit
import functools
import pathlib
import tempfile

from benchmarks import ROOT, nvcc, timing
from benchmarks.server import Remote, Server

SOURCE = pathlib.Path(__file__).with_name("heuristic.cu")
#: Of the library itself, so that the candidates are those that it has.
_LIBRARY = [str(ROOT / "ffi" / f"cublaslt_{part}.cc") for part in ("candidates", "library")]


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


@functools.cache
def start() -> Server:
    """The running program, one for this process; it ends with it.

    Raises:
      Unavailable: when it cannot be compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        server = Server(
            [nvcc.build(SOURCE, folder, [*_LIBRARY, "-ldl"]), find_cublaslt()], SOURCE.name
        )
        server.ask("close")  # It runs: its file may go.
    atexit.register(server.close)
    return server


def best(
    server: Server, slot: int, problem: tuple[int, int, int], row: bool, floor: float
) -> Remote:
    """The fastest of cublasLt's candidates for a problem, to be timed by turns with others.

    Its row says how many ``candidates`` there were, the ``index`` of the fastest, its
    ``algorithm`` and the version of ``cublaslt``.

    Args:
      server: ``start()``.
      slot: any number; what had it before is forgotten.
      problem: M, N, K.
      row: whether each row has a scale, or each operand.
      floor: microseconds a call takes at least.
    """
    calls = timing.calls_for(floor)
    copies = timing.copies_for(problem[1] * problem[2], calls)
    size = " ".join(map(str, problem))
    head_start_us = timing.head_start()[1]
    line = f"open {slot} {size} {calls} {copies} {int(row)} {head_start_us}"
    return Remote(server, slot, calls, line)
