"""How the axes of an operand of ``dot_general`` become (batch, *rows, columns)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jax_fp8._src.placement import reshape
from jax_fp8._src.scaled_array import BLOCK, ScaledArray, describe, scale_shape


@dataclasses.dataclass(frozen=True)
class View:
    """An operand as three axes: batch, and then free and contracted ones in either order.

    Attributes:
      batch: its batch axes, in the order of the product's.
      free: the axes that stay, ascending.
      contract: the axes that are summed over, in the order of the product's.
      contract_last: whether the contracted ones come last. They do unless it takes a transpose
        that the other order does without.
    """

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contract: tuple[int, ...]
    contract_last: bool

    @property
    def permutation(self) -> tuple[int, ...]:
        """The operand's axes in the order of the three."""
        rest = (self.free, self.contract) if self.contract_last else (self.contract, self.free)
        return (*self.batch, *rest[0], *rest[1])

    def apply(self, x: jax.Array, *, apart: bool = False) -> jax.Array:
        """``x`` as (batch, free, contracted) or (batch, contracted, free).

        ``apart`` leaves several free axes as they are, where the contracted ones come last: one
        axis could not be divided over a mesh as two are.
        """
        x = x.transpose(self.permutation)
        count = len(self.batch)
        middle = count + len(self.free if self.contract_last else self.contract)
        shape = x.shape
        second = shape[count:middle]
        if not (apart and self.contract_last):
            second = (math.prod(second),)
        return reshape(x, (math.prod(shape[:count]), *second, math.prod(shape[middle:])))

    def apply_scaled(
        self, op: str, name: str, x: ScaledArray, *, apart: bool = False
    ) -> ScaledArray:
        """The same of a ScaledArray, whose contracted axis is the last and stays there.

        Raises:
          ValueError: where axes would have to move, or blocks to be cut.
        """
        in_order = self.contract_last and self.permutation == tuple(range(x.ndim))
        if not in_order or len(self.contract) != 1:
            raise ValueError(
                f"{op}: a ScaledArray contracts its last axis and has its batch axes in front; of"
                f" {name}, {describe(x)}, axes {self.contract} are contracted and {self.batch} are"
                " batch axes"
            )
        # Blocks of several rows are of the free axes taken as one.
        data = self.apply(x.data, apart=apart and x.granularity != (BLOCK, BLOCK))
        if x.granularity == "tensor" and x.scale.size == 1:
            return ScaledArray(data, reshape(x.scale, (1,) * data.ndim))
        if x.granularity == "tensor":  # Stacked arrays, each with a scale of its own.
            scale = jnp.broadcast_to(x.scale, (*x.shape[:-1], 1))
            return ScaledArray(data, reshape(scale, (*data.shape[:-1], 1)), "row")
        want = scale_shape(data.shape, x.granularity)
        if math.prod(want) != x.scale.size:
            raise ValueError(
                f"{op}: {name}, {describe(x)}, has blocks {x.granularity} that do not fit its free"
                " axes taken as one"
            )
        return ScaledArray(data, reshape(x.scale, want), x.granularity)


def view_of(ndim: int, contract: tuple[int, ...], batch: tuple[int, ...]) -> View:
    """The view of an operand of that rank."""
    free = tuple(axis for axis in range(ndim) if axis not in contract and axis not in batch)
    as_it_lies = (*batch, *contract, *free) == tuple(range(ndim))
    already_last = (*batch, *free, *contract) == tuple(range(ndim))
    return View(batch, free, contract, already_last or not as_it_lies)
