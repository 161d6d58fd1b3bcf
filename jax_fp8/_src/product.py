"""The product of two operands as (batch, *rows, columns), with its gradients.

``y = x @ w.T`` with ``x`` (M, K) and ``w`` (N, K) has the gradients ``dx = dy @ w`` and
``dw = dy.T @ x``. FP8 products contract the last axis of both operands, so each of them takes its
operands in another layout: ``dx`` wants ``w.T``, ``dw`` wants ``dy.T`` and ``x.T``. The transposes
of ``x`` and ``w`` are made in the forward pass, from the read that quantizes them, and are all that
is kept of them.

``x``, and so ``y``, may have several axes of rows, each of which a mesh divides on its own. Then
``x.T`` is (K, *rows), and ``dw`` contracts all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jax_fp8._src.epilogue import NOT_DIFFERENTIABLE, is_primal
from jax_fp8._src.health import HealthProbe, no_stats, stats_of
from jax_fp8._src.layouts import quantize_layouts, transpose, turn
from jax_fp8._src.partition import on_alike, vary_alike
from jax_fp8._src.placement import Outcome, placed, placement_of_product, whole
from jax_fp8._src.quantize import dequantize
from jax_fp8._src.recipe import Backward, Operand, Recipe
from jax_fp8._src.scaled_array import BLOCK, ScaledArray
from jax_fp8._src.scaled_matmul import multiply
from jax_fp8._src.undifferentiable import only_once
from jax_fp8._src.wide_product import multiply_wide

#: The names of what the forward pass leaves, for policies of ``jax.checkpoint``.
RESIDUAL, PRODUCT = "jax_fp8_residual", "jax_fp8_product"


def checkpoint_policy(prim: Any, *args: Any, **params: Any) -> Any:
    """A policy for ``jax.checkpoint``: keeps FP8 products and what their gradients need.

    So nothing is quantized or multiplied twice; what lies between products is computed again. To
    keep less, build one with ``jax.checkpoint_policies.save_only_these_names`` from the names
    ``"jax_fp8_residual"`` (the transposed FP8 operands) and ``"jax_fp8_product"``.
    """
    return _keep_both(prim, *args, **params)


_keep_both = jax.checkpoint_policies.save_only_these_names(RESIDUAL, PRODUCT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """An operand of ``product``.

    Attributes:
      wide: the values, which have a gradient; None where only FP8 values are given.
      forward: the FP8 copy ``(B, *free, contracted)``, where it was made ahead, else None.
      backward: the copy ``(B, contracted, *free)`` for a gradient, likewise.
      amax: of ``wide``, a float32 scalar, where copies were made with a scale that was given.
    """

    wide: Any = None
    forward: Any = None
    backward: Any = None
    amax: Any = None


@dataclasses.dataclass(frozen=True)
class ProductConfig:
    """The static part of a product: everything but the arrays."""

    op: str
    recipe: Recipe
    #: Whether the contracted axis is the last of the wide operand, or the one after B. It is the
    #: last of an x with several axes of rows; w has one.
    contract_last: tuple[bool, bool]
    #: The dtypes of the wide operands, which are those of their gradients.
    dtypes: tuple[Any, Any]
    out_dtype: Any
    precision: str
    implementation: str | None
    #: How the wide operands lie on an explicit mesh, as their gradients must; None: as they come.
    placements: tuple[Any, Any] | None = None
    #: How the result is to lie on an explicit mesh; None: as the operands say.
    outcome: Outcome | None = None


@functools.cache
def product(config: ProductConfig) -> Any:
    """The function ``(x, w, scales, key, probe) -> (y, amaxes)`` of two Sides.

    The scales and the amaxes are those of operands whose scale is not dynamic, else None; ``key``
    is a raw key or None, and ``probe`` a HealthProbe or None.
    """
    differentiable = jax.custom_vjp(functools.partial(_primal, config))
    differentiable.defvjp(
        functools.partial(_forward, config),
        functools.partial(_backward, config),
        symbolic_zeros=True,
    )
    return on_alike(jax.jit(differentiable, inline=True))


# --- Forward --------------------------------------------------------------------------------------


def _quantize_side(
    config: ProductConfig,
    index: int,
    side: Side,
    forward: Operand | None,
    backward: Operand | None,
    scale: Any,
) -> Side:
    """Makes those copies that are not there; of operands that are None, none."""
    if side.forward is not None:
        return side
    last = config.contract_last[index]
    pair = (forward, backward) if last else (backward, forward)
    *copies, amax = quantize_layouts(
        side.wide, *pair, scale=scale, implementation=config.implementation
    )
    if not last:
        copies.reverse()
    return Side(side.wide, copies[0], copies[1], amax)


def _run(
    config: ProductConfig, needed: tuple[bool, bool], x: Side, w: Side, scales: Any
) -> tuple[jax.Array, Side, Side]:
    """The product, and both sides with their copies: those for gradients where ``needed``."""
    recipe = config.recipe
    for_dw = recipe.wgrad[1] if needed[1] and recipe.wgrad else None
    for_dx = recipe.dgrad[1] if needed[0] and recipe.dgrad else None
    x = _quantize_side(config, 0, x, recipe.activation, for_dw, scales[0])
    w = _quantize_side(config, 1, w, recipe.weight, for_dx, scales[1])
    if w.forward is None:
        precision = lax.Precision.HIGHEST if config.precision == "highest" else None
        contract = tuple(
            (side.wide.ndim - 1 if last else 1,)
            for side, last in zip((x, w), config.contract_last, strict=True)
        )
        y = multiply_wide(x.wide, w.wide, contract, config.out_dtype, precision)
    else:
        left = x.forward if x.forward is not None else _contract_last(config, x.wide)
        left = _whole(config, "of_x", left, 1)
        y = _multiply(config, left, w.forward, config.out_dtype, config.precision)
    where = _placement(config, x, w) if config.outcome is None else config.outcome.where
    return placed(y, where), x, w


def _placement(config: ProductConfig, x: Side, w: Side) -> Any:
    """Of the result, by the operands alone: whatever of them is kept for gradients."""
    values, contract = [], []
    for index, side in enumerate((x, w)):
        last = side.wide is None or config.contract_last[index]
        values.append(side.forward.data if side.wide is None else side.wide)
        contract.append((values[-1].ndim - 1 if last else 1,))
    return placement_of_product(values[0], values[1], contract, ((0,), (0,)))


def _whole(config: ProductConfig, which: str, x: Any, first: int) -> Any:
    """An operand of a product, brought together where the outcome of the first takes that."""
    return x if config.outcome is None else whole(x, getattr(config.outcome, which), first)


def _contract_last(config: ProductConfig, x: jax.Array) -> jax.Array:
    return x if config.contract_last[0] else x.mT


def _primal(
    config: ProductConfig, x: Side, w: Side, scales: Any, key: Any, probe: Any
) -> tuple[jax.Array, Any]:
    y, x, w = _run(config, (False, False), x, w, scales)
    return y, (x.amax, w.amax)


def _forward(config: ProductConfig, *primals: Any) -> Any:
    values = jax.tree.map(lambda p: p.value, primals, is_leaf=is_primal)
    perturbed = jax.tree.map(lambda p: p.perturbed, primals, is_leaf=is_primal)
    x, w, scales, key, _ = values
    for side in perturbed[:2]:
        if any(jax.tree.leaves((side.forward, side.backward))):
            raise TypeError(f"{config.op}: {NOT_DIFFERENTIABLE}")
    needed = bool(perturbed[0].wide), bool(perturbed[1].wide)
    run = only_once(config.op, functools.partial(_run, config, needed))
    y, x, w = run(x, w, scales)
    measured = None if values[4] is None else _measure(config, x, w)
    kept = (
        _kept(config.recipe.wgrad, x, needed[1]),
        _kept(config.recipe.dgrad, w, needed[0]),
    )
    kept = checkpoint_name(kept, RESIDUAL)
    return (checkpoint_name(y, PRODUCT), (x.amax, w.amax)), (*kept, key, measured)


def _kept(pair: Backward | None, side: Side, needed: bool) -> Side:
    """What a gradient takes of the other operand, or scalars in its place.

    What is needed may differ from one use of a traced function to the next, but JAX keeps one tree
    of residuals for all: the leaves may be others, their number may not.
    """
    if side.wide is None:
        kept = Side(forward=side.forward)  # Its transpose is made when it is needed.
    elif pair is None:
        kept = Side(wide=side.wide)
    elif needed:
        kept = Side(backward=side.backward)
    else:
        scalar = jnp.zeros((), jnp.float32)
        kept = Side(backward=ScaledArray(scalar, scalar, pair[1].granularity))
    if needed:
        return kept
    return jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), kept)


def _is_kept(side: Side) -> bool:
    return all(leaf.ndim > 0 for leaf in jax.tree.leaves(side))


def _measure(config: ProductConfig, x: Side, w: Side) -> Any:
    """Of both operands, as they lie in the forward product; and of their copies for gradients."""

    def stats(index: int, side: Side) -> Any:
        if side.forward is None or side.wide is None:
            return no_stats()
        wide = side.wide if config.contract_last[index] else side.wide.mT
        return stats_of(wide, side.forward)

    def stats_of_copy(index: int, side: Side, forward: Any, pair: Backward | None) -> Any:
        if side.backward is None or side.wide is None or pair is None or _alike(forward, pair[1]):
            return no_stats()
        wide = turn(side.wide) if config.contract_last[index] else side.wide
        return stats_of(wide, side.backward)

    recipe = config.recipe
    return (
        stats(0, x),
        stats(1, w),
        stats_of_copy(0, x, recipe.activation, recipe.wgrad),
        stats_of_copy(1, w, recipe.weight, recipe.dgrad),
    )


def _alike(straight: Operand | None, transposed: Operand | None) -> bool:
    """Whether both layouts have the same codes."""
    return straight == transposed and (
        straight is None or straight.granularity in ("tensor", (BLOCK, BLOCK))
    )


# --- Backward -------------------------------------------------------------------------------------


def _backward(config: ProductConfig, residuals: Any, cotangents: Any) -> Any:
    dy, _ = cotangents
    if isinstance(dy, SymbolicZero):
        return None, None, None, None, None
    dx, dw, probe = _gradients(config)(residuals, dy)
    return Side(dx), Side(dw), None, None, probe


@functools.cache
def _gradients(config: ProductConfig) -> Any:
    """``(residuals, dy) -> (dx, dw, probe)``."""
    return only_once(config.op, functools.partial(_compute_gradients, config))


def _compute_gradients(config: ProductConfig, residuals: Any, dy: jax.Array) -> Any:
    kept_x, kept_w = (side if side and _is_kept(side) else None for side in residuals[:2])
    key, measured = residuals[2:]
    recipe = config.recipe
    pairs = recipe.dgrad, recipe.wgrad
    other_w, factor_w = _other(kept_w, pairs[0] is None)
    other_x, factor_x = _other(kept_x, pairs[1] is None)
    # A gradient is quantized for an operand in FP8; both layouts at once where they are of the
    # same values.
    of_dgrad = pairs[0][0] if pairs[0] and isinstance(other_w, ScaledArray) else None
    of_wgrad = pairs[1][0] if pairs[1] and isinstance(other_x, ScaledArray) else None
    quantize = functools.partial(quantize_layouts, key=key, implementation=config.implementation)
    if factor_w is None and factor_x is None:
        straight, transposed, _ = quantize(dy, of_dgrad, of_wgrad)
        dy_x = dy_w = dy
    else:
        if factor_w is not None:  # It is (B, N, 1), and N is the last axis of the gradient.
            factor_w = jnp.expand_dims(factor_w.mT, tuple(range(2, dy.ndim - 1)))
        dy_x, dy_w = _scaled(dy, factor_w), _scaled(dy, factor_x)
        straight, _, _ = quantize(dy_x, of_dgrad, None)
        _, transposed, _ = quantize(dy_w, None, of_wgrad)
    dx = dw = None
    if kept_w is not None:
        dx = _input_gradient(config, dy_x if straight is None else straight, other_w)
        dx = dx if config.placements is None else placed(dx, config.placements[0])
    if kept_x is not None:
        dw = _weight_gradient(config, dy_w if transposed is None else transposed, other_x)
        dw = dw if config.placements is None else placed(dw, config.placements[1])
    probe = None
    if measured is not None:
        gradient = other = no_stats()
        if straight is not None:
            gradient = stats_of(dy_x, straight)
        if transposed is not None and not (straight is not None and _alike(of_dgrad, of_wgrad)):
            other = stats_of(turn(dy_w), transposed)
        if straight is None:
            gradient, other = other, no_stats()
        activation, weight, wgrad_activation, dgrad_weight = measured
        probe = HealthProbe(activation, weight, gradient, wgrad_activation, dgrad_weight, other)
        leaves, tree = jax.tree.flatten(probe)  # Zeros too are to vary as the probe does.
        probe = jax.tree.unflatten(tree, vary_alike((*leaves, dy))[:-1])
    return dx, dw, probe


def input_gradient(
    op: str, recipe: Recipe, dy: jax.Array, w: ScaledArray, dtype: Any, implementation: str | None
) -> jax.Array:
    """``dx`` of ``dtype`` for ``dy`` (B, *M, N) and FP8 weights (B, N, K) of whatever origin."""
    config = ProductConfig(
        op, recipe, (True, True), (jnp.dtype(dtype), None), dy.dtype, "highest", implementation
    )
    return _gradients(config)((None, Side(forward=w), None, None), dy)[0]


def _other(kept: Side | None, wide: bool) -> tuple[Any, jax.Array | None]:
    """The operand that a gradient is multiplied by, (B, contracted, *free) in FP8 or as it was."""
    if kept is None:
        return None, None
    if kept.forward is not None:
        return (turn(dequantize(kept.forward)), None) if wide else transpose(kept.forward)
    return (kept.wide if kept.backward is None else kept.backward), None


def _scaled(dy: jax.Array, factor: jax.Array | None) -> jax.Array:
    """``dy`` times a factor, in float32 where 16 bits might not hold it."""
    if factor is None:
        return dy
    product = dy.astype(jnp.float32) * factor
    return product.astype(dy.dtype) if dy.dtype == jnp.bfloat16 else product


def _input_gradient(config: ProductConfig, dy: Any, w: Any) -> jax.Array:
    """``dx``, with its axes in the order of ``x``."""
    last, dtype = config.contract_last[0], config.dtypes[0]
    if not isinstance(w, ScaledArray):
        # A ScaledArray with blocks came back as (K, N); a wide operand lies as it was given.
        w_free_last = config.dtypes[1] is None or not config.contract_last[1]
        contract = (dy.ndim - 1,), (2 if w_free_last else 1,)
        dx = multiply_wide(dy, w, contract, dtype, lax.Precision.HIGHEST)
        return dx if last else dx.mT
    if isinstance(dy, ScaledArray):
        dy = _whole(config, "of_gradient", dy, 1)
        a, b = (dy, w) if last else (w, dy)
        return _multiply(config, a, b, dtype, "highest")
    if dy.dtype == jnp.float32:  # FP8 weights are multiplied by 16-bit values.
        dy = dy.astype(dtype)
    dx = _multiply(config, dy, w, dtype, "highest")
    return dx if last else dx.mT


def _weight_gradient(config: ProductConfig, dy: Any, x: Any) -> jax.Array:
    """``dw``, with its axes in the order of ``w``; ``dy`` in FP8 is transposed, (N, *M)."""
    last, dtype = config.contract_last[1], config.dtypes[1]
    if isinstance(x, ScaledArray):
        x, dy = _whole(config, "of_x", x, 2), _whole(config, "of_gradient", dy, 2)
        a, b = (dy, x) if last else (x, dy)
        return _multiply(config, a, b, dtype, "highest", contracted=x.ndim - 2)
    x_free_last = config.dtypes[0] is None or not config.contract_last[0]
    in_front = tuple(range(1, dy.ndim - 1))
    contract = in_front, tuple(range(2, x.ndim)) if x_free_last else in_front
    dw = multiply_wide(dy, x, contract, dtype, lax.Precision.HIGHEST)
    return dw if last else dw.mT


# --- Products -------------------------------------------------------------------------------------


def _multiply(
    config: ProductConfig,
    a: Any,
    b: ScaledArray,
    dtype: Any,
    precision: str,
    contracted: int = 1,
) -> Any:
    """(B, *R, *C) by (B, S, *C) to (B, *R, S), where ``a`` may be wide and ``b`` is FP8."""
    if not isinstance(a, ScaledArray):
        a = ScaledArray(a, jnp.ones((1,) * a.ndim, jnp.float32))
    single = a.data.shape[0] == 1
    if single:  # Not a batch: products of one have more ways to run.
        a, b = jax.tree.map(lambda leaf: leaf[0], (a, b))
    y = multiply(
        config.op,
        a,
        b,
        batch_dims=0 if single else 1,
        contracted=contracted,
        bias=None,
        activation=None,
        preferred_element_type=dtype,
        precision=precision,
        output_scale=None,
        return_amax=False,
        implementation=config.implementation,
    )
    return y[None] if single else y
