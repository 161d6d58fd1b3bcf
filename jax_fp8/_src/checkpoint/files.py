"""A folder with a checkpoint: its JSON files, its safetensors files and what is stored where.

Nothing here knows what the tensors mean, and no tensor is read before ``StoredTensor.map``.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from jax_fp8._src.checkpoint.strict_json import Section, parse_dict

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: safetensors' names of the dtypes that JAX has too.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_JSON_BYTES = 100_000_000  # As many as safetensors allows for a header.


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``nbytes`` from ``offset`` on in ``file``."""

    name: str
    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name!r} ({self.dtype}{list(self.shape)}, {self.file.name})"

    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype, or a NotImplementedError where JAX has none for it."""
        if self.dtype not in DTYPES:
            raise NotImplementedError(
                f"tensor {self} has a dtype that is not supported; supported are"
                f" {', '.join(DTYPES)}"
            )
        return DTYPES[self.dtype]

    def map(self) -> np.ndarray[Any, Any]:
        """The tensor as a read-only map of its part of the file."""
        dtype = self.numpy_dtype()
        if self.nbytes == 0:
            return np.zeros(self.shape, dtype)
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))
        return raw.view(dtype).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a folder holds.

    Attributes:
      path: the folder.
      config: config.json.
      tensors: by name, in the order in which they lie in the files.
      metadata: the free text of each safetensors file's header, by the file's name.
    """

    path: pathlib.Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, dict[str, str]]


def some(names: Iterable[Any], most: int = 5) -> str:
    """A few of the names, for a message, and how many more there are."""
    texts = [n if isinstance(n, str) else str(n) for n in names]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: where it holds anything but a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.stat().st_size > _MOST_JSON_BYTES:
        raise ValueError(f"{path} is larger than {_MOST_JSON_BYTES} bytes")
    return parse_dict(str(path), path.read_bytes())


def open_folder(path: Any) -> Folder:
    """Reads the JSON files and the headers of a checkpoint's folder.

    Raises:
      ImportError: where safetensors is not installed.
      FileNotFoundError: for a folder or a file that is missing.
      ValueError: for a file that is broken, or where the index and the files disagree.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder")
    config = read_json(path / CONFIG)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, dict[str, str]] = {}
    wanted = _weight_map(path)
    for name in [SINGLE] if wanted is None else sorted(set(wanted.values())):
        found, metadata[name] = read_header(path / name)
        twice = found.keys() & tensors.keys()
        if twice:
            first = tensors[min(twice)]
            raise ValueError(f"tensor {first.name!r} is in {first.file.name} and in {name}")
        tensors |= found
    if wanted is not None:
        _check_index(path, wanted, tensors)
    return Folder(path, config, tensors, metadata)


def read_header(path: pathlib.Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file in the order in which they lie there, and its metadata.

    Raises:
      ImportError: where safetensors is not installed.
      FileNotFoundError: where there is no such file.
      ValueError: where the header does not describe the file, byte for byte.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(
            "jax_fp8.checkpoint needs safetensors, which is not installed:"
            " pip install jax-fp8[checkpoint]"
        ) from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, "numpy") as opened:
            metadata = opened.metadata() or {}
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            described = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError, OverflowError) as error:
        raise ValueError(f"{path} is no safetensors file, or not all of one: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_dict(f"{path}: the header", file.read(length))
    return _tensors(path, header, described, start=8 + length), metadata


def _tensors(
    path: pathlib.Path,
    header: dict[str, Any],
    described: dict[str, tuple[str, tuple[int, ...]]],
    start: int,
) -> dict[str, StoredTensor]:
    """The offsets, which safetensors checks and does not tell, with what it does tell."""
    header.pop("__metadata__", None)
    if header.keys() != described.keys():
        names = some(sorted(header.keys() ^ described.keys()))
        raise ValueError(f"{path}: the header is ambiguous about {names}")
    found, size = [], path.stat().st_size
    for name, (dtype, shape) in described.items():
        section = Section(f"{path}: the header of tensor {name!r}", header[name])
        first, last = section.get("data_offsets", list)
        stored = StoredTensor(name, path, dtype, shape, start + first, last - first)
        known = DTYPES.get(dtype)
        fits = known is None or math.prod(shape) * known.itemsize == stored.nbytes
        if not (fits and start <= stored.offset <= start + last <= size):
            raise ValueError(f"{path}: tensor {stored} lies at {first}:{last}, which does not fit")
        found.append(stored)
    found.sort(key=lambda stored: (stored.offset, stored.nbytes))
    return {stored.name: stored for stored in found}


def _weight_map(path: pathlib.Path) -> dict[str, str] | None:
    """Which file holds which tensor, as the index says; None where one file holds them all."""
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            raise FileNotFoundError(_nothing_to_read(path))
        return None
    index = Section(str(path / INDEX), read_json(path / INDEX))
    weight_map: dict[str, Any] = index.get("weight_map", dict)
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and pathlib.PurePath(file).name == file and "\\" not in file
        if not plain or "\0" in file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index.where}: tensor {tensor!r} must be in a .safetensors file of the same"
                f" folder, got {file!r}"
            )
    if (path / SINGLE).exists() and SINGLE not in weight_map.values():
        raise ValueError(f"{path} has both {SINGLE} and an index without it: which one is meant?")
    return weight_map


def _nothing_to_read(path: pathlib.Path) -> str:
    message = f"{path} has neither {SINGLE} nor {INDEX}"
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
    if pickled:
        message += (
            f"; nothing is unpickled, so {some(pickled)} cannot be read: save the model as"
            " safetensors"
        )
    return message


def _check_index(
    path: pathlib.Path, wanted: dict[str, str], tensors: dict[str, StoredTensor]
) -> None:
    missing = [
        f"{name} (in {file})"
        for name, file in wanted.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if missing:
        raise ValueError(f"{path / INDEX}: the files do not hold {some(missing)}")
    unlisted = [str(stored) for name, stored in tensors.items() if name not in wanted]
    if unlisted:
        raise ValueError(f"{path / INDEX} does not list {some(unlisted)}")
