"""A text corpus that is on any machine: the sources and texts of Python's standard library."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from typing import Any

import numpy as np

SUFFIXES = (".py", ".txt", ".html", ".rst", ".pyi")
#: What other packages bring, and the tests, which some distributions leave out.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
#: Stands behind each file. Bytes are the tokens.
END, VOCABULARY = b"\0", 256
#: Of 256: how many files are held out, by the first byte of their hash.
HELD_OUT = 13


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes, and what they are of.

    Attributes:
      training: uint8, file behind file.
      validation: uint8, of files that are not in ``training``.
      facts: of the corpus, for the results.
    """

    training: np.ndarray
    validation: np.ndarray
    facts: dict[str, Any]


def texts(root: pathlib.Path) -> Iterator[bytes]:
    """The files that hold text, in the order of their paths; each text once."""
    seen, paths = set(), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found = (pathlib.Path(folder, name) for name in names)
        paths += [path for path in found if path.suffix in SUFFIXES]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        if path.is_file() and (text := path.read_bytes()) and text not in seen:
            seen.add(text)
            yield text


def is_held_out(text: bytes) -> bool:
    """By its hash, so that a file is on the same side on every machine."""
    return hashlib.sha256(text).digest()[0] < HELD_OUT


def load(root: pathlib.Path | None = None) -> Corpus:
    """The corpus of this Python, or of the files below ``root``.

    Raises:
      ValueError: where there is too little, on one side of the split or the other.
    """
    root = root or pathlib.Path(sysconfig.get_paths()["stdlib"])
    files: tuple[list[bytes], list[bytes]] = ([], [])
    for text in texts(root):
        files[is_held_out(text)].append(text)
    training, validation = (
        np.frombuffer(b"".join(text + END for text in some), np.uint8) for some in files
    )
    if not (len(training) and len(validation)):
        raise ValueError(f"{root} has no text to train and to validate with")
    facts = {
        "python": platform.python_version(),
        "training_files": len(files[0]),
        "training_bytes": len(training),
        "validation_files": len(files[1]),
        "validation_bytes": len(validation),
        "sha256": hashlib.sha256(training.tobytes() + validation.tobytes()).hexdigest(),
    }
    return Corpus(training, validation, facts)


def starts(size: int, count: int, batch: int, length: int, seed: int) -> np.ndarray:
    """Where the sequences of each step start, int32 (count, batch): by the seed alone.

    A sequence is ``length + 1`` bytes: what goes in, and what is to be said of it.
    """
    rng = np.random.default_rng(seed)
    return rng.integers(0, size - length, (count, batch), dtype=np.int32)


def grid(size: int, length: int, most: int) -> np.ndarray:
    """Starts of up to ``most`` sequences that do not overlap, spread evenly: int32."""
    every = np.arange(0, size - length, length, dtype=np.int32)
    return every[np.linspace(0, len(every) - 1, min(most, len(every)), dtype=np.int32)]
