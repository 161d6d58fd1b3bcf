"""How a local function partitions over a mesh: the one place that knows meshes.

An operation states a ``Rule``: along which factors its operands and results can be divided. From
that and from how the operands lie it follows which axes of the mesh divide which factor, and the
local function runs on the parts, told the axes that it may have to reduce over.

- On an auto mesh the rule goes to XLA's partitioner (Shardy), by ``custom_partitioning``.
- On an explicit mesh, where shardings are part of types, ``shard_map`` is put around the function.
- Inside ``shard_map`` an operation runs on the operands it sees, with no axes to reduce over.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

#: Factor -> the axes of the mesh that divide it.
Axes = Mapping[str, tuple[str, ...]]
#: Of an array, for each dimension: the factor that it is; ``"k*"`` where so many elements of it are
#: one unit of the factor ``"k"``, as those under one scale are; None where it is never divided.
Dimensions = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The factors of an operation.

    Attributes:
      operands: of each operand.
      results: of each result.
      sizes: of each factor, in units.
      units: of each factor that has units of several elements, how many.
      multiplied: the operands of which products are summed up along what the results do not have.
    """

    operands: tuple[Dimensions, ...]
    results: tuple[Dimensions, ...]
    sizes: Mapping[str, int]
    units: Mapping[str, int] = dataclasses.field(default_factory=dict)
    multiplied: tuple[int, ...] = ()

    def without(self, factor: str | None) -> Rule:
        """The rule that leaves a factor undivided."""

        def undivided(arrays: tuple[Dimensions, ...]) -> tuple[Dimensions, ...]:
            return tuple(tuple(None if name_of(d) == factor else d for d in a) for a in arrays)

        return dataclasses.replace(
            self, operands=undivided(self.operands), results=undivided(self.results)
        )

    def axes(self, mesh: Mapping[str, int], specs: Sequence[Any]) -> dict[str, tuple[str, ...]]:
        """Which axes divide which factor, given how operands and then results would lie.

        An axis divides the first factor that has it: of those that are summed up, where they lie
        alike; of the results; of the operands. What lies otherwise is brought there. Where a factor
        does not come out even, its last axes do not divide it.
        """
        entries: list[list[tuple[str, tuple[str, ...]]]] = []
        for dimensions, spec in zip((*self.operands, *self.results), specs, strict=True):
            entries.append(
                [
                    (factor, axes_in(entry))
                    for dimension, entry in zip(dimensions, spec, strict=False)
                    if entry is not None and (factor := name_of(dimension)) is not None
                ]
            )
        operands, results = entries[: len(self.operands)], entries[len(self.operands) :]
        kept = {name_of(dimension) for array in self.results for dimension in array}
        first, *others = (operands[i] for i in self.multiplied) if self.multiplied else ([],)
        summed = [e for e in first if e[0] not in kept and all(e in other for other in others)]
        found: dict[str, tuple[str, ...]] = {}
        for factor, names in itertools.chain(summed, *results, *operands):
            used = {name for others in found.values() for name in others}
            fitting, parts = [], 1
            for name in names:
                parts *= mesh[name]
                if name in used or self.sizes[factor] % parts:
                    break
                fitting.append(name)
            if fitting and factor not in found:
                found[factor] = tuple(fitting)
        return found


def axes_of(factors: Sequence[str], axes: Axes) -> tuple[str, ...]:
    """All the axes that divide these factors."""
    return tuple(name for factor in factors for name in axes.get(factor, ()))


def axes_in(entry: Any) -> tuple[str, ...]:
    """The axes of one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def entry_of(names: tuple[str, ...]) -> Any:
    """The entry of a PartitionSpec for these axes."""
    return names[0] if len(names) == 1 else names or None


def name_of(dimension: str | None) -> str | None:
    """The factor of a dimension."""
    return dimension and dimension.rstrip("*")


def in_units(
    dimensions: list[str | None],
    axis: int,
    unit: int,
    sizes: dict[str, int],
    units: dict[str, int],
) -> None:
    """Makes a dimension one of units of so many elements, or undivided where there are no two."""
    name = dimensions[axis]
    assert name is not None
    if name not in units and (sizes[name] % unit or sizes[name] == unit):
        dimensions[axis] = None
        return
    dimensions[axis] = f"{name}*"
    if name not in units:
        sizes[name], units[name] = sizes[name] // unit, unit


def specs_of(dimensions: Sequence[Dimensions], axes: Axes) -> tuple[PartitionSpec, ...]:
    """How arrays lie whose factors are divided by these axes."""

    def entry(dimension: str | None) -> Any:
        return entry_of(axes.get(name_of(dimension) or "", ()))

    return tuple(PartitionSpec(*map(entry, array)) for array in dimensions)


def all_max(amax: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The largest of an amax over axes of the mesh; a NaN stays one.

    Of floats that are not negative the bits are in the order of the values, NaN the largest, which
    a maximum of floats may lose.
    """
    bits = jax.lax.pmax(jax.lax.bitcast_convert_type(amax, jnp.int32), axes)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


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


