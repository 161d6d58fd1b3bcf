"""The benchmarks: every module of this folder that has ``run`` and ``table``.

A benchmark is a module with

- ``run(shapes) -> rows``: measures; ``shapes`` is "smoke", "quick" or "all". A row is a dict of
  JSON values: what tells the problem, ``variant``, its figures (``us`` in microseconds), or
  ``us`` None and ``error``, as ``tables.failure`` makes it;
- ``table(rows) -> str``: Markdown, a title and a table, which docs take, and more;
- ``KEYS``: the fields of a row that tell the problem;
- ``REFERENCE`` and ``FIGURES``, where they are others than none and ``("us",)``: for ``compare``;
- ``BY_NAME``, true where it takes so long that it runs only by its name or with ``--all``.

Its picture, if it has one, is in ``plots.DRAWINGS``, its targets in ``targets.CHECKS``.
"""

from __future__ import annotations

import functools
import importlib
import pathlib
import pkgutil
from types import ModuleType

#: What comes first, if a run does not come to its end.
_FIRST = ("ceilings", "gemm", "peers", "mlp", "quantize", "weight_only", "training", "host")
#: Programs that a benchmark starts in a process of their own, where alone they can be imported.
_PROGRAMS = ("__main__", "torch_peers")


@functools.cache
def benchmarks() -> dict[str, ModuleType]:
    """Name -> module."""
    folder = str(pathlib.Path(__file__).parent)
    names = [found.name for found in pkgutil.iter_modules([folder]) if found.name not in _PROGRAMS]
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    found = {n: m for n, m in modules.items() if hasattr(m, "run") and hasattr(m, "table")}
    order = [*_FIRST, *sorted(found.keys() - set(_FIRST))]
    return {name: found[name] for name in order if name in found}
