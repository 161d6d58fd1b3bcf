"""The journal of what ran: which implementation, with which plan, for which problem."""

from __future__ import annotations

import threading
from typing import Any

from jax_fp8._src import _ffi, plan_choice

_lock = threading.Lock()
_traced: dict[tuple[tuple[str, Any], ...], int] = {}


def record_traced(operation: str, **facts: Any) -> None:
    """Notes that a program which leaves ``operation`` to XLA was traced."""
    key = (("operation", operation), *facts.items())
    with _lock:
        _traced[key] = _traced.get(key, 0) + 1


def plans() -> list[dict[str, Any]]:
    """Lists what ran in this process, each distinct problem once.

    Returns:
      A list of dicts. Every entry has ``operation``, ``implementation``, ``platform``, ``when``
      and ``count``. Entries with ``when="run"`` were written by a handler as it ran: ``count``
      is how often it was entered (once for a captured graph, however often that is replayed),
      and they have the shape, dtypes, granularities and, for cublasLt, ``algorithm`` (its id,
      tile, stages, split of K ...), ``workspace`` (bytes), ``cublaslt`` (its version),
      ``candidates`` (how many algorithms there were) and ``choice``: ``"timed"`` in this process,
      ``"cached"`` by an earlier one, ``"imported"``, or ``"heuristic"`` for the first that
      cublasLt has without workspace, with the reason where they should have been timed and were
      not. A product that quantizes a row of ``x`` by itself says that as its ``algorithm``.
      Entries with ``when="traced"`` say that a program was traced which leaves the operation to
      XLA on ``platform``; whether it was then compiled for that platform they cannot tell.

    >>> import jax.numpy as jnp, jax_fp8
    >>> jax_fp8.clear_plans()
    >>> x = jax_fp8.quantize(jnp.ones((2, 16)), implementation="kernel")
    >>> [(p["operation"], p["implementation"], p["count"]) for p in jax_fp8.plans()]
    [('quantize', 'kernel', 1)]
    """
    with _lock:
        traced = [
            {**dict(key), "implementation": "xla", "when": "traced", "count": count}
            for key, count in _traced.items()
        ]
    return [*_ffi.journal(), *traced]


def clear_plans(*, choices: bool = False) -> None:
    """Empties the list that ``plans`` gives.

    Args:
      choices: also forget which algorithms were chosen, in this process and on disk. Problems are
        timed again when a program that has them is compiled; what is captured in a CUDA graph stays
        as it is.
    """
    if choices:
        plan_choice.clear_choices()
    with _lock:
        _traced.clear()
    _ffi.clear_journal()
