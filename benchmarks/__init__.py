"""Measures jax_fp8 and its peers: ``python -m benchmarks`` from the root of the repository."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _prefer_installed() -> None:
    """Puts the working tree last, where its jax_fp8 has no extension: the installed one has."""
    if any((ROOT / "jax_fp8" / "_src").glob("_ffi*.so")):
        return
    here = [entry for entry in sys.path if pathlib.Path(entry).resolve() == ROOT]
    sys.path[:] = [entry for entry in sys.path if entry not in here] + here


_prefer_installed()
