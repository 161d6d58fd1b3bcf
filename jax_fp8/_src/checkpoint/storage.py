"""What a format says about a module: how its FP8 weight is stored and its input quantized."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

from jax_fp8._src.recipe import Operand
from jax_fp8._src.scaled_array import BLOCK

#: Which elements of a weight share a scale; a block is (rows, columns).
Stored = Literal["tensor", "row"] | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Activation:
    """How a checkpoint says that the input of an FP8 weight is quantized.

    Attributes:
      operand: dtype, granularity and scaling, ``"dynamic"`` or ``"static"``; None leaves the input
        wide (weight-only).
      bound: upper bound of a dynamic amax, None where there is none.
    """

    operand: Operand | None
    bound: float | None = None


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the FP8 weight of a module is stored, and how its input is quantized."""

    weight: Stored
    activation: Activation


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of what belongs to one FP8 weight.

    Attributes:
      name: of the weight, in the model of config.json.
      scales: what its scale may be called; the checkpoint has exactly one of them.
    """

    name: str
    scales: tuple[str, ...]

    @property
    def input_scales(self) -> tuple[str, ...]:
        """What the scale of a static activation may be called; the first is our own name for it."""
        prefix = self.name[: self.name.rfind(".") + 1]
        return (f"{prefix}input_scale", f"{prefix}activation_scale")


def module_of(name: str) -> str:
    """The module that has a tensor of this name."""
    return name.rpartition(".")[0]


def suffixed(stored: str) -> Layout:
    """The layout of most formats: a weight and, beside it, the same name with ``_scale``."""
    return Layout(stored, (f"{stored}_scale", f"{stored}_scale_inv"))


@dataclasses.dataclass(frozen=True)
class Format:
    """A way of storing FP8 weights.

    Attributes:
      name: ``"compressed-tensors"``, ``"fp8"``, ``"fbgemm_fp8"``, ``"modelopt"`` or ``"torchao"``.
      scheme: of an FP8 weight, by its name and shape; None where the checkpoint says that it is
        wide.
      layout: the names that belong to an FP8 tensor of this stored name.
    """

    name: str
    scheme: Callable[[str, tuple[int, ...]], Scheme | None]
    layout: Callable[[str], Layout] = suffixed


WIDE = Activation(None)
STATIC = Activation(Operand(scaling="static"))
PER_TENSOR = Activation(Operand())
PER_TOKEN = Activation(Operand(granularity="row"))
PER_BLOCK = Activation(Operand(granularity=(1, BLOCK)))


def uniform(name: str, scheme: Scheme, ignored: Iterable[str]) -> Format:
    """A format with one scheme for all modules but the ignored ones.

    A module is ignored under its whole name, under that of a module it is in, under the last parts
    of its name, and where a pattern with ``*`` matches one of these.
    """
    keys = set(ignored)
    patterns = [re.compile(fnmatch.translate(key)) for key in keys if set(key) & set("*?[")]

    def scheme_of(name: str, shape: tuple[int, ...]) -> Scheme | None:
        parts = module_of(name).split(".")
        names = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        names |= {".".join(parts[start:]) for start in range(len(parts))}
        if names & keys or any(p.match(each) for p in patterns for each in names):
            return None
        return scheme

    return Format(name, scheme_of)


def unsupported(where: str, what: str, value: Any, accepted: Iterable[Any]) -> NotImplementedError:
    """The error for what a format can say and this library cannot read."""
    known = ", ".join(repr(each) for each in accepted)
    return NotImplementedError(f"{where}: {what} {value!r} is not supported; supported are {known}")
