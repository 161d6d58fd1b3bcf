"""How a local function partitions over a mesh: the one place that knows meshes.

Inside ``shard_map`` an operation runs on its local operands. An explicit mesh would make XLA
gather sharded operands behind the caller's back, so it is refused until rules exist for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


def vary_alike(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gives all operands the manual axes of each, so that a result may take its type from any.

    Without this a result would take, say, the type of a replicated activation where the weight
    differs from device to device, and ``shard_map`` would accept wrong ``out_specs`` silently.
    """
    axes = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    union = frozenset().union(*axes)
    return tuple(
        jax.lax.pcast(operand, tuple(union - own), to="varying") if union - own else operand
        for operand, own in zip(operands, axes, strict=True)
    )


def partition(op: str, local: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the single-device function ``local`` of the operation ``op`` for use on meshes.

    Raises:
      NotImplementedError: when an operand is sharded over an axis of an explicit mesh.
    """

    @functools.wraps(local)
    def wrapped(*operands: Any) -> Any:
        operands = vary_alike(operands)
        for operand in operands:
            spec = jax.typeof(operand).sharding.spec
            if any(axes is not None for axes in spec):
                raise NotImplementedError(
                    f"{op}: operand {jax.typeof(operand)} is sharded over an explicit mesh axis,"
                    " which this version does not partition; call it inside jax.shard_map"
                )
        return local(*operands)

    return wrapped
