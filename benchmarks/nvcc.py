"""nvcc, for the parts of the benchmarks that are CUDA C++: built where they run."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
from collections.abc import Sequence

import jax

from benchmarks import ROOT
from benchmarks.server import Unavailable


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


def build(source: pathlib.Path, folder: str, options: Sequence[str] = ()) -> str:
    """Compiles a source for the device that is here and returns the path of what came out.

    Args:
      source: a .cu file.
      folder: an existing one, which it goes into.
      options: more of nvcc's.

    Raises:
      Unavailable: when there is no nvcc, or it fails.
    """
    nvcc, made = find_nvcc(), str(pathlib.Path(folder) / source.stem)
    command = [nvcc, "-O2", "-std=c++20", f"-I{ROOT}", str(source), "-o", made, *options]
    if capability := getattr(jax.devices()[0], "compute_capability", None):
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
    return made
