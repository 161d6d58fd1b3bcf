"""prepare_weight: a weight quantized once for all the products of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src.axes import View, view_of
from jax_fp8._src.layouts import quantize_layouts
from jax_fp8._src.product import Side
from jax_fp8._src.quantize import WIDE_DTYPES
from jax_fp8._src.recipe import Recipe, get_recipe
from jax_fp8._src.scaled_array import ScaledArray, describe
from jax_fp8._src.scaling import ScalingState, check_state, scale_from


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedWeight:
    """A wide weight with its FP8 copies, as a pytree: the right operand of ``dot_general``.

    Its gradient goes to ``wide``; the copies are constants. They belong to the values of ``wide``
    when they were made, so make new ones after each update.

    Attributes:
      wide: the weight.
      forward: the FP8 copy ``(batch, free, contracted)`` for the product, a ScaledArray.
      backward: the copy ``(batch, contracted, free)`` for the gradient of the activation; None
        where the recipe multiplies wide values there.
      amax: of ``wide``, where the recipe's scale is static or delayed, else None.
      recipe: the recipe it was prepared for.
      view: how ``wide`` becomes those copies.
    """

    wide: Any
    forward: ScaledArray
    backward: ScaledArray | None
    amax: Any
    recipe: Recipe = dataclasses.field(metadata={"static": True})
    view: View = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``wide``."""
        return tuple(self.wide.shape)

    @property
    def ndim(self) -> int:
        """Rank of ``wide``."""
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of ``wide``."""
        return jnp.dtype(self.wide.dtype)

    def side(self) -> Side:
        """The operand of a product, of three axes, the copies cut off from differentiation."""
        copies = lax.stop_gradient((self.forward, self.backward, self.amax))
        return Side(self.view.apply(self.wide), *copies)


def prepare_weight(
    w: Any,
    recipe: str | Recipe = "tensorwise",
    *,
    contract: int | Sequence[int] = 0,
    batch: Sequence[int] = (),
    state: ScalingState | None = None,
    implementation: str | None = None,
) -> PreparedWeight:
    """Quantizes a weight for every product of a step: micro-batches, or layers that share it.

    Args:
      w: a wide array of two axes or more.
      recipe: as of the products. Its weight must be quantized.
      contract: the axes that products contract, in their order; 0 is that of Flax's kernels.
      batch: the batch axes of products, likewise.
      state: of static and delayed recipes.
      implementation: of the products; ``"xla"`` also quantizes in plain JAX.

    Returns:
      A PreparedWeight, the ``rhs`` of ``dot_general`` with this recipe and these axes.

    Raises:
      TypeError: for a ``w`` that is not wide.
      ValueError: for a recipe that leaves weights wide, a state that does not fit, or axes that
        ``w`` has not.

    >>> import jax, jax.numpy as jnp, jax_fp8
    >>> w, xs = jnp.ones((32, 8)), jnp.ones((2, 4, 32))
    >>> def loss(w):
    ...     prepared = jax_fp8.prepare_weight(w, "rowwise")  # Once, for both products.
    ...     dims = (((1,), (0,)), ((), ()))
    ...     return sum(jax_fp8.dot_general(x, prepared, dims, recipe="rowwise").sum() for x in xs)
    >>> jax.grad(loss)(w).shape
    (32, 8)
    """
    op = "prepare_weight"
    recipe = get_recipe(op, recipe)
    if recipe.weight is None:
        raise ValueError(f"{op}: {recipe} leaves the weight wide; there is nothing to prepare")
    if getattr(w, "dtype", None) not in WIDE_DTYPES:
        raise TypeError(f"{op}: w must be float32, bfloat16 or float16, got {describe(w)}")
    check_state(op, recipe, state)
    contract = (contract,) if isinstance(contract, int) else tuple(contract)
    axes = tuple(axis + w.ndim if axis < 0 else axis for axis in (*contract, *batch))
    if len(set(axes)) < len(axes) or not all(0 <= axis < w.ndim for axis in axes):
        raise ValueError(
            f"{op}: contract {contract} and batch {batch} are no axes of {describe(w)}"
        )
    view = view_of(w.ndim, axes[: len(contract)], axes[len(contract) :])
    scale = None
    if recipe.weight.scaling != "dynamic":
        assert state is not None
        scale = scale_from(recipe, recipe.weight, state.weight)
    operands = (recipe.weight, recipe.dgrad[1] if recipe.dgrad else None)
    *copies, amax = quantize_layouts(
        lax.stop_gradient(view.apply(w)),
        *(operands if view.contract_last else operands[::-1]),
        scale=scale,
        implementation=implementation,
    )
    forward, backward = copies if view.contract_last else copies[::-1]
    assert forward is not None
    return PreparedWeight(w, forward, backward, amax, recipe, view)
