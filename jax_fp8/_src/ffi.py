"""Loads the extension, registers its XLA FFI targets, and has one thin function a target."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import re
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp
import jaxlib.version
import numpy as np

try:
    from jax_fp8._src import _ffi
except ImportError as error:
    raise ImportError(
        f"jax_fp8's extension cannot be loaded: {error}. A source folder holds none: install the"
        " package with `pip install .` and leave the folder"
    ) from error
from jax_fp8._src import plan_choice

#: Bytes of scratch that a product takes as one more result: what cublasLt wants on Hopper and
#: later, and 256 for aligning it by hand.
WORKSPACE_BYTES = (32 << 20) + 256

#: Words of scratch that a dynamic scale of a whole tensor takes as one more result.
QUANTIZE_SCRATCH_WORDS = 1024

VERSION: str = _ffi.VERSION

_lock = threading.Lock()
_registered = False


def _running_api_version() -> tuple[int, int] | None:
    """The FFI API version of the running jaxlib, read from the headers it ships."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text()
    except OSError:
        return None
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    if None in found:
        return None
    major, minor = (int(match.group(1)) for match in found if match)
    return major, minor


def check_api_version(built: tuple[int, int], running: tuple[int, int] | None) -> None:
    """Raises an ImportError if handlers built for ``built`` would be refused by ``running``.

    XLA accepts a handler whose FFI API is not newer than its own; one that it refuses would
    take JAX's whole CPU backend down, so this is settled before anything is registered.
    """
    if running is None or (built[0] == running[0] and built <= running):
        return
    raise ImportError(
        f"jax_fp8 was built for XLA FFI API {built[0]}.{built[1]}, but"
        f" the running jaxlib {jaxlib.version.__version__} has API {running[0]}.{running[1]}:"
        " install a newer jax, or rebuild jax_fp8 against this one"
    )


