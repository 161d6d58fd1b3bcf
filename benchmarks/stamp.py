"""The device's clock in a compiled program: what is between two stamps took so long."""

from __future__ import annotations

import ctypes
import functools
import pathlib
import re
import tempfile
import threading
import warnings
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import nvcc

SOURCE = pathlib.Path(__file__).with_name("stamp.cu")
TARGET = "benchmarks_stamp"


_lock = threading.Lock()


def available() -> bool:
    """Whether there are stamps, which a GPU has and nvcc compiles; warns where that fails."""
    with _lock:  # Chains are compiled side by side.
        return _available()


@functools.cache
def _available() -> bool:
    if jax.default_backend() != "gpu":
        return False
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = ["-shared", "-Xcompiler", "-fPIC", f"-I{jax.ffi.include_dir()}"]
            library = ctypes.CDLL(nvcc.build(SOURCE, folder, options))
        handler = jax.ffi.pycapsule(getattr(library, TARGET))
        jax.ffi.register_ffi_target(TARGET, handler, platform="CUDA")
        _works()
    except Exception as error:  # nvcc, the loader or XLA: there is the host's clock.
        warnings.warn(f"times are the host's, not the device's own: {error}", stacklevel=3)
        return False
    return True


def stamp(after: jax.Array) -> jax.Array:
    """The time once ``after`` is there, for ``between``."""
    return jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((2,), jnp.uint32))(after)


def between(first: Any, last: Any) -> float:
    """Microseconds between two stamps."""
    start, stop = (int(np.asarray(at).view(np.uint64)[0]) for at in (first, last))
    return 1e-3 * (stop - start)


def kernels(text: str) -> list[list[str]]:
    """What a compiled program runs before its first stamp, between each two, and after its last.

    Args:
      text: of the program, whose entry is in the order in which it runs.

    Returns:
      The names of kernels, library calls and copies, one list more than there are stamps.
    """
    parts: list[list[str]] = [[]]
    for line in text[text.find("ENTRY ") :].splitlines():
        if f'"{TARGET}"' in line:
            parts.append([])
        elif re.search(r" (custom-call|fusion|copy)\(", line):
            parts[-1].append(line.split(" = ")[0].replace("ROOT", "").strip(" %"))
    return parts


def _works() -> None:
    """Raises a RuntimeError unless the stamps of a program enclose what they should."""
    x = jnp.ones((512, 512), jnp.bfloat16)

    def run(x: jax.Array) -> Any:
        x, first = lax.optimization_barrier((x, stamp(x)))
        y = x @ x
        return first, y, stamp(y)

    compiled = jax.jit(run).lower(x).compile()
    parts = kernels(compiled.as_text())
    if len(parts) != 3 or not parts[1]:
        raise RuntimeError(f"stamps are not where they should be: {parts}")
    for _ in range(4):  # XLA captures a graph in the first ones.
        first, _, last = compiled(x)
        if not 0 < between(first, last) < 1e6:
            raise RuntimeError(f"stamps {between(first, last)} us apart")
