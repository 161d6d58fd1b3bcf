"""load: a checkpoint onto devices, tensor by tensor."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jax_fp8._src.checkpoint.bind import FP8Weight, bind, read_scale, read_weight_scale
from jax_fp8._src.checkpoint.files import StoredTensor, open_folder
from jax_fp8._src.checkpoint.formats import format_of
from jax_fp8._src.checkpoint.progress import progress_bar
from jax_fp8._src.checkpoint.storage import Activation
from jax_fp8._src.scaled_array import ScaledArray

Placement: TypeAlias = jax.Device | Sharding | None
Placing: TypeAlias = Placement | Callable[[str, tuple[int, ...]], Placement]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read.

    Attributes:
      config: config.json.
      tensors: by their names in the model. An FP8 weight is a ScaledArray ``(out, in)`` of
        float8_e4m3fn with the granularity ``"tensor"``, ``"row"`` or ``(128, 128)``; wide tensors
        have the dtype in which they are stored. Where activations have static scales, the one of
        ``x.weight`` is ``x.input_scale``, float32 of the shape ().
      activations: how the input of each FP8 weight is quantized, by the name of the weight.
      format: ``"compressed-tensors"``, ``"fp8"``, ``"fbgemm_fp8"``, ``"modelopt"`` or
        ``"torchao"``; None for a checkpoint without FP8.
    """

    config: dict[str, Any]
    tensors: dict[str, jax.Array | ScaledArray]
    activations: dict[str, Activation]
    format: str | None


def load(
    folder: Any,
    *,
    sharding: Placing = None,
    progress: bool = False,
    ignore: Iterable[str] = (),
) -> Checkpoint:
    """Reads a checkpoint of the Hugging Face hub from a local folder.

    The files are safetensors, of which one part after the other is mapped and put onto its device;
    the host holds one tensor at a time. Everything is checked before: each FP8 weight has exactly
    one scale, each scale has a weight, and all have the shapes and types that the configuration
    says. Nothing is unpickled and nothing that is not understood is passed over.

    Args:
      folder: config.json with ``model.safetensors``, or with ``model.safetensors.index.json`` and
        the files it lists.
      sharding: where the tensors go: a device, a SingleDeviceSharding or a NamedSharding, or a
        function of a tensor's name and shape that gives one of these; None is JAX's default
        device. A scale is sharded like its data along those axes that have the data's size, and is
        otherwise on all devices of the mesh.
      progress: shows a progress bar (needs tqdm).
      ignore: patterns, as of ``fnmatch``, of the names of stored tensors that are left out on
        purpose, such as ``"*.k_scale"``.

    Returns:
      The Checkpoint.

    Raises:
      ImportError: where safetensors, tqdm for the progress bar, or google-re2 for the patterns of
        compressed-tensors is not installed.
      FileNotFoundError: for a folder or a file that is missing.
      ValueError: for files that are broken, lie or contradict each other, scales that are missing,
        left over or not positive, and 64-bit values that do not fit where JAX has 32 bits.
      NotImplementedError: for a format, an option or a dtype that is known and not supported.
    """
    if isinstance(ignore, str):
        raise TypeError(f"load: ignore must be a list of patterns, got the string {ignore!r}")
    tensors: dict[str, jax.Array | ScaledArray] = {}
    with _errors_named("load"):
        opened = open_folder(folder)
        format = format_of(opened)
        plan = bind(opened.tensors, format, ignore)
        for item in plan:
            (item.data if isinstance(item, FP8Weight) else item).numpy_dtype()
        with progress_bar(progress, sum(map(_bytes, plan)), "load") as advance:
            for item in plan:
                tensors |= _load(item, sharding)
                advance(_bytes(item))
    activations = {item.name: item.activation for item in plan if isinstance(item, FP8Weight)}
    return Checkpoint(opened.config, tensors, activations, format.name if format else None)


