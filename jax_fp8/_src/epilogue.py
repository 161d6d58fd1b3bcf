"""Bias and activation of a product: what they compute, and their gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jax_fp8._src.partition import on_alike
from jax_fp8._src.placement import placed
from jax_fp8._src.undifferentiable import only_once

NOT_DIFFERENTIABLE = (
    "a ScaledArray cannot be differentiated, since FP8 values have no gradient worth the name:"
    " differentiate with respect to wide values (dot_general takes them on both sides), or put"
    " jax.lax.stop_gradient around it"
)


def activate(y: jax.Array, activation: str | None) -> jax.Array:
    """None, relu, or gelu in its tanh approximation; NaN stays NaN."""
    if activation == "relu":
        return jax.nn.relu(y)
    if activation == "gelu":
        return jax.nn.gelu(y, approximate=True)
    return y


def with_gradients(
    op: str,
    run: Callable[..., Any],
    activation: str | None,
    *,
    input_gradient: Callable[..., Any] | None = None,
    refusal: str | None = None,
    placements: tuple[Any, Any] = (None, None),
) -> Callable[..., Any]:
    """``(x, w, bias, scales) -> y``, differentiable in a wide ``x`` and in the bias.

    When it is differentiated, the product is rounded to its dtype before the activation, whose
    gradient needs it, and not after alone.

    Args:
      op: the operation, for messages.
      run: ``(activation, x, w, bias, scales) -> y``, ``w`` a ScaledArray, ``x`` one or wide. The
        scales are what else may be traced: what ``run`` closes over cannot be, under jit and grad.
      activation: of ``run``.
      input_gradient: ``(dz, w, dtype) -> dx`` for a wide ``x``; None where it is a ScaledArray.
      refusal: why there is no gradient at all, or None.
      placements: of ``x`` and the bias on an explicit mesh, which their gradients have too.
    """

    @jax.custom_vjp
    def call(x: Any, w: Any, bias: Any, scales: Any) -> Any:
        return run(activation, x, w, bias, scales)

    def forward(*primals: Any) -> Any:
        x, w, bias, scales = jax.tree.map(lambda p: p.value, primals, is_leaf=is_primal)
        moved = jax.tree.map(lambda p: p.perturbed, primals, is_leaf=is_primal)
        constants = moved[1] if input_gradient else moved[:2]
        if any(jax.tree.leaves(constants)):
            raise TypeError(f"{op}: {NOT_DIFFERENTIABLE}")
        if refusal:
            raise NotImplementedError(f"{op}: {refusal}")
        z = only_once(op, functools.partial(run, None))(x, w, bias, scales)
        # Of x and the bias their dtypes alone are needed. A scalar says that x has no gradient,
        # for the number of residuals must not depend on it.
        of_x = bool(input_gradient and moved[0])
        like = jnp.zeros((0,) if of_x else (), jnp.float32 if input_gradient is None else x.dtype)
        like_bias = None if bias is None else jnp.zeros((0,), bias.dtype)
        return activate(z, activation), (z if activation else None, w, like, like_bias)

    def backward(residuals: Any, dy: Any) -> Any:
        z, w, like, like_bias = residuals
        if isinstance(dy, SymbolicZero):
            return None, None, None, None
        dz = dy
        if activation:
            _, pull = jax.vjp(functools.partial(activate, activation=activation), z)
            (dz,) = pull(dy)
        dx = dbias = None
        if input_gradient is not None and like.ndim > 0:
            dx = placed(input_gradient(dz, w, like.dtype), placements[0])
        if like_bias is not None:
            total = dz.astype(jnp.float32).sum(tuple(range(dz.ndim - 1)))
            dbias = placed(total.astype(like_bias.dtype), placements[1])
        return dx, None, dbias, None

    call.defvjp(forward, backward, symbolic_zeros=True)
    return on_alike(call)


def is_primal(node: Any) -> bool:
    """Whether this is an operand as custom_vjp hands it over with ``symbolic_zeros``."""
    return hasattr(node, "perturbed")
