"""What an operation without derivatives says when it is asked for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def undifferentiable(function: Callable[..., Any], message: str) -> Any:
    """``function``, jitted and inlined; under differentiation it raises a NotImplementedError."""
    return jax.jit(_refusing(function, message), inline=True)


def only_once(op: str, rule: Callable[..., Any]) -> Any:
    """A part of the rule for gradients, which says that it has none of its own."""
    return _refusing(
        rule,
        f"{op}: FP8 products have first derivatives only; the gradient of one was differentiated"
        " again",
    )


def _refusing(function: Callable[..., Any], message: str) -> Any:
    refusing = jax.custom_vjp(function)

    def forward(*operands: Any) -> Any:
        raise NotImplementedError(message)

    refusing.defvjp(forward, lambda residuals, cotangents: cotangents)
    return refusing
