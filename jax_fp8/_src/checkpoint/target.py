"""A folder that is written file by file, so that a run that was cut off can go on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Says what an unfinished folder is being made of; gone once it is finished.
STATE = ".jax-fp8-quantize.json"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name to write to; what was written becomes ``path`` once all of it is on the disk."""
    partial = _partial(path)
    yield partial
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes it atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def claim(folder: Path, state: dict[str, Any]) -> None:
    """Makes the folder, or checks that all it holds is of an unfinished run of that state.

    Raises:
      FileExistsError: when it is not.
    """
    path = folder / STATE
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any(entry != _partial(path) for entry in folder.iterdir()):
            raise FileExistsError(f"quantize: {folder} is not empty")
        write_json(path, state)
        return
    try:
        found = json.loads(path.read_bytes())
        other = [key for key in state if found[key] != state[key]]
    except (ValueError, KeyError, TypeError):
        raise FileExistsError(f"quantize: {path} does not tell of an unfinished run") from None
    if other:
        raise FileExistsError(
            f"quantize: {folder} holds an unfinished run with another {', '.join(other)}; finish"
            " it as it was started, or delete it"
        )


def release(folder: Path) -> None:
    """Marks the folder as finished."""
    (folder / STATE).unlink()
    _sync(folder)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
