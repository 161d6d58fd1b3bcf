"""jax.vmap of a scaled product: what it means is a loop, what runs is one larger product."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src.definition import CallConfig, finish
from jax_fp8._src.scaled_array import BLOCK, FP8_DTYPES, Granularity

#: Of ``"small_m"``, whatever the device.
_MOST_ROWS = 64


@dataclasses.dataclass(frozen=True)
class _Entries:
    """How many entries there are, V, and ways to bring an operand's (V, B, R, C) into three axes.

    An operand that is the same for all entries comes without the V.
    """

    size: int

    def spread(self, array: jax.Array, batched: bool) -> jax.Array:
        return array if batched else jnp.broadcast_to(array, (self.size, *array.shape))

    def to_batch(self, array: jax.Array, batched: bool) -> jax.Array:
        """(V * B, R, C)."""
        array = self.spread(array, batched)
        return array.reshape(self.size * array.shape[1], *array.shape[2:])

    def to_rows(self, array: jax.Array, batched: bool) -> jax.Array:
        """(B, V * R, C)."""
        array = jnp.moveaxis(self.spread(array, batched), 0, 1)
        batch, _, rows, columns = array.shape
        return array.reshape(batch, self.size * rows, columns)


def batch_product(
    operation: Callable[[CallConfig], Any],
    config: CallConfig,
    size: int,
    in_batched: Sequence[bool],
    operands: Sequence[jax.Array],
) -> tuple[tuple[jax.Array, jax.Array], tuple[bool, bool]]:
    """The rule of ``custom_vmap`` for ``operation(config)``: its results, and which are batched.

    ``operands`` are x (B, M, K), its scale, w (B, N, K), its scale, the bias and the reciprocal of
    the output scale, those that are ``in_batched`` with an axis of ``size`` in front.
    """
    bias, inverse_out_scale = operands[4:]
    if not (config.is_fp8 or in_batched[4]):
        y = _multiply(operation, config, size, in_batched, operands)
        return (y, inverse_out_scale), (True, in_batched[5])
    # The handlers know one bias, one output scale and one amax for all that they multiply.
    if config.implementation == "naive":  # Another order of the roundings would not be the loop's.
        return _loop(operation(config), in_batched, operands), (True, True)
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


def _loop(
    run: Callable[..., Any], in_batched: Sequence[bool], operands: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    own = {i: array for i, array in enumerate(operands) if in_batched[i]}

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
    """(V, B, M, N), with one bias for all entries."""
    x, x_scale, w, w_scale, *rest = operands
    of_x, of_x_scale, of_w, of_w_scale = in_batched[:4]
    if x.dtype not in FP8_DTYPES:  # Its one scale is 1, for every entry.
        x_scale, of_x_scale = jnp.ones((1, 1, 1), jnp.float32), False
    entries = _Entries(size)
    m, n = x.shape[-2], w.shape[-2]
    if of_w or of_w_scale:
        y, _ = operation(config)(
            entries.to_batch(x, of_x),
            _scale_of_batch(entries, x_scale, of_x_scale, config.x_granularity, x.shape[-3]),
            entries.to_batch(w, of_w),
            _scale_of_batch(entries, w_scale, of_w_scale, config.w_granularity, w.shape[-3]),
            *rest,
        )
        return y.reshape(size, w.shape[-3], m, n)
    _check_rows(config, size, m)
    scale, granularity = _scale_of_rows(
        entries, x_scale, of_x_scale, config.x_granularity, x.shape[-3:]
    )
    config = dataclasses.replace(config, x_granularity=granularity)
    y, _ = operation(config)(entries.to_rows(x, of_x), scale, w, w_scale, *rest)
    return jnp.moveaxis(y.reshape(w.shape[0], size, m, n), 1, 0)


def _scale_of_batch(
    entries: _Entries, scale: jax.Array, batched: bool, granularity: Granularity, batch: int
) -> jax.Array:
    if granularity == "tensor":
        if not batched and scale.shape[0] == 1:
            return scale
        scale = jnp.broadcast_to(scale, (*scale.shape[:-3], batch, 1, 1))
    return entries.to_batch(scale, batched)


def _scale_of_rows(
    entries: _Entries,
    scale: jax.Array,
    batched: bool,
    granularity: Granularity,
    shape: tuple[int, ...],
) -> tuple[jax.Array, Granularity]:
    """The scale of (B, V * M, K), and its granularity, which may have to be a finer one."""
    batch, rows, _ = shape
    if granularity == "tensor":
        if not batched:
            return scale, granularity
        granularity = "row"
        scale = jnp.broadcast_to(scale, (entries.size, batch, rows, 1))
    elif granularity == (BLOCK, BLOCK) and rows % BLOCK:
        # Blocks end with their entry, inside the rows of all: state each row's scales instead.
        granularity = (1, BLOCK)
        scale = jnp.repeat(scale, BLOCK, axis=-2)[..., :rows, :]
    return entries.to_rows(scale, batched), granularity


def _check_rows(config: CallConfig, size: int, rows: int) -> None:
    if config.implementation == "small_m" and size * rows > _MOST_ROWS:
        raise NotImplementedError(
            f"scaled_matmul: implementation 'small_m' cannot multiply {size} entries of jax.vmap"
            f" with M = {rows}: where they share w their rows are those of one product, and it"
            f" takes M <= {_MOST_ROWS}, not {size * rows}"
        )
