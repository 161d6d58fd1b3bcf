"""Along which axes a scaled product can be divided over a mesh."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jax_fp8._src.definition import CallConfig
from jax_fp8._src.partition import Rule, in_units, name_of
from jax_fp8._src.scaled_array import Granularity, block_shape


def summed_factors(config: CallConfig) -> tuple[str, ...]:
    """The factors of the axes that are summed over."""
    return tuple(f"k{i}" for i in range(config.contracted))


def product_rule(config: CallConfig, *operands: jax.Array) -> Rule:
    """Batch axes, rows and columns of the result are divided, and what is summed up is."""
    x, x_scale, w, w_scale, bias, _ = operands
    batch = [f"b{i}" for i in range(config.batch_dims)]
    summed = summed_factors(config)
    rows = [f"m{i}" for i in range(x.ndim - config.batch_dims - len(summed))]
    last_row = -1 - len(summed)
    sizes = dict(zip((*batch, *rows, *summed), x.shape, strict=True)) | {"n": w.shape[last_row]}
    units: dict[str, int] = {}
    of_x: list[str | None] = [*batch, *rows, *summed]
    of_w: list[str | None] = [*batch, "n", *summed]
    granularities = config.x_granularity, config.w_granularity
    for granularity, dimensions in zip(granularities, (of_x, of_w), strict=True):
        for axis, block in zip((last_row, -1), block_shape(granularity), strict=True):
            if block > 1 and dimensions[axis] is not None:
                in_units(dimensions, axis, block, sizes, units)
    if of_x[-1] != of_w[-1]:  # The other operand has no blocks.
        shared = None if None in (of_x[-1], of_w[-1]) else f"{summed[-1]}*"
        of_x[-1] = of_w[-1] = shared
    result = (*of_x[: last_row + 1], of_w[last_row])
    return Rule(
        (
            tuple(of_x),
            _of_scale(config.x_granularity, x.shape, x_scale.shape, of_x),
            tuple(of_w),
            _of_scale(config.w_granularity, w.shape, w_scale.shape, of_w),
            (of_w[last_row] if config.has_bias else None,),
            (None,),
        ),
        (result, (None,)),
        sizes,
        units,
        multiplied=(0, 2),
    )


def _of_scale(
    granularity: Granularity,
    shape: tuple[int, ...],
    scale: tuple[int, ...],
    dimensions: Sequence[str | None],
) -> tuple[str | None, ...]:
    """The factors of a scale: those of the data, where it has a scale for each unit."""
    found = []
    for own, of_data, dimension in zip(scale, shape, dimensions, strict=True):
        is_whole = own == of_data and not (dimension or "").endswith("*")
        is_unit = (dimension or "").endswith("*") and isinstance(granularity, tuple) and own > 1
        found.append(name_of(dimension) if (is_whole and own > 1) or is_unit else None)
    return tuple(found)
