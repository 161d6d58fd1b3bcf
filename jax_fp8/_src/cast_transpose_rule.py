"""Along which axes cast_transpose can be divided over a mesh, with several axes of rows too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_fp8._src.partition import Axes, Dimensions, Rule, axes_of, in_units, name_of
from jax_fp8._src.quantize import QuantizeConfig
from jax_fp8._src.scaled_array import Granularity, block_shape


@dataclasses.dataclass(frozen=True)
class CastTransposeConfig:
    """The static part of a call: everything but the arrays."""

    dtype: jnp.dtype
    granularity: Granularity
    static: bool
    power_of_two: bool
    stochastic: bool
    straight: bool
    transposed: bool
    amax: bool
    implementation: str | None
    #: Axes of rows. Several stay apart in both layouts, (..., *rows, C) and (..., C, *rows), but
    #: are one to scales; blocks of (1, 128) are along the last, which has whole ones.
    row_axes: int = 1
    #: Leading axes that vmap put in front: each entry is cast as if it were alone.
    batch_dims: int = 0

    @property
    def layouts(self) -> tuple[str, ...]:
        """Those that are asked for."""
        return ("straight",) * self.straight + ("transposed",) * self.transposed

    @property
    def given(self) -> QuantizeConfig:
        """How ``quantize`` makes one layout with a scale that is known."""
        return QuantizeConfig(
            self.dtype, self.granularity, True, False, self.implementation, self.batch_dims
        )

    @property
    def row_factors(self) -> tuple[str, ...]:
        """The factors of the axes of rows."""
        return ("r",) if self.row_axes == 1 else tuple(f"r{i}" for i in range(self.row_axes))


def cast_transpose_rule(
    config: CastTransposeConfig, x: jax.Array, scale: jax.Array, key: jax.Array
) -> Rule:
    """Every axis can be divided, but for one whose blocks do not come out even."""
    *outer, last = config.row_factors
    leading = [f"d{i}" for i in range(x.ndim - 1 - config.row_axes)]
    sizes = dict(zip((*leading, *outer, last, "c"), x.shape, strict=True))
    units: dict[str, int] = {}
    own: list[str | None] = [last, "c"]
    block = block_shape(config.granularity)
    if isinstance(config.granularity, tuple):
        for axis in (0, 1):
            # (1, 128) has blocks along the last axis of each layout.
            if config.layouts == ("straight",) and axis == 0 and block[0] == 1:
                continue
            if config.layouts == ("transposed",) and axis == 1 and block[0] == 1:
                continue
            in_units(own, axis, block[1], sizes, units)
    rows, columns = own
    batch = tuple(leading[: config.batch_dims])
    ones: Dimensions = (*batch, *(None,) * (x.ndim - config.batch_dims))

    def scales(*dimensions: str | None) -> Dimensions:
        if config.granularity == "tensor":
            return ones
        return (*leading, *dimensions)

    def of_rows(dimension: str | None) -> str | None:
        return name_of(dimension) if block[0] > 1 else dimension

    def of_columns(*dimensions: str | None) -> Dimensions:
        return tuple(None if block[1] == 0 else name_of(dimension) for dimension in dimensions)

    data, turned = (*leading, *outer, rows, columns), (*leading, columns, *outer, rows)
    results: list[Dimensions] = []
    if config.straight:
        results += [data, scales(*outer, of_rows(rows), *of_columns(columns))]
    if config.transposed:
        results += [turned, scales(of_rows(columns), *of_columns(*outer, rows))]
    if config.amax:
        results.append(ones)
    return Rule(
        (data, ones if config.static else batch, (*batch, None)),
        tuple(results),
        sizes,
        units,
    )


def shared_factors(config: CastTransposeConfig, layout: str, ndim: int) -> tuple[str, ...]:
    """The factors of the rule along which more than a block of a layout shares a scale."""
    if config.granularity == "tensor":
        return (*(f"d{i}" for i in range(config.batch_dims, ndim - 2)), "r", "c")
    along = "c" if layout == "straight" else "r"
    return (along,) if config.granularity == "row" else ()


def rows_together(
    config: CastTransposeConfig, x: jax.Array, scale: jax.Array, axes: Axes
) -> tuple[jax.Array, jax.Array, Axes]:
    """``x`` of one device with one axis of rows, its scale, and the axes that divide them."""
    leading, rows = x.shape[: -1 - config.row_axes], x.shape[-1 - config.row_axes : -1]
    x = x.reshape(*leading, math.prod(rows), x.shape[-1])
    if config.static:
        scale = scale.reshape(scale.shape[: x.ndim])
    others = {name: of for name, of in axes.items() if name not in config.row_factors}
    return x, scale, {**others, "r": axes_of(config.row_factors, axes)}


def rows_apart(
    config: CastTransposeConfig, shape: tuple[int, ...], results: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """The results for ``x`` of that shape from those for one axis of rows."""
    outer = shape[-1 - config.row_axes : -2]
    places = (-2, -2) * config.straight + (-1, -1) * config.transposed + (-1,) * config.amax

    def apart(array: jax.Array, place: int) -> jax.Array:
        place += array.ndim
        size = array.shape[place]
        # One scale for all rows, or one for each, or for each block along the last axis.
        parts = (1,) * config.row_axes if size == 1 else (*outer, size // math.prod(outer))
        return array.reshape(*array.shape[:place], *parts, *array.shape[place + 1 :])

    return tuple(apart(array, place) for array, place in zip(results, places, strict=True))
