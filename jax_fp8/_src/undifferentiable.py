"""What an operation without derivatives says when it is asked for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def undifferentiable(function: Callable[..., Any], message: str) -> Any:
    """``function``, jitted and inlined; under differentiation it raises a NotImplementedError."""
    refusing = jax.custom_vjp(function)

    def forward(*operands: jax.Array) -> Any:
        raise NotImplementedError(message)

    refusing.defvjp(forward, lambda residuals, cotangents: cotangents)
    return jax.jit(refusing, inline=True)
