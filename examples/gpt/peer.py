"""Flax's own FP8 product in this GPT, to compare with: Fp8DirectDotGeneralOp, which is of linen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen import fp8_ops

COLLECTION = "_overwrite_with_gradient"


class Overwritten(nnx.Variable):
    """State of the operation, of which the next value is what comes as its gradient."""


class DirectDotGeneral(nnx.Module):
    """The operation with its state, for ``dot_general`` of a layer or of a stack of layers."""

    def __init__(self, stack: tuple[int, ...] = ()) -> None:
        small = jnp.ones((16, 16), jnp.bfloat16)
        dimensions = (((1,), (0,)), ((), ()))
        made = fp8_ops.Fp8DirectDotGeneralOp().init(jax.random.key(0), small, small, dimensions)
        self.names = tuple(made[COLLECTION])
        for name, value in made[COLLECTION].items():
            setattr(self, name, Overwritten(jnp.broadcast_to(value, (*stack, *value.shape))))

    def __call__(self, lhs: Any, rhs: Any, dimension_numbers: Any, **_: Any) -> jax.Array:
        """``lax.dot_general``."""
        state = {COLLECTION: {name: getattr(self, name)[...] for name in self.names}}
        return fp8_ops.Fp8DirectDotGeneralOp().apply(state, lhs, rhs, dimension_numbers)


def convert(model: Any) -> Any:
    """Gives the dense layers, but for the head, this operation."""
    for path, layer in list(nnx.iter_graph(model)):
        if isinstance(layer, nnx.Linear) and "head" not in path:
            layer.dot_general = nnx.data(DirectDotGeneral(layer.kernel.shape[:-2]))
    return model


def train_step(
    loss_of: Callable[..., jax.Array], model: Any, optimizer: nnx.Optimizer, tokens: jax.Array
) -> jax.Array:
    """As ``train.train_step``, with the state overwritten by its gradient."""
    wrt = nnx.DiffState(0, nnx.Any(nnx.Param, Overwritten))
    loss, gradients = nnx.value_and_grad(loss_of, argnums=wrt)(model, tokens)
    state, gradients = nnx.split_state(gradients, Overwritten, nnx.Param)
    optimizer.update(model, gradients)
    nnx.update(model, state)
    return loss