def on_alike(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, of trees of operands that vary alike.

    The gradient of one that is the same on all devices of a manual axis is a sum over them, which
    the transpose of this cast is.
    """

    def run(*operands: Any) -> Any:
        leaves, tree = jax.tree.flatten(operands)
        return call(*jax.tree.unflatten(tree, vary_alike(tuple(leaves))))

    return run


def partition(local: Callable[..., Any], rule: Callable[..., Rule]) -> Callable[..., Any]:
    """Wraps the single-device function ``local`` for use on meshes.

    Args:
      local: of the operands, and of ``axes=``, the axes of the mesh that divide each factor.
      rule: of the operands, the Rule.
    """

    def wrapped(*operands: Any) -> Any:
        operands = vary_alike(operands)
        types = [jax.typeof(operand) for operand in operands]
        # The mesh that is set, where no operand lies on one.
        meshes = [*(t.sharding.mesh for t in types), jax.sharding.get_abstract_mesh()]
        explicit = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
        if explicit is not None:
            return _explicit(explicit, local, rule(*operands), operands)
        if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
            return local(*operands, axes={})
        return _auto(local, rule(*operands), operands)

    return wrapped


def _explicit(mesh: Any, local: Callable[..., Any], rule: Rule, operands: tuple[Any, ...]) -> Any:
    types = [jax.typeof(operand) for operand in operands]
    for t in types:
        other = t.sharding.mesh
        if not other.empty and other.shape_tuple != mesh.shape_tuple:
            raise ValueError(
                f"all operands must lie on one mesh, got {t.str_short()} on {dict(other.shape)} and"
                f" others on {dict(mesh.shape)}"
            )
    unknown = [PartitionSpec()] * len(rule.results)
    axes = rule.axes(mesh.shape, [*(t.sharding.spec for t in types), *unknown])
    in_specs = specs_of(rule.operands, axes)
    placed = [
        operand
        if t.sharding.spec == spec
        else jax.sharding.reshard(operand, NamedSharding(mesh, spec))
        for operand, t, spec in zip(operands, types, in_specs, strict=True)
    ]
    run = jax.shard_map(
        functools.partial(local, axes=axes),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=specs_of(rule.results, axes),
        check_vma=False,  # The rule is what says how results vary.
    )
    return run(*placed)


def _auto(local: Callable[..., Any], rule: Rule, operands: tuple[Any, ...]) -> Any:
    whole = custom_partitioning(lambda *parts: local(*parts, axes={}))

    def divide(mesh: Any, arguments: Any, results: Any) -> Any:
        leaves, tree = jax.tree.flatten(results)
        if mesh.empty:  # No operand lies on a mesh.
            lie = [leaf.sharding for leaf in (*arguments, *leaves)]
            count = len(arguments)
            whole = functools.partial(local, axes={})
            return mesh, whole, jax.tree.unflatten(tree, lie[count:]), tuple(lie[:count])
        specs = [leaf.sharding.spec for leaf in (*arguments, *leaves)]
        axes = rule.axes(mesh.shape, specs)
        placed = [
            tuple(NamedSharding(mesh, spec) for spec in specs_of(arrays, axes))
            for arrays in (rule.operands, rule.results)
        ]
        run = functools.partial(local, axes=axes)
        return mesh, run, jax.tree.unflatten(tree, placed[1]), placed[0]

    whole.def_partition(
        divide, sharding_rule=lambda mesh, operands, results: _for_shardy(rule, mesh.shape)
    )
    return whole(*operands)


def _for_shardy(rule: Rule, mesh: Mapping[str, int]) -> SdyShardingRule:
    """The rule for XLA's propagation of shardings, in which a unit is a factor of its own.

    Shardy would take a part of an axis where a whole one leaves no whole units, and JAX has no name
    for such a part: a factor for which an axis of the mesh has too many devices is not divided.
    """
    for name in rule.units:
        if any(rule.sizes[name] % size for size in mesh.values()):
            rule = rule.without(name)
    fixed: list[str] = []

    def dimension(given: str | None) -> Any:
        if given is None:
            fixed.append(f"fixed{len(fixed)}")
            return fixed[-1]
        name = given.rstrip("*")
        return CompoundFactor(name, f"{name}_unit") if given.endswith("*") else name

    operands, results = (
        tuple(ArrayMapping(*map(dimension, array)) for array in arrays)
        for arrays in (rule.operands, rule.results)
    )
    there = {dimension for array in (*rule.operands, *rule.results) for dimension in array}
    units = {name: size for name, size in rule.units.items() if f"{name}*" in there}
    given: dict[str, Any] = {f"{name}_unit": size for name, size in units.items()}
    given |= {name: rule.sizes[name] for name in units if name not in there}
    return SdyShardingRule(operands, results, need_replication_factors=tuple(fixed), **given)