def _cublaslt_candidates() -> list[str]:
    """Where pip installs cublasLt, CUDA 13 first: the copies that JAX's own wheels use."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    places = ("cu13/lib/libcublasLt.so.13", "cublas/lib/libcublasLt.so.12")
    paths = [pathlib.Path(root) / place for place in places for root in roots]
    return [str(path) for path in paths if path.exists()]


def register() -> None:
    """Registers jax_fp8's handlers with XLA; a second call returns at once. Thread-safe.

    Every operation does it by itself. Only a process that runs programs exported elsewhere, with
    ``jax.export``, and calls no operation of its own has to.

    Raises:
      ImportError: when the running jaxlib is too old for this build; the message names both.
    """
    global _registered
    plan_choice.settle()
    with _lock:
        if _registered:
            return
        check_api_version(_ffi.API_VERSION, _running_api_version())
        _ffi.set_cublaslt_candidates(_cublaslt_candidates())
        for target, platforms in _ffi.registrations().items():
            for platform, stages in platforms.items():
                jax.ffi.register_ffi_target(target, stages, platform=platform)
        _registered = True


def _result(like: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """A result type on the mesh and with the manual axes of the operand ``like``."""
    type_ = jax.typeof(like)
    spec = jax.sharding.PartitionSpec(*(None,) * len(shape))
    return type_.update(
        shape=shape,
        dtype=jnp.dtype(dtype),
        weak_type=False,
        sharding=jax.sharding.NamedSharding(type_.sharding.mesh, spec),
    )


def quantize(
    x: jax.Array,
    scale: jax.Array | None,
    *,
    dtype: Any,
    block: tuple[int, int],
    scale_shape: tuple[int, ...],
    amax: bool,
    power_of_two: bool,
) -> Sequence[jax.Array]:
    """Calls ``jax_fp8_quantize``: (B, R, C) to the data, the scale and the amax.

    ``scale`` None is dynamic scaling. The amax comes back empty where nobody needs it.
    """
    register()
    given = jnp.zeros((0,), jnp.float32) if scale is None else scale
    results = (
        _result(x, x.shape, dtype),
        _result(x, scale_shape, jnp.float32),
        _result(x, scale_shape if amax or scale is None else (0,), jnp.float32),
        _result(x, (QUANTIZE_SCRATCH_WORDS if scale is None and not block[0] else 0,), jnp.uint32),
    )
    call = jax.ffi.ffi_call("jax_fp8_quantize", results)
    return call(
        x,
        given,
        block_rows=np.int64(block[0]),
        block_cols=np.int64(block[1]),
        power_of_two=power_of_two,
    )[:3]


def cast_transpose(
    x: jax.Array,
    scale: jax.Array | None,
    key: jax.Array | None,
    *,
    entries: int,
    dtype: Any,
    block: tuple[int, int],
    scale_shapes: tuple[tuple[int, ...], tuple[int, ...]],
    layouts: tuple[bool, bool],
    power_of_two: bool,
    amax: bool,
    known: jax.Array | None = None,
) -> Sequence[jax.Array]:
    """Calls ``jax_fp8_cast_transpose``: (B, R, C) to itself and to (B, C, R), scales and amax.

    Each of ``entries`` equal parts of the batch has a tensor scale and a key of its own. ``key``
    None rounds to nearest even. ``known`` are amaxes for row scales, as of ``line_amaxes``. What is
    not asked for comes back empty.
    """
    register()
    batch, rows, columns = x.shape
    shapes = (x.shape, (batch, columns, rows))
    whole = block[0] == 0
    needs_amax = whole and (amax or scale is None)
    scratch = 0
    if whole and scale is None:
        scratch = QUANTIZE_SCRATCH_WORDS * entries
    elif block == (1, 0) and known is None:  # An amax for each row and column.
        scratch = batch * (rows + columns)
    results = (
        *(_result(x, shapes[i] if layouts[i] else (0,), dtype) for i in range(2)),
        *(_result(x, scale_shapes[i] if layouts[i] else (0,), jnp.float32) for i in range(2)),
        _result(x, scale_shapes[0] if needs_amax else (0,), jnp.float32),
        _result(x, (scratch,), jnp.uint32),
    )
    given = known if scale is None else scale
    call = jax.ffi.ffi_call("jax_fp8_cast_transpose", results)
    return call(
        x,
        jnp.zeros((0,), jnp.float32) if given is None else given,
        jnp.zeros((0,), jnp.uint32) if key is None else key,
        entries=np.int64(entries),
        block_rows=np.int64(block[0]),
        block_cols=np.int64(block[1]),
        power_of_two=power_of_two,
    )[:5]


def line_amaxes(x: jax.Array) -> jax.Array:
    """Calls ``jax_fp8_line_amaxes``: the amax of each row of (B, R, C), and then of each column.

    Float32 of B R + B C, from one read.
    """
    register()
    batch, rows, columns = x.shape
    result = _result(x, (batch * (rows + columns),), jnp.float32)
    return jax.ffi.ffi_call("jax_fp8_line_amaxes", result)(x)


def fused_quantize(
    operands: tuple[jax.Array | None, ...],
    *,
    producer: str,
    eps: float,
    dtype: Any,
    block: tuple[int, int],
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
) -> Sequence[jax.Array]:
    """Calls ``jax_fp8_fused_quantize``: the data of ``shape``, (B, R, C), its scale and the sum.

    ``operands`` are x, the residual, the weight, the bias (both (1 or B, C)) and the static
    scale, None where there is none. The sum of x and the residual is empty without a residual.
    """
    register()
    x, residual, _, _, given = operands
    assert x is not None
    amax = (shape[0],) if given is None and block[0] == 0 else (0,)
    results = (
        _result(x, shape, dtype),
        _result(x, scale_shape, jnp.float32),
        _result(x, amax, jnp.float32),
        _result(x, (0,) if residual is None else x.shape, x.dtype),
    )
    none = jnp.zeros((0,), jnp.float32)
    data, scale, _, total = jax.ffi.ffi_call("jax_fp8_fused_quantize", results)(
        *(none if operand is None else operand for operand in operands),
        producer=producer,
        eps=np.float32(eps),
        block_rows=np.int64(block[0]),
        block_cols=np.int64(block[1]),
    )
    return data, scale, total


def describe(*arrays: Any) -> str:
    """Dtype, rank and dimensions of each: for the stage that XLA gives no arguments."""
    return " ".join(" ".join(map(str, (a.dtype, len(a.shape), *a.shape))) for a in arrays)


def scaled_matmul(
    operands: tuple[jax.Array, ...],
    *,
    out_dtype: Any,
    blocks: tuple[tuple[int, int], tuple[int, int]],
    activation: str,
    fast: bool,
    implementation: str,
    capability: int,
    workspace: bool,
) -> Sequence[jax.Array]:
    """Calls ``jax_fp8_scaled_matmul``: x (B, M, K) and w (B, N, K) to (B, M, N).

    ``operands`` are x, its scale, w, its scale, the bias (or empty) and the reciprocal of the
    output scale (or empty). The results are D, its amax (empty unless D is FP8) and scratch.
    """
    register()
    x, _, w, _, _, inverse_out_scale = operands
    results = (
        _result(x, (x.shape[0], x.shape[1], w.shape[1]), out_dtype),
        _result(x, inverse_out_scale.shape, jnp.float32),
        _result(x, (WORKSPACE_BYTES if workspace else 0,), jnp.uint8),
    )
    call = jax.ffi.ffi_call("jax_fp8_scaled_matmul", results)
    (x_rows, x_cols), (w_rows, w_cols) = blocks
    return call(
        *operands,
        arrays=describe(*operands, *results),
        x_block_rows=np.int64(x_rows),
        x_block_cols=np.int64(x_cols),
        w_block_rows=np.int64(w_rows),
        w_block_cols=np.int64(w_cols),
        activation=activation,
        fast_accumulation=fast,
        implementation=implementation,
        capability=np.int64(capability),
    )


@dataclasses.dataclass(frozen=True)
class Link:
    """A product of a call of ``jax_fp8_fused_matmul``; x is (M, K).

    Attributes:
      w: (N, K).
      w_scale: of w.
      bias: None, or (N,).
      norm: None, or the weight of a norm of x, (K,).
      residual: None, (M, columns), or the index of the link whose result is added.
      scale: None, or the (1, 1) scale that what is multiplied is quantized with.
      eps: of the norm.
      swiglu: whether the result is of gates and what they gate.
    """

    w: jax.Array
    w_scale: jax.Array
    bias: jax.Array | None
    norm: jax.Array | None
    residual: jax.Array | int | None
    scale: jax.Array | None
    eps: float
    swiglu: bool

    @property
    def columns(self) -> int:
        """Of the result."""
        n: int = self.w.shape[0]
        return n // 2 if self.swiglu else n


def fused_matmul(
    x: jax.Array,
    links: Sequence[Link],
    *,
    quantizes: bool,
    many_rows: bool,
    implementation: str,
    capability: int,
) -> tuple[jax.Array, ...]:
    """Calls ``jax_fp8_fused_matmul``: (M, columns) of each link.

    The first multiplies x, (M, K), each of the others what the one before it has made. Where it
    ``quantizes``, what is multiplied goes to E4M3 with scales of its rows, or one that is given.
    With ``many_rows`` sums are rounded to bfloat16 before what is done to them.
    """
    register()
    none = jnp.zeros((0,), jnp.float32)
    operands: list[jax.Array] = []
    results: list[Any] = []
    m = x.shape[0]
    for link in links:
        n, k = link.w.shape
        residual = None if isinstance(link.residual, int) else link.residual
        optional = (link.bias, link.norm, residual, link.scale)
        operands += [link.w, link.w_scale, *(none if a is None else a for a in optional)]
        # A bare product of many rows is the result.
        has_sums = not many_rows or link.swiglu or link.residual is not None
        results += [
            _result(x, (m, link.columns), x.dtype),
            _result(x, (m, k), jnp.float8_e4m3fn if quantizes else x.dtype),
            _result(x, (m if quantizes else 0, 1), jnp.float32),
            _result(x, (m if has_sums else 0, n), jnp.bfloat16 if many_rows else jnp.float32),
        ]
    results.append(_result(x, (WORKSPACE_BYTES if many_rows else 0,), jnp.uint8))
    added = [link.residual if isinstance(link.residual, int) else -1 for link in links]
    return tuple(
        jax.ffi.ffi_call("jax_fp8_fused_matmul", results)(
            *(x, jnp.ones((1, 1), jnp.float32), *operands),
            eps=np.array([link.eps for link in links], np.float32),
            swiglu=np.array([link.swiglu for link in links], np.int64),
            added=np.array(added, np.int64),
            implementation=implementation,
            capability=np.int64(capability),
        )[:-1:4]
    )


@functools.cache
def cublaslt_version() -> str:
    """Version of the cublasLt that is loaded, as ``"13.1.0"``; loads it if need be.

    Raises:
      RuntimeError: when there is none, or it is older than what jax_fp8 supports.
    """
    register()
    return _ffi.cublaslt_version()
