"""ScaledArray: an FP8 array with its scale, and what a granularity means for shapes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp

from jax_fp8._src.partition import axes_in

Granularity = Literal["tensor", "row"] | tuple[int, int]

#: Edge of the blocks that share one scale, along K and, for weights, along N.
BLOCK = 128
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "row", (1, BLOCK), (BLOCK, BLOCK))
FP8_DTYPES = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledArray:
    """An FP8 array together with the scale that gives its values: ``value = data * scale``.

    Attributes:
      data: ``(..., R, K)`` of ``float8_e4m3fn`` or ``float8_e5m2``. K is the axis a product
        contracts.
      scale: float32, of the rank of ``data``. ``"tensor"``: all ones, ``(..., 1, 1)``; leading
        axes may also have the size of ``data``'s (one scale for each stacked array, as
        ``jax.vmap`` and stacked layers give it). ``"row"``: ``(..., R, 1)``. ``(1, 128)``:
        ``(..., R, ceil(K / 128))``. ``(128, 128)``: ``(..., ceil(R / 128), ceil(K / 128))``.
        The last block of an axis may be partial.
      granularity: which elements share a scale. It is stated, never inferred from shapes.

    The fields are checked by the operations that use them and not here, so that ``vmap``,
    ``scan`` over stacked layers, sharding and tree mapping all work on a ScaledArray.
    """

    data: Any
    scale: Any
    granularity: Granularity = dataclasses.field(default="tensor", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``data``."""
        return tuple(self.data.shape)

    @property
    def ndim(self) -> int:
        """Rank of ``data``."""
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The FP8 dtype of ``data``."""
        return jnp.dtype(self.data.dtype)


jax.export.register_pytree_node_serialization(
    ScaledArray,
    serialized_name="jax_fp8.ScaledArray",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda data: tuple(
        tuple(field) if isinstance(field, list) else field for field in json.loads(data)
    ),
)


def fp8_max(dtype: Any) -> float:
    """The largest finite value: 448 for E4M3, 57344 for E5M2."""
    return float(jnp.finfo(dtype).max)


def describe(x: Any) -> str:
    """What an operand is, in a message: dtype and shape of an array, else the type."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"an array {x.dtype}{list(x.shape)}"
    return f"a {type(x).__name__}"


def check_granularity(op: str, granularity: Any) -> Granularity:
    """Returns the granularity as a hashable value, or raises a ValueError that lists them all."""
    if isinstance(granularity, list):
        granularity = tuple(granularity)
    if granularity not in GRANULARITIES:
        accepted = ", ".join(map(repr, GRANULARITIES))
        raise ValueError(f"{op}: unknown granularity {granularity!r}; accepted are {accepted}")
    return granularity


def check_fp8_dtype(op: str, what: str, dtype: Any) -> jnp.dtype:
    """Returns ``dtype`` if it is an FP8 type of this library, or raises a TypeError."""
    dtype = jnp.dtype(dtype)
    if dtype not in FP8_DTYPES:
        raise TypeError(
            f"{op}: {what} must be float8_e4m3fn or float8_e5m2, got {dtype.name}"
            " (other 8-bit formats, MX block formats among them, are not supported)"
        )
    return dtype


def block_shape(granularity: Granularity) -> tuple[int, int]:
    """(rows, columns) that share one scale, 0 standing for the whole extent of the axis."""
    if granularity == "tensor":
        return (0, 0)
    if granularity == "row":
        return (1, 0)
    assert isinstance(granularity, tuple)
    return granularity


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of the scale of an array of ``shape``; the rules stand in ScaledArray's docstring."""
    if granularity == "tensor":
        return (1,) * len(shape)
    rows, columns = block_shape(granularity)
    last = 1 if columns == 0 else math.ceil(shape[-1] / columns)
    if rows == 1:
        return (*shape[:-1], last)
    return (*shape[:-2], math.ceil(shape[-2] / rows), last)


def check_rank(op: str, what: str, ndim: int, granularity: Granularity) -> None:
    """Raises a ValueError if an array of this rank has no such rows or blocks."""
    needed = 2 if granularity == (BLOCK, BLOCK) else 0 if granularity == "tensor" else 1
    if ndim < needed:
        raise ValueError(
            f"{op}: granularity {granularity!r} needs {what} of rank >= {needed}, got rank {ndim}"
        )


def check_scaled_array(op: str, name: str, x: Any) -> ScaledArray:
    """Checks every statement of ScaledArray's docstring for the operand ``name`` of ``op``."""
    if not isinstance(x, ScaledArray):
        raise TypeError(
            f"{op}: {name} must be a jax_fp8.ScaledArray, got {describe(x)}; make one with"
            " jax_fp8.quantize"
        )
    granularity = check_granularity(f"{op}: {name}", x.granularity)
    check_fp8_dtype(op, f"{name}.data", x.data.dtype)
    if jnp.dtype(x.scale.dtype) != jnp.float32:
        raise TypeError(f"{op}: {name}.scale must be float32, got {x.scale.dtype}")
    check_rank(op, name, x.ndim, granularity)
    want, got = scale_shape(x.shape, granularity), tuple(x.scale.shape)
    fits = want == got
    if granularity == "tensor" and len(want) == len(got):
        stacked = (*x.shape[:-1], 1)[: x.ndim]
        fits = all(g in (w, s) for g, w, s in zip(got, want, stacked, strict=True))
    if not fits:
        raise ValueError(
            f"{op}: {name}.scale of shape {got} does not fit {name}.data of shape {x.shape}"
            f" with granularity {granularity!r}, which takes {want}"
        )
    _check_placement(op, name, x)
    return x


def _check_placement(op: str, name: str, x: ScaledArray) -> None:
    """A scale is divided as its data is, or is whole; of auto meshes nothing is known here."""
    if not all(isinstance(array, jax.Array) for array in (x.data, x.scale)):
        return
    specs = [jax.typeof(array).sharding.spec for array in (x.data, x.scale)]
    for of_data, of_scale in itertools.zip_longest(*specs):
        axes = axes_in(of_scale)
        if axes_in(of_data)[: len(axes)] != axes:
            raise ValueError(
                f"{op}: {name}.scale must be divided over the mesh as {name}.data, or not at all,"
                f" got {specs[1]} and {specs[0]}"
            )


def expand_scale(scale: jax.Array, shape: tuple[int, ...], granularity: Granularity) -> jax.Array:
    """Broadcasts a scale so that it multiplies an array of ``shape`` element by element."""
    rows, columns = block_shape(granularity)
    if columns > 1:
        scale = jnp.repeat(scale, columns, axis=-1)[..., : shape[-1]]
    if rows > 1:
        scale = jnp.repeat(scale, rows, axis=-2)[..., : shape[-2], :]
    return jnp.broadcast_to(scale, shape)