def _load(item: FP8Weight | StoredTensor, placing: Placing) -> dict[str, jax.Array | ScaledArray]:
    """One tensor, or one weight with its scales, by the names they are handed out under."""
    if isinstance(item, StoredTensor):
        array = _as_jax_has_it(item)
        return {item.name: _put(item.name, array, _placement(placing, item.name, item.shape))}
    # The scales first: what is wrong with them is found before the data is read.
    scale = read_weight_scale(item)
    where = _placement(placing, item.name, item.data.shape)
    beside = _of_scale(where, scale.shape, item.data.shape)
    loaded: dict[str, jax.Array | ScaledArray] = {}
    if item.input_scale is not None:
        value = read_scale(item.input_scale).reshape(())
        loaded[item.input_scale_name] = _put(item.name, value, _of_scale(where, (), ()))
    data = _put(item.name, item.data.map(), where)
    loaded[item.name] = ScaledArray(data, _put(item.name, scale, beside), item.granularity)
    return loaded


def _as_jax_has_it(stored: StoredTensor) -> np.ndarray[Any, Any]:
    """The map, or a copy of 32 bits where JAX has no 64 and no value is changed by it."""
    array = stored.map()
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype == array.dtype:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if not np.array_equal(narrow.astype(array.dtype), array, equal_nan=array.dtype.kind == "f"):
        raise ValueError(
            f"tensor {stored} has values that {dtype} does not hold: set jax_enable_x64, or name"
            " it in ignore="
        )
    return narrow


def _placement(placing: Placing, name: str, shape: tuple[int, ...]) -> Sharding | None:
    where = placing(name, shape) if callable(placing) else placing
    if isinstance(where, jax.Device):
        return SingleDeviceSharding(where)
    if not isinstance(where, SingleDeviceSharding | NamedSharding | None):
        raise TypeError(
            f"load: the sharding of {name!r} must be a device, a SingleDeviceSharding, a"
            f" NamedSharding or None, got a {type(where).__name__}"
        )
    return where


def _of_scale(
    where: Sharding | None, scale: tuple[int, ...], data: tuple[int, ...]
) -> Sharding | None:
    """Where the scale goes whose data is there."""
    if not isinstance(where, NamedSharding):
        return where
    axes = zip(where.spec, scale, data, strict=False)  # A spec may leave out the last axes.
    same = [axis if s == d else None for axis, s, d in axes]
    return NamedSharding(where.mesh, PartitionSpec(*same), memory_kind=where.memory_kind)


def _put(name: str, array: np.ndarray[Any, Any], where: Sharding | None) -> jax.Array:
    """Copies each device's part, one at a time, and waits, so that no more is on the host."""
    # A copy of the map, because a CPU device may go on using the memory that it is given.
    if where is None:
        return jax.block_until_ready(jax.device_put(np.array(array)))
    if isinstance(where, NamedSharding) and len(where.spec) > array.ndim:
        raise ValueError(
            f"the sharding of {name!r}, {where.spec}, has more axes than its shape {array.shape}"
        )
    try:
        indices = where.addressable_devices_indices_map(array.shape)
    except ValueError as error:
        raise ValueError(f"the sharding of {name!r} does not fit: {error}") from None
    parts = []
    for device, index in indices.items():
        part = np.array(array[index])
        on_device = SingleDeviceSharding(device, memory_kind=where.memory_kind)
        parts.append(jax.block_until_ready(jax.device_put(part, on_device)))
    return jax.make_array_from_single_device_arrays(array.shape, where, parts)


def _bytes(item: FP8Weight | StoredTensor) -> int:
    return (item.data if isinstance(item, FP8Weight) else item).nbytes


@contextlib.contextmanager
def _errors_named(op: str) -> Iterator[None]:
    """Puts the operation's name before the messages of the errors that it may raise."""
    try:
        yield
    except (NotImplementedError, FileNotFoundError, ImportError) as error:
        raise type(error)(f"{op}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from error
