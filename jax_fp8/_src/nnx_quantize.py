"""quantize: inference models with FP8 weights; prepare: weights quantized once a step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from flax import nnx
from jax import lax

from jax_fp8._src.layers import with_dynamic_scales, without_key
from jax_fp8._src.nnx_convert import Rules, Where, check_replaceable, layers_of, path_name, select
from jax_fp8._src.nnx_kernel import KernelPromotion, kernel_axes, quantize_kernel
from jax_fp8._src.nnx_layers import (
    DotGeneral,
    PreparedVariable,
    ScalingVariable,
    kernel_ndim,
    product_of,
    set_product,
)
from jax_fp8._src.prepared import PreparedWeight, prepare_weight
from jax_fp8._src.recipe import Recipe, get_recipe
from jax_fp8._src.scaling import ScalingState


def quantize(
    model: Any,
    where: Where | None = None,
    recipe: str | Recipe | Rules | None = None,
    *,
    implementation: str | None = None,
) -> Any:
    """Makes the inference model, in place: kernels become FP8 values, which nothing can train.

    Each kernel's Param gives way to an ``FP8Kernel``, one byte an element and the scales, so the
    memory of the wide ones is free as soon as no one else holds them; to keep the model as it is,
    quantize ``nnx.clone(model)``. Biases stay. What comes before a layer still has gradients.

    Args:
      model: an nnx Module, or a tree of them, converted or not.
      where: as in ``convert``.
      recipe: as in ``convert``; None is the recipe of a converted layer, ``"tensorwise"`` of
        others. The weight's scales are taken from its values. Static and delayed scales of
        activations are those of the converted layer; where there are none, ``calibrate`` sets
        static ones. A rule with None leaves layers as they are.
      implementation: of the products; None also takes that of a converted layer.

    Returns:
      ``model``.

    Raises:
      ValueError: as ``convert``, and for a recipe that leaves weights wide.

    >>> import jax, jax.numpy as jnp, jax_fp8.nnx
    >>> from flax import nnx
    >>> model = nnx.Linear(512, 256, use_bias=False, rngs=nnx.Rngs(0))
    >>> model = jax_fp8.nnx.quantize(model, recipe="rowwise")
    >>> sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))) / (512 * 256)
    1.0078125
    """
    op = "nnx.quantize"
    is_table = isinstance(recipe, list | tuple)
    plans = []
    for path, layer, own in select(op, model, where, recipe):
        if own is None and is_table:
            continue
        check_replaceable(op, path, layer)
        old = product_of(layer)
        own = own or (old.recipe if old else get_recipe(op, "tensorwise"))
        if own.weight is None:
            raise ValueError(f"{op}: the recipe of {path_name(path)} leaves weights wide: {own}")
        plans.append((layer, old, with_dynamic_scales(without_key(own), activation=False)))
    for layer, old, own in plans:
        stacked = layer.kernel[...].ndim - kernel_ndim(layer)
        set_product(layer, own, implementation or (old.implementation if old else None), None)
        product = product_of(layer)
        assert product is not None and own.weight is not None
        _keep_amax(product, old)
        kernel = quantize_kernel(layer.kernel[...], own.weight, *kernel_axes(layer), stacked)
        layer.kernel = nnx.data(kernel)
        layer.promote_dtype = nnx.static(KernelPromotion(layer.promote_dtype))
    return model


def _keep_amax(new: DotGeneral, old: DotGeneral | None) -> None:
    """Takes over the amaxes of activations that are scaled in the same way."""
    if old is None or new.activation_amax is None or old.activation_amax is None:
        return
    operand = new.recipe.activation
    has_history = operand is not None and operand.scaling == "delayed"
    if operand == old.recipe.activation and (
        not has_history or new.recipe.history == old.recipe.history
    ):
        new.activation_amax = nnx.data(ScalingVariable(old.activation_amax[...]))
    new.use_running_average = old.use_running_average


def prepare(model: Any) -> Any:
    """The model with its weights quantized once, for all the micro-batches of a step.

    Its parameters are those of ``model``, in the same Variables, and so are their gradients. The
    FP8 copies belong to the values that the parameters have now: prepare again after each update.

    Args:
      model: a converted model.

    Returns:
      A model that shares all Variables with ``model``.

    Raises:
      ValueError: for a model without FP8 products of wide kernels.

    >>> import jax.numpy as jnp, jax_fp8.nnx
    >>> from flax import nnx
    >>> model = jax_fp8.nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    >>> prepared = jax_fp8.nnx.prepare(model)  # Once, for both micro-batches.
    >>> grads = [nnx.grad(lambda m, x: m(x).sum())(prepared, i * jnp.ones((2, 16))) for i in (1, 2)]
    >>> [round(float(gradient["kernel"][0, 0]), 3) for gradient in grads]
    [2.0, 4.0]
    """
    shared = nnx.clone(model, variables=False)
    count = 0
    for _, layer in layers_of(shared):
        product = product_of(layer)
        if product is not None and product.recipe.weight is not None:
            product.prepared = nnx.data(PreparedVariable(_prepare(layer, product)))
            count += 1
    if not count:
        raise ValueError("nnx.prepare: the model has no FP8 products; convert it first")
    return shared


def _prepare(layer: Any, product: DotGeneral) -> PreparedWeight:
    """The FP8 copies of a kernel, without the kernel; of stacked layers, stacked."""
    contract, batch = kernel_axes(layer)
    kernel = layer.kernel[...]
    # In the dtype that the layer multiplies it in.
    _, kernel, _ = layer.promote_dtype((kernel, kernel, None), dtype=layer.dtype)

    def prepare_one(kernel: jax.Array, state: ScalingState | None) -> PreparedWeight:
        prepared = prepare_weight(
            kernel,
            product.recipe,
            contract=contract,
            batch=batch,
            state=state,
            implementation=product.implementation,
        )
        return dataclasses.replace(prepared, wide=None)

    state = product.state if product.recipe.has_state else None
    stack = kernel.shape[: kernel.ndim - kernel_ndim(layer)]
    if not stack:
        return prepare_one(kernel, state)

    def flat(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(math.prod(stack), *leaf.shape[len(stack) :])

    made = lax.map(lambda operands: prepare_one(*operands), jax.tree.map(flat, (kernel, state)))
    return jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[1:]), made)
