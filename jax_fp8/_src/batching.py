"""jax.vmap of a scaled product: what it means is a loop, what runs is one larger product."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src.definition import CallConfig, finish
from jax_fp8._src.placement import whole_along
from jax_fp8._src.scaled_array import FP8_DTYPES, Granularity

#: Of ``"small_m"``, whatever the device.
_MOST_ROWS = 64


def batch_product(
    operation: Callable[[CallConfig], Any],
    config: CallConfig,
    size: int,
    in_batched: Sequence[bool],
    operands: Sequence[jax.Array],
) -> tuple[tuple[jax.Array, jax.Array], tuple[bool, bool]]:
    """The rule of ``custom_vmap`` for ``operation(config)``: its results, and which are batched.

    ``operands`` are x (*batch, ..., M, K), its scale, w (*batch, N, K), its scale, the bias and the
    reciprocal of the output scale, those that are ``in_batched`` with an axis of ``size`` in front.
    """
    bias, inverse_out_scale = operands[4:]
    if not (config.is_fp8 or in_batched[4]):
        y = _multiply(operation, config, size, in_batched, operands)
        return (y, inverse_out_scale), (True, in_batched[5])
    # The handlers know one bias, one output scale and one amax for all that they multiply.
    if config.implementation == "naive":  # Another order of the roundings would not be the loop's.
        return loop(operation(config), in_batched, operands), (True, True)
    placeholders = jnp.zeros((1,), jnp.float32), jnp.ones((1,), jnp.float32)
    sums = dataclasses.replace(
        config, out_dtype=jnp.dtype(jnp.float32), has_bias=False, activation=None
    )
    product_batched = any(in_batched[:4])
    if product_batched:
        y = _multiply(operation, sums, size, in_batched, (*operands[:4], *placeholders))
    else:
        y, _ = operation(sums)(*operands[:4], *placeholders)
    axes = tuple(0 if b else None for b in (product_batched, *in_batched[4:]))
    finished = jax.vmap(functools.partial(finish, config), axes, axis_size=size)
    return finished(y, bias, inverse_out_scale), (True, True)


def with_axis(array: jax.Array, is_batched: bool, size: int) -> jax.Array:
    """``array`` with an axis of ``size`` in front, where it is not there yet."""
    return array if is_batched else jnp.broadcast_to(array, (size, *array.shape))


def loop(run: Callable[..., Any], in_batched: Sequence[bool], operands: Sequence[jax.Array]) -> Any:
    """Runs one entry after the other."""
    own = {i: whole_along(array, 0) for i, array in enumerate(operands) if in_batched[i]}

    def one(entry: dict[int, jax.Array]) -> Any:
        return run(*(entry.get(i, array) for i, array in enumerate(operands)))

    return lax.map(one, own)


def _multiply(
    operation: Callable[[CallConfig], Any],
    config: CallConfig,
    size: int,
    in_batched: Sequence[bool],
    operands: Sequence[jax.Array],
) -> jax.Array:
    """(V, *batch, ..., M, N), with one bias for all entries."""
    x, x_scale, w, w_scale, *rest = operands
    of_x, of_x_scale, of_w, of_w_scale = in_batched[:4]
    if x.dtype not in FP8_DTYPES:  # Its one scale is 1, for every entry.
        x_scale, of_x_scale = jnp.ones((1,) * (x.ndim - of_x), jnp.float32), False

    front = functools.partial(with_axis, size=size)

    def front_scale(scale: jax.Array, batched: bool, granularity: Granularity) -> jax.Array:
        # One scale for all entries stays one.
        return scale[None] if granularity == "tensor" and not batched else front(scale, batched)

    x, x_scale = front(x, of_x), front_scale(x_scale, of_x_scale, config.x_granularity)
    if of_w or of_w_scale:
        config = dataclasses.replace(config, batch_dims=config.batch_dims + 1)
        w, w_scale = front(w, of_w), front_scale(w_scale, of_w_scale, config.w_granularity)
        return operation(config)(x, x_scale, w, w_scale, *rest)[0]
    # All entries share w: theirs is one more axis of rows.
    _check_rows(config, size, math.prod(x.shape[1 + config.batch_dims : -config.contracted]))
    place = config.batch_dims
    x, x_scale = jnp.moveaxis(x, 0, place), jnp.moveaxis(x_scale, 0, place)
    return jnp.moveaxis(operation(config)(x, x_scale, w, w_scale, *rest)[0], place, 0)


def _check_rows(config: CallConfig, size: int, rows: int) -> None:
    if config.implementation == "small_m" and size * rows > _MOST_ROWS:
        raise NotImplementedError(
            f"scaled_matmul: implementation 'small_m' cannot multiply {size} entries of jax.vmap"
            f" with M = {rows}: where they share w their rows are those of one product, and it"
            f" takes M <= {_MOST_ROWS}, not {size * rows}"
        )
