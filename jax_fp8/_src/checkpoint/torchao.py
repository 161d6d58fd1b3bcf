"""torchao: each weight is a tensor subclass, which the safetensors header's metadata describes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from jax_fp8._src.checkpoint.files import Folder
from jax_fp8._src.checkpoint.storage import (
    PER_TENSOR,
    PER_TOKEN,
    WIDE,
    Activation,
    Format,
    Layout,
    Scheme,
    unsupported,
)
from jax_fp8._src.checkpoint.strict_json import Section, parse

_NAMES = "tensor_names"
_STORED = re.compile(r"((?:.*\.)?)_(\w+)_qdata")


def from_metadata(config: Section, folder: Folder) -> Format:
    """The format of a checkpoint whose tensors the metadata of its files describes.

    Raises:
      ValueError: for metadata that is missing, broken or contradicts itself or the files.
      NotImplementedError: for a weight that is not FP8, or not as Float8Tensor stores it.
    """
    described: dict[str, Section] = {}
    for file, texts in folder.metadata.items():
        for name, section in _described(f"{config.where}: {file}", texts):
            if described.setdefault(name, section).fields != section.fields:
                raise ValueError(f"{section.where} is another in another file")
    weights: dict[str, Section] = {}
    for name, section in described.items():
        kind = section.get("_type", str)
        if kind == "Float8Tensor":
            weights[name] = section.section("_data")
        elif kind != "Tensor":
            raise unsupported(section.where, "_type", kind, ("Tensor", "Float8Tensor"))
        head, dot, last = name.rpartition(".")
        stored = f"{head}{dot}_{last}_qdata" if name in weights else name
        if stored not in folder.tensors:
            raise ValueError(f"{section.where}: there is no tensor {stored!r}")

    def scheme(name: str, shape: tuple[int, ...]) -> Scheme | None:
        return _scheme(weights[name], shape) if name in weights else None

    return Format("torchao", scheme, layout)


def _described(where: str, texts: dict[str, str]) -> Iterator[tuple[str, Section]]:
    """What the metadata of one file says of each tensor."""
    if _NAMES not in texts:
        raise ValueError(f"{where} has no torchao metadata ({_NAMES!r})")
    names = parse(f"{where}: metadata {_NAMES!r}", texts[_NAMES])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: metadata {_NAMES!r} must be a list of names")
    for name in names:
        if name not in texts:
            raise ValueError(f"{where}: the metadata does not describe {name!r}")
        label = f"{where}: metadata {name!r}"
        yield name, Section(label, parse(label, texts[name]))


def layout(stored: str) -> Layout:
    """``model.fc._weight_qdata`` and ``model.fc._weight_scale`` are ``model.fc.weight``."""
    match = _STORED.fullmatch(stored)
    if match is None:
        return Layout(stored, ())
    prefix, name = match.groups()
    return Layout(f"{prefix}{name}", (f"{prefix}_{name}_scale",))


def _scheme(data: Section, shape: tuple[int, ...]) -> Scheme:
    sizes = tuple(data.get("block_size", list))
    if len(shape) == 2 and sizes == shape:
        return Scheme("tensor", _activation(data))
    if len(shape) == 2 and sizes == (1, shape[1]):
        return Scheme("row", _activation(data))
    raise unsupported(data.where, f"block_size of shape {list(shape)}", sizes, ("[1, K]", "[N, K]"))


def _activation(data: Section) -> Activation:
    if "act_quant_kwargs" not in data:
        return WIDE
    kwargs = data.section("act_quant_kwargs").section("_data")
    dtype = kwargs.section("float8_dtype").get("_data", str) if "float8_dtype" in kwargs else None
    if dtype not in (None, "float8_e4m3fn"):
        raise unsupported(kwargs.where, "float8_dtype", dtype, ("float8_e4m3fn",))
    if "hp_value_lb" in kwargs:
        raise unsupported(kwargs.where, "hp_value_lb", kwargs.fields["hp_value_lb"], (None,))
    bound = kwargs.get("hp_value_ub", float, None)
    if bound is not None and bound <= 0:
        raise ValueError(f"{kwargs.where}.hp_value_ub must be positive, got {bound!r}")
    granularity = kwargs.section("granularity").get("_type", str)
    known = {"PerRow": PER_TOKEN, "PerTensor": PER_TENSOR}
    if granularity not in known:
        raise unsupported(kwargs.where, "granularity", granularity, known)
    return dataclasses.replace(known[granularity], bound=bound)
