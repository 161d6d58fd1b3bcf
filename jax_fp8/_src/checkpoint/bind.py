"""Which scale belongs to which FP8 weight. Every weight gets one, and no scale is left over."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from jax_fp8._src.checkpoint.files import StoredTensor, some
from jax_fp8._src.checkpoint.storage import Activation, Format, Stored, suffixed
from jax_fp8._src.scaled_array import BLOCK, Granularity, scale_shape

_FP8 = re.compile(r"F8_E[45]M[23].*")
_SCALE = re.compile(
    r"(?:.*\.)?(?:"
    r"\w+_scale_inv|weight_scale_2|(?:weight|input|output|activation|[kvqp]|kv|prob)_scale"
    r"|(?:input|activation)_scale_ub|(?:weight|input|output)_zero_point)"
)
#: The parts of a torchao tensor subclass.
_PART = re.compile(r"(?:.*\.)?_\w+")

_ONE: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


@dataclasses.dataclass(frozen=True)
class FP8Weight:
    """An FP8 weight and what belongs to it, found and checked but not read.

    Attributes:
      name: in the model of config.json.
      data: ``(out, in)`` of E4M3.
      scale: what multiplies the data.
      stored: which elements share a scale in the file; ``granularity`` says it of the result.
      activation: how the input is quantized.
      input_scale: of a static activation.
      input_scale_name: under which name it is handed out.
    """

    name: str
    data: StoredTensor
    scale: StoredTensor
    stored: Stored
    activation: Activation
    input_scale: StoredTensor | None
    input_scale_name: str

    @property
    def granularity(self) -> Granularity:
        """Of the ScaledArray."""
        return self.stored if isinstance(self.stored, str) else (BLOCK, BLOCK)


def bind(
    tensors: dict[str, StoredTensor], format: Format | None, ignore: Iterable[str] = ()
) -> list[FP8Weight | StoredTensor]:
    """The FP8 weights with their scales, and the wide tensors, in the order of the files.

    Args:
      tensors: what the files hold.
      format: how FP8 weights are stored; None where nothing says it.
      ignore: patterns of the names of tensors to leave out.

    Raises:
      ValueError: for an FP8 tensor without a scale, or a scale without an FP8 tensor, or where one
        of them is not what the configuration says.
      NotImplementedError: for FP8 tensors or scales of a kind that is not supported.
    """
    fp8 = [stored for stored in tensors.values() if _FP8.fullmatch(stored.dtype)]
    if fp8 and format is None:
        raise ValueError(f"no quantization_config says what these FP8 tensors mean: {some(fp8)}")
    if format is not None and not fp8:
        raise ValueError(f"quantization_config says {format.name}, and no tensor is FP8")
    patterns = [re.compile(fnmatch.translate(pattern)) for pattern in ignore]
    left = {n: s for n, s in tensors.items() if not any(p.match(n) for p in patterns)}
    weights = {
        stored.name: _bind(stored, format, left)
        for stored in fp8
        if format is not None and stored.name in left
    }
    used = {each.name for w in weights.values() for each in (w.scale, w.input_scale) if each}
    plan = [weights.get(name, stored) for name, stored in left.items() if name not in used]
    unused = [
        item for item in plan if isinstance(item, StoredTensor) and _is_scale(item.name, format)
    ]
    if unused:
        raise ValueError(
            f"scales that belong to no FP8 weight: {some(unused)}; patterns in ignore= leave out"
            " what is not needed"
        )
    _check_names(plan)
    return plan


def _bind(stored: StoredTensor, format: Format, tensors: dict[str, StoredTensor]) -> FP8Weight:
    """The weight with the scales that its format wants, each of which must be there."""
    layout = format.layout(stored.name)
    scheme = format.scheme(layout.name, stored.shape)
    if scheme is None:
        raise ValueError(f"{stored} is FP8, and quantization_config says that it is not quantized")
    if len(stored.shape) != 2:
        raise NotImplementedError(f"{stored} must be a matrix: stacked FP8 is not supported")
    if stored.dtype != "F8_E4M3":
        raise NotImplementedError(f"{stored} must be F8_E4M3: no format has weights of another")
    scale = _only(stored, "scale", layout.scales, tensors)
    input_scale = None
    operand = scheme.activation.operand
    if operand is not None and operand.scaling == "static":
        input_scale = _only(stored, "input scale", layout.input_scales, tensors)
        _check_scale(input_scale, _ONE)
    _check_scale(scale, _scale_shapes(stored, scheme.weight))
    return FP8Weight(
        name=layout.name,
        data=stored,
        scale=scale,
        stored=scheme.weight,
        activation=scheme.activation,
        input_scale=input_scale,
        input_scale_name=layout.input_scales[0],
    )


def _only(
    weight: StoredTensor, what: str, names: tuple[str, ...], tensors: dict[str, StoredTensor]
) -> StoredTensor:
    """The one tensor that has one of these names."""
    found = [tensors[name] for name in names if name in tensors]
    if len(found) != 1:
        got = f"got {some(found)}" if found else "there is none"
        raise ValueError(f"{weight} needs one {what}, {' or '.join(map(repr, names))}; {got}")
    return found[0]


def _scale_shapes(weight: StoredTensor, stored: Stored) -> tuple[tuple[int, ...], ...]:
    """What the formats make of the shape of a scale that is ``stored`` so."""
    rows, columns = weight.shape
    if stored == "tensor":
        return _ONE
    if stored == "row":
        return (rows, 1), (rows,)
    assert isinstance(stored, tuple)
    if any(size % BLOCK for size in stored):
        raise NotImplementedError(
            f"{weight}: blocks of {list(stored)} are not supported; supported are multiples of"
            f" {[BLOCK, BLOCK]}"
        )
    down, across = -(-rows // stored[0]), -(-columns // stored[1])
    return (down, across), (down, 1, across, 1)


def _check_scale(scale: StoredTensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if scale.dtype not in _SCALE_DTYPES:
        raise ValueError(f"scale {scale} must be one of {', '.join(_SCALE_DTYPES)}")
    if scale.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"scale {scale} must have the shape {wanted}, as the configuration says")


def read_scale(scale: StoredTensor) -> np.ndarray[Any, Any]:
    """The values of a scale in float32, which holds each of them exactly.

    Raises:
      ValueError: unless all are finite and positive.
    """
    raw = scale.map()
    if scale.dtype in ("U8", "F8_E8M0"):  # An exponent; 255 stands for NaN.
        code = raw.view(np.uint8).astype(np.int32)
        values = np.where(code == 255, np.nan, np.ldexp(1.0, code - 127))
    else:
        values = raw
    values = values.astype(np.float32)
    bad = values[~(np.isfinite(values) & (values > 0))]
    if bad.size:
        raise ValueError(f"scale {scale} must be finite and positive, got {bad.flat[0]}")
    return values


def read_weight_scale(weight: FP8Weight) -> np.ndarray[Any, Any]:
    """The scale of a weight in the shape that a ScaledArray takes.

    A block that is a multiple of (128, 128) gives its scale to each of these within it.
    """
    values, shape = read_scale(weight.scale), weight.data.shape
    wanted = scale_shape(shape, weight.granularity)
    if isinstance(weight.stored, tuple):
        values = values.reshape([-(-n // b) for n, b in zip(shape, weight.stored, strict=True)])
        for axis, block in enumerate(weight.stored):  # Which may be larger than the weight.
            times = min(block // BLOCK, wanted[axis])
            values = np.repeat(values, times, axis).take(range(wanted[axis]), axis)
    return values.reshape(wanted)


def _is_scale(name: str, format: Format | None) -> bool:
    is_part = format is not None and format.layout is not suffixed and _PART.fullmatch(name)
    return bool(is_part or _SCALE.fullmatch(name))


def _check_names(plan: list[FP8Weight | StoredTensor]) -> None:
    """No two tensors may be handed out under one name."""
    seen: set[str] = set()
    for item in plan:
        given = {item.name}
        if isinstance(item, FP8Weight) and item.input_scale is not None:
            given.add(item.input_scale_name)
        if seen & given:
            raise ValueError(f"two tensors are called {min(seen & given)!r}")
        seen |= given
