"""health: what quantization does to the operands of a model's products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_fp8._src.health import HealthProbe, health_probe
from jax_fp8._src.layers import summarize_all
from jax_fp8._src.nnx_convert import path_name, products_of
from jax_fp8._src.nnx_kernel import FP8Kernel
from jax_fp8._src.nnx_layers import ProbeVariable, kernel_ndim, product_name, product_of


def measure(
    model: Any, loss_fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> dict[str, HealthProbe]:
    """``health`` as arrays, to be called under ``jax.jit`` or ``nnx.jit``, in a training step.

    Args:
      model: a model with FP8 products; it stays as it is, amaxes and random streams included.
      loss_fn: ``(model, *args, **kwargs)``: the loss, or a tuple that begins with it.
      *args: of ``loss_fn``.
      **kwargs: likewise.

    Returns:
      By the path of each layer, the gradient of its HealthProbe, which ``jax_fp8.summarize`` reads.

    Raises:
      ValueError: for a model without FP8 products.
    """
    probed = nnx.clone(model)
    stacks = {
        id(product): (path, _stack(layer))
        for path, layer in nnx.iter_graph(probed)
        if product_name(layer) and (product := product_of(layer)) is not None
    }
    products = []
    for path, product in products_of(probed):
        path, stack = stacks.get(id(product), (path, ()))
        zeros = jax.tree.map(lambda leaf, stack=stack: jnp.zeros(stack, leaf.dtype), health_probe())
        product.probe = nnx.data(ProbeVariable(zeros))
        products.append(path_name(path))
    if not products:
        raise ValueError("nnx.health: the model has no FP8 products; convert it first")
    parts: Any = nnx.split(probed, ProbeVariable, nnx.Param, ...)
    graphdef, probes, params, rest = parts

    # By the parameters too: where nothing has a gradient, there is none to measure.
    def loss(probes: Any, params: Any) -> jax.Array:
        found = loss_fn(nnx.merge(graphdef, probes, params, rest, copy=True), *args, **kwargs)
        return found[0] if isinstance(found, tuple) else found

    gradients, _ = jax.grad(loss, argnums=(0, 1))(probes, params)
    measured = nnx.merge(graphdef, gradients, params, rest)
    values = [product.probe.get_value() for _, product in products_of(measured)]
    return dict(zip(products, values, strict=True))


def _stack(layer: Any) -> tuple[int, ...]:
    """The leading axes of a stack of layers."""
    if isinstance(layer.kernel, FP8Kernel):
        ndim = 3 if layer.kernel.batch else 2
        return layer.kernel.data.shape[:-ndim]
    shape = layer.kernel.shape
    return shape[: len(shape) - kernel_ndim(layer)]


_measure = nnx.jit(measure, static_argnums=1)


def health(
    model: Any, loss_fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> dict[str, dict[str, dict[str, float]]]:
    """What quantization does to every operand of a model's FP8 products, forward and backward.

    It differentiates the loss by probes of the products, which change no number, under ``nnx.jit``;
    the program is kept for as long as ``loss_fn`` is the same function. Nothing is updated.

    Args:
      model: a model with FP8 products.
      loss_fn: ``(model, *args, **kwargs)``: the loss, or a tuple that begins with it.
      *args: of ``loss_fn``: arrays, and trees of them.
      **kwargs: likewise.

    Returns:
      By the path of each layer, with an index where layers are stacked, what ``jax_fp8.summarize``
      tells of its operands.

    Raises:
      ValueError: for a model without FP8 products.

    >>> import jax.numpy as jnp, jax_fp8.nnx
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(16, 4, rngs=nnx.Rngs(0)))
    >>> model = jax_fp8.nnx.convert(model)
    >>> stats = jax_fp8.nnx.health(model, lambda model, x: model(x).sum(), jnp.ones((2, 16)))
    >>> list(stats), stats["layers/0"]["gradient"]["amax"]
    (['layers/0'], 1.0)
    """
    return summarize_all(_measure(model, loss_fn, *args, **kwargs))
