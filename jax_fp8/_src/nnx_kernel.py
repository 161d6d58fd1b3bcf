"""FP8Kernel: the FP8 values of a kernel of Flax's nnx layers, in the place of its Param."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jax_fp8._src.axes import view_of
from jax_fp8._src.dot_general import dot_general
from jax_fp8._src.layouts import quantize_layouts
from jax_fp8._src.recipe import Operand
from jax_fp8._src.scaled_array import ScaledArray

Axes = tuple[int, ...]


class KernelVariable(nnx.Variable):
    """FP8 data of a kernel, or its scale: no parameter, so nothing trains it."""


class FP8Kernel(nnx.Module):
    """A kernel's ScaledArray ``(N, K)`` or ``(batch, N, K)``, and how its axes became these.

    Attributes:
      data: FP8, in a ``KernelVariable``.
      scale: float32, likewise.
      granularity: of the scale.
      shape: of the kernel that it stands for.
      dtype: likewise.
      contract: the axes of that kernel that a product contracts.
      batch: its batch axes.
    """

    def __init__(
        self,
        values: ScaledArray,
        *,
        shape: tuple[int, ...],
        dtype: Any,
        contract: Axes,
        batch: Axes,
    ) -> None:
        self.data = KernelVariable(values.data)
        self.scale = KernelVariable(values.scale)
        self.granularity = values.granularity
        self.shape = shape
        self.dtype = dtype
        self.contract = contract
        self.batch = batch

    def __getitem__(self, index: Any) -> FP8Kernel:
        """What a layer asks its kernel for; there are no wide values to give."""
        if index is not Ellipsis:
            raise IndexError(f"FP8Kernel: only [...] is there, got [{index}]")
        return self

    @property
    def ndim(self) -> int:
        """Rank of the kernel that it stands for."""
        return len(self.shape)

    @property
    def scaled_array(self) -> ScaledArray:
        """The values."""
        return ScaledArray(self.data[...], self.scale[...], self.granularity)

    def multiply(
        self, lhs: Any, dimension_numbers: Any, *, out_sharding: Any = None, **options: Any
    ) -> Any:
        """What ``jax_fp8.dot_general`` makes of ``lhs`` and the kernel in its own axes."""
        (lhs_contract, contract), (lhs_batch, batch) = dimension_numbers
        if set(contract) != set(self.contract) or tuple(batch) != self.batch:
            raise ValueError(
                f"FP8Kernel: quantized for contracting its axes {self.contract} with batch axes"
                f" {self.batch}, not {tuple(contract)} and {tuple(batch)}"
            )
        place = dict(zip(contract, lhs_contract, strict=True))
        view = view_of(lhs.ndim, tuple(place[axis] for axis in self.contract), tuple(lhs_batch))
        values = self.scaled_array
        if not self.batch:
            values = jax.tree.map(lambda leaf: leaf[None], values)
        apart = view.apply(lhs, apart=True)
        last = apart.ndim - 1 if view.contract_last else 1
        found = dot_general(apart, values, (((last,), (2,)), ((0,), (0,))), **options)
        y, *state = found if isinstance(found, tuple) else (found,)
        own = [size for axis, size in enumerate(self.shape) if axis not in (*contract, *batch)]
        y = y.reshape(*(lhs.shape[axis] for axis in (*lhs_batch, *view.free)), *own)
        if out_sharding is not None:
            y = jax.sharding.reshard(y, out_sharding)
        return (y, *state) if state else y


def quantize_kernel(
    kernel: jax.Array, operand: Operand, contract: Axes, batch: Axes, stacked: int
) -> FP8Kernel:
    """The kernel of a layer, or of a stack of layers in ``stacked`` leading axes, in FP8."""
    stack, shape = kernel.shape[:stacked], kernel.shape[stacked:]
    free = tuple(axis for axis in range(len(shape)) if axis not in (*contract, *batch))

    def sizes(axes: Axes) -> int:
        return math.prod(shape[axis] for axis in axes)

    def quantize(kernel: jax.Array) -> ScaledArray:
        folded = kernel.transpose(*batch, *free, *contract)
        folded = folded.reshape(sizes(batch), sizes(free), sizes(contract))
        values, _, _ = quantize_layouts(folded, operand, None)
        assert values is not None
        return values if batch else jax.tree.map(lambda leaf: leaf[0], values)

    if stack:
        values = lax.map(quantize, kernel.reshape(math.prod(stack), *shape))
        values = jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[1:]), values)
    else:
        values = quantize(kernel)
    return FP8Kernel(values, shape=shape, dtype=kernel.dtype, contract=contract, batch=batch)


def kernel_axes(layer: Any) -> tuple[Axes, Axes]:
    """The axes of a layer's kernel that its product contracts, and its batch axes."""
    if isinstance(layer, nnx.Linear):
        return (0,), ()
    if isinstance(layer, nnx.LinearGeneral):
        count = len(layer.batch_axis)
        return tuple(range(count, count + len(layer.in_features))), tuple(range(count))
    inputs, result = layer.einsum_str.split("->")
    left, right = inputs.split(",")
    shared = [label for label in left if label in right and label.isalpha()]
    contract = tuple(right.index(label) for label in shared if label not in result)
    return contract, tuple(right.index(label) for label in shared if label in result)


def multiply(lhs: Any, rhs: Any, dimension_numbers: Any, **options: Any) -> Any:
    """``jax_fp8.dot_general``, of which ``rhs`` may be an FP8Kernel."""
    if isinstance(rhs, FP8Kernel):
        return rhs.multiply(lhs, dimension_numbers, **options)
    return dot_general(lhs, rhs, dimension_numbers, **options)


@dataclasses.dataclass(frozen=True)
class KernelPromotion:
    """A layer's ``promote_dtype``, to which an FP8Kernel is a kernel of its old dtype."""

    promote_dtype: Callable[..., Any]

    def __call__(self, args: tuple[Any, ...], /, **options: Any) -> tuple[Any, ...]:
        """All but an FP8Kernel in one dtype."""
        kernels = [isinstance(arg, FP8Kernel) for arg in args]
        wide = [
            jnp.zeros((), arg.dtype) if is_kernel else arg
            for arg, is_kernel in zip(args, kernels, strict=True)
        ]
        promoted = self.promote_dtype(tuple(wide), **options)
        return tuple(
            arg if is_kernel else new
            for arg, is_kernel, new in zip(args, kernels, promoted, strict=True)
        )
