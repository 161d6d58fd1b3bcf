"""How arrays lie on an explicit mesh, and how to reshape and bring them there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jax_fp8._src.partition import axes_in, entry_of


def placement(x: Any) -> NamedSharding | None:
    """How an array lies on an explicit mesh; None where it is on every device of it, or none is."""
    sharding = jax.typeof(x).sharding
    return None if all(axes is None for axes in sharding.spec) else sharding


def placed(x: jax.Array, where: NamedSharding | None) -> jax.Array:
    """Brings an array of an explicit mesh there."""
    if where is None and placement(x) is None:
        return x
    if where is None:
        where = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*(None,) * x.ndim))
    return x if jax.typeof(x).sharding == where else jax.sharding.reshard(x, where)


def whole_along(x: jax.Array, axis: int) -> jax.Array:
    """An array with none of that axis divided, on an explicit mesh."""
    where = placement(x)
    if where is None or where.spec[axis] is None:
        return x
    spec = [None if i == axis else entry for i, entry in enumerate(where.spec)]
    return placed(x, NamedSharding(where.mesh, PartitionSpec(*spec)))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the result of a product is to lie, where that was said, and what that takes.

    Attributes:
      where: the result lies, (B, *rows, N).
      of_x: for each axis of rows, what divides it in ``x`` and is to divide N instead: ``x`` is
        brought together along that.
      of_gradient: for each axis of rows, what divides it in the result, and K in ``x``: likewise
        of the gradient.
    """

    where: NamedSharding
    of_x: tuple[tuple[str, ...], ...]
    of_gradient: tuple[tuple[str, ...], ...]


def outcome(x: Any, rows: Sequence[int], contract: Sequence[int], spec: Sequence[Any]) -> Any:
    """An Outcome, or None where ``x`` lies on no explicit mesh.

    Args:
      x: the left operand.
      rows: its axes of rows.
      contract: its contracted axes.
      spec: of the result, (B, *rows, N).
    """
    where = placement(x)
    if where is None:
        return None
    _, *of_rows, of_n = (axes_in(entry) for entry in spec)
    of_k = {name for axis in contract for name in axes_in(where.spec[axis])}
    return Outcome(
        NamedSharding(where.mesh, PartitionSpec(*spec)),
        tuple(tuple(n for n in axes_in(where.spec[axis]) if n in of_n) for axis in rows),
        tuple(tuple(n for n in names if n in of_k) for names in of_rows),
    )


def whole(x: Any, axes: Sequence[tuple[str, ...]], first: int) -> Any:
    """Arrays whose axes from ``first`` on are not divided by these of the mesh, each by its own."""

    def one(x: jax.Array) -> jax.Array:
        where = placement(x)
        if where is None:
            return x
        spec = list(where.spec)
        for i, dropped in enumerate(axes, first):
            spec[i] = entry_of(tuple(name for name in axes_in(spec[i]) if name not in dropped))
        return placed(x, NamedSharding(where.mesh, PartitionSpec(*spec)))

    return jax.tree.map(one, x)


def placement_of_product(
    lhs: Any, rhs: Any, contract: Sequence[Sequence[int]], batch: Sequence[Sequence[int]]
) -> NamedSharding | None:
    """How a product lies on an explicit mesh: as the operands' own axes do, the first to have it.

    Along axes of the mesh that divide the contracted axes of both there are sums, and no parts.
    """
    placements = [placement(x) for x in (lhs, rhs)]
    mesh = next((p.mesh for p in placements if p is not None), None)
    if mesh is None:
        return None
    specs = [jax.typeof(x).sharding.spec for x in (lhs, rhs)]
    used: set[str] = set()
    for left, right in zip(*contract, strict=True):
        if specs[0][left] == specs[1][right]:
            used.update(axes_in(specs[0][left]))
    entries: list[Any] = []
    for index, spec in enumerate(specs):
        free = [i for i in range(len(spec)) if i not in contract[index] and i not in batch[index]]
        for axis in (*batch[0], *free) if index == 0 else free:
            names = tuple(name for name in axes_in(spec[axis]) if name not in used)
            used.update(names)
            entries.append(entry_of(names))
    return NamedSharding(mesh, PartitionSpec(*entries))


def reshape(x: jax.Array, shape: tuple[int, ...], spec: Any = None) -> jax.Array:
    """Reshapes an array, also one of an explicit mesh, where JAX must be told how it is to lie.

    Args:
      x: the array.
      shape: of the result.
      spec: how the result is to lie on an explicit mesh; None: as its merged axes did, one after
        the other, on the first axis that they make together.
    """
    where = placement(x)
    if where is None:
        return x.reshape(shape)
    if spec is None:
        spec = _spec_of_reshaped(x.shape, where.spec, shape, where.mesh.shape)
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(where.mesh, spec))


def _spec_of_reshaped(
    before: tuple[int, ...], spec: Any, after: tuple[int, ...], mesh: Mapping[str, int]
) -> PartitionSpec:
    entries: list[Any] = []
    axes = [axes_in(entry) for entry in spec]
    sizes = list(before)
    # Of what has been read of ``before``: elements and axes that are not taken yet.
    left, waiting = 1, list[str]()
    for length in after:
        while sizes and (left < length or left % max(length, 1)):
            left *= sizes.pop(0)
            waiting += axes.pop(0)
        taken, parts = [], 1
        for name in waiting:
            parts *= mesh[name]
            if length % parts:
                break
            taken.append(name)
        left //= max(length, 1)
        waiting = waiting[len(taken) :] if left > 1 else []
        entries.append(taken[0] if len(taken) == 1 else tuple(taken) or None)
    return PartitionSpec(*entries)
