"""Which of cublasLt's algorithms a product takes: timed once, kept, exported, imported.

The extension times and keeps the choices (``ffi/plan_table.h``), and appends each one to a file as
it is made. Here is what decides about it: the mode, the file, and what is read from it.
"""

from __future__ import annotations

import json
import os
import pathlib
import threading
import warnings
from typing import Any

import jax

from jax_fp8._src import _ffi

MODES = ("timed", "heuristic")

#: One line of a file: the name and the type of each value.
_FIELDS: dict[str, type] = {
    "gpu": str,
    "cublaslt": str,
    "problem": str,
    "algorithm": str,
    "candidates": int,
    "ns": int,
}

_lock = threading.RLock()
_mode: str | None = None
_cache_dir: str | None = None
_settled: tuple[bool, str] | None = None

Path = str | os.PathLike[str]


def set_plan_choice(mode: str | None = None, *, cache_dir: Path | None = None) -> None:
    """Says how products choose among the algorithms that cublasLt offers.

    To be called before the first product is compiled: what is captured in a CUDA graph stays as it
    is.

    Args:
      mode: ``"timed"``: the first program with a problem times the candidates while it is compiled,
        on random data in memory of its own, and keeps the fastest for this process and later ones,
        which then give the same bits. Where a program does not know its rows before it is called
        (``jax.export``), and on GPUs of another kind than the first, it is as with
        ``"heuristic"``: nothing is timed; an imported choice is taken, else the first of cublasLt's
        without workspace, which is the same in every process on equal GPUs. None: timed, but
        heuristic in programs of several processes (``jax.distributed``), which must agree.
      cache_dir: the folder for the timed choices. None: ``JAX_FP8_CACHE_DIR``, else
        ``XDG_CACHE_HOME/jax_fp8``, else ``~/.cache/jax_fp8``. Empty: none, nothing is kept on disk.

    Raises:
      ValueError: for an unknown mode.

    >>> import jax_fp8
    >>> jax_fp8.set_plan_choice("heuristic")
    >>> jax_fp8.set_plan_choice()
    """
    global _mode, _cache_dir
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))} or None, got {mode!r}")
    folder = None if cache_dir is None else os.fspath(cache_dir) and os.path.abspath(cache_dir)
    with _lock:
        _mode, _cache_dir = mode, folder
        settle()


def export_plans(path: Path) -> int:
    """Writes the choices that this process knows to a file, for ``import_plans``.

    Returns:
      How many there are: those of this process, of its cache, and imported ones.

    >>> import os, tempfile, jax_fp8
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "h200.jsonl")
    ...     jax_fp8.export_plans(path) == jax_fp8.import_plans(path)
    True
    """
    settle()
    lines = [
        json.dumps(dict(zip(_FIELDS, choice, strict=False))) + "\n"
        for choice in _ffi.plan_choices()
    ]
    target = pathlib.Path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        temporary.write_text("".join(lines))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return len(lines)


def import_plans(path: Path) -> int:
    """Takes choices that ``export_plans`` wrote, in place of others for the same problems.

    They count in every mode, so that all processes of a program that import the same file agree.
    Those of other GPUs or versions of cublasLt do no harm, and an algorithm that cublasLt does not
    offer for its problem is never taken.

    Returns:
      How many there are.

    Raises:
      OSError: when the file cannot be read.
      ValueError: for a line that is no choice; then nothing is imported.
    """
    choices, faults = _parse(pathlib.Path(path).read_text(errors="replace"))
    if faults:
        raise ValueError(f"{os.fspath(path)}: not a choice of an algorithm: line {faults[0]}")
    _ffi.add_plan_choices([(*choice, "imported") for choice in choices])
    return len(choices)


def clear_choices() -> None:
    """Forgets all choices, in this process and in the cache."""
    with _lock:
        _ffi.clear_plan_choices()
        if file := cache_file():
            file.unlink(missing_ok=True)


def cache_file() -> pathlib.Path | None:
    """The file of the timed choices; None where there is to be none."""
    folder = os.environ.get("JAX_FP8_CACHE_DIR") if _cache_dir is None else _cache_dir
    if folder is None:
        try:
            root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        except RuntimeError:  # There is no home.
            return None
        folder = os.path.join(root, "jax_fp8")
    return pathlib.Path(folder, "plans.jsonl").absolute() if folder else None


def settle() -> None:
    """Tells the extension what holds: at each trace, for jax.distributed may come up late."""
    global _settled
    with _lock:
        mode = _mode or ("heuristic" if jax.distributed.is_initialized() else "timed")
        file = cache_file() if mode == "timed" else None
        wanted = (mode == "timed", "" if file is None else str(file))
        if wanted == _settled:
            return
        if file is not None:
            _load(file)
        _ffi.set_plan_choice(*wanted)
        _settled = wanted


def describe() -> dict[str, Any]:
    """For ``info``: the mode, the file, and how many choices there are."""
    settle()
    assert _settled is not None
    timed, file = _settled
    return {
        "mode": MODES[0 if timed else 1],
        "file": file or None,
        "choices": len(_ffi.plan_choices()),
    }


def _load(file: pathlib.Path) -> None:
    try:
        text = file.read_text(errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        warnings.warn(f"kept choices of algorithms cannot be read: {error}", stacklevel=4)
        return
    choices, faults = _parse(text)
    if faults:
        warnings.warn(
            f"{file}: {len(faults)} line(s) are no choices of algorithms and are left out, the"
            f" first is line {faults[0]}; jax_fp8.clear_plans(choices=True) deletes the file",
            stacklevel=4,
        )
    _ffi.add_plan_choices([(*choice, "cached") for choice in choices])


def _parse(text: str) -> tuple[list[tuple[Any, ...]], list[int]]:
    """The choices, and the numbers of the lines that are none."""
    choices: list[tuple[Any, ...]] = []
    faults: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found: dict[str, Any] = json.loads(line)
            choice = tuple(found[name] for name in _FIELDS)
        except (ValueError, TypeError, KeyError, RecursionError):
            faults.append(number)
            continue
        kinds = [type(value) for value in choice]
        if kinds == list(_FIELDS.values()) and all(0 <= n < 1 << 63 for n in choice[4:]):
            choices.append(choice)
        else:
            faults.append(number)
    return choices, faults
