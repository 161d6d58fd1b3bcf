"""einsum: dot_general by subscripts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from opt_einsum.parser import parse_einsum_input

from jax_fp8._src.dot_general import check_operand, dot_general_of
from jax_fp8._src.scaled_array import ScaledArray


def einsum(spec: str, lhs: Any, rhs: Any, *, out_sharding: Any = None, **options: Any) -> Any:
    """``jax.numpy.einsum`` of two operands with FP8 products, forward and backward.

    Args:
      spec: subscripts as ``"...d,df->...f"``. An index that one operand alone has, and the result
        has not, is summed over before the product; one that an operand has twice is refused. An
        axis of one element is broadcast.
      lhs: the activation: a wide array, or a ScaledArray that lies as its product takes it: axes
        that stay in a batch in front, and as its last the one axis that is summed over.
      rhs: the weight: likewise, or a PreparedWeight.
      out_sharding: as in ``jax.numpy.einsum``.
      **options: those of ``dot_general``: ``precision``, ``preferred_element_type``, ``recipe``,
        ``state``, ``key``, ``probe``, ``implementation``.

    Returns:
      As ``dot_general``.

    Raises:
      ValueError: for subscripts that do not fit two operands, and for a ScaledArray that they would
        transpose or sum over alone. Otherwise as ``dot_general``.

    >>> import jax.numpy as jnp, jax_fp8
    >>> jax_fp8.einsum("bsd,df->bsf", jnp.ones((2, 3, 16)), jnp.ones((16, 4))).shape
    (2, 3, 4)
    """
    op = "einsum"
    lhs, rhs = check_operand(op, "lhs", lhs), check_operand(op, "rhs", rhs)
    multiply = functools.partial(dot_general_of, op)
    return einsum_by(multiply, spec, lhs, rhs, out_sharding=out_sharding, **options)


def einsum_by(
    multiply: Callable[..., Any],
    spec: str,
    lhs: Any,
    rhs: Any,
    *,
    out_sharding: Any = None,
    **options: Any,
) -> Any:
    """``einsum`` by any function of dot_general's arguments; operands need only have a shape."""
    inputs, result, _ = parse_einsum_input((spec, lhs.shape, rhs.shape), shapes=True)
    left, right = inputs.split(",")
    for name, labels in (("lhs", left), ("rhs", right), ("the result", result)):
        if len(set(labels)) < len(labels):
            raise ValueError(f"einsum: {spec!r} has an index of {name} twice")
    for name, labels, x in (("lhs", left, lhs), ("rhs", right, rhs)):
        if len(labels) != len(x.shape):
            raise ValueError(f"einsum: {spec!r} has {len(labels)} axes of {name}, got {x.shape}")
    sizes = dict(zip(left, lhs.shape, strict=True)), dict(zip(right, rhs.shape, strict=True))
    for label in sizes[0].keys() & sizes[1].keys():
        one, other = sizes[0][label], sizes[1][label]
        if one != other and 1 not in (one, other):
            raise ValueError(
                f"einsum: {spec!r} has an axis of {one} in lhs {lhs.shape} and of {other} in rhs"
                f" {rhs.shape}"
            )
    # One element goes with any number of them: without the axis, the operand has it for all.
    lhs, left = _sum_out(spec, "lhs", lhs, left, _unless_single(*sizes))
    rhs, right = _sum_out(spec, "rhs", rhs, right, _unless_single(*sizes[::-1]))
    lhs, left = _sum_out(spec, "lhs", lhs, left, right + result)
    rhs, right = _sum_out(spec, "rhs", rhs, right, left + result)
    # The batch axes of a ScaledArray stay where they are: those of the other operand move.
    first, second = (right, left) if isinstance(rhs, ScaledArray) else (left, right)
    shared = [label for label in first if label in second]
    batch = [label for label in shared if label in result]
    contract = [label for label in shared if label not in result]

    def places(labels: str, wanted: list[str]) -> tuple[int, ...]:
        return tuple(labels.index(label) for label in wanted)

    dimension_numbers = (
        (places(left, contract), places(right, contract)),
        (places(left, batch), places(right, batch)),
    )
    found = multiply(lhs, rhs, dimension_numbers, **options)
    y, *state = found if isinstance(found, tuple) else (found,)
    order = batch + [label for label in left + right if label not in shared]
    y = y.transpose([order.index(label) for label in result])
    if out_sharding is not None:
        y = jax.sharding.reshard(y, out_sharding)
    return (y, *state) if state else y


def _unless_single(own: dict[str, int], others: dict[str, int]) -> str:
    """The labels of an operand, but those of which it has one element and the other more."""
    return "".join(label for label, size in own.items() if size != 1 or others.get(label, 1) == 1)


def _sum_out(spec: str, name: str, x: Any, labels: str, others: str) -> tuple[Any, str]:
    """Sums over the axes that no one else has."""
    alone = tuple(i for i, label in enumerate(labels) if label not in others)
    if alone and not isinstance(x, jax.Array):
        raise ValueError(
            f"einsum: {spec!r} sums over or broadcasts an axis of {name}, which only wide values"
            f" allow, got a {type(x).__name__}"
        )
    kept = "".join(label for label in labels if label in others)
    return (x.sum(alone) if alone else x), kept
