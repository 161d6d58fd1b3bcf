"""How a fused producer runs: the handler's call, and the transformations around it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src import ffi, plans
from jax_fp8._src.fused_batching import batch_fused
from jax_fp8._src.fused_definition import FusedConfig, reference
from jax_fp8._src.fused_rule import fused_rule
from jax_fp8._src.numerics import absolute_max, as_rounded
from jax_fp8._src.partition import Axes, all_max, axes_of, partition
from jax_fp8._src.quantize import shared_factors
from jax_fp8._src.scaled_array import block_shape, scale_shape
from jax_fp8._src.undifferentiable import undifferentiable


def _kernel(config: FusedConfig, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """The handler, which knows (batch, rows, columns) only."""
    x, residual, weight, bias, scale = operands
    batch, own = x.shape[: config.batch_dims], x.shape[config.batch_dims :]
    shape = config.data_shape(x.shape)
    x3 = (math.prod(batch), math.prod(own[:-1]), own[-1])
    shape3 = config.data_shape(x3)
    if config.granularity == "tensor":
        scale3: tuple[int, ...] = (x3[0], 1, 1)
    else:
        scale3 = scale_shape(shape3, config.granularity)
    weights = (x3[0] if config.batched_weight else 1, own[-1])
    data, new_scale, total = ffi.fused_quantize(
        (
            x.reshape(x3),
            residual.reshape(x3) if config.residual else None,
            weight.reshape(weights) if config.norm else None,
            bias.reshape(weights) if config.producer == "layer_norm" else None,
            scale.reshape(scale3) if config.static else None,
        ),
        producer=config.producer,
        eps=config.eps,
        dtype=config.dtype,
        block=block_shape(config.granularity),
        shape=shape3,
        scale_shape=scale3,
    )
    out_scale = (*batch, *scale_shape(shape[config.batch_dims :], config.granularity))
    results = (data.reshape(shape), new_scale.reshape(out_scale))
    return (*results, total.reshape(x.shape)) if config.residual else results


def _xla(config: FusedConfig, *operands: jax.Array) -> tuple[jax.Array, ...]:
    x = operands[0]
    plans.record_traced(
        config.op,
        platform="any" if config.implementation == "xla" else "cpu",
        shape=x.shape,
        dtypes=(x.dtype.name, config.dtype.name),
        granularity=config.granularity,
    )
    return as_rounded(reference(config, *operands), config.implementation)


def run(config: FusedConfig, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """Data, scale and, with a residual, the sum, on one device."""
    xla, kernel = functools.partial(_xla, config), functools.partial(_kernel, config)
    if config.implementation == "xla":
        return xla(*operands)
    if config.implementation == "kernel":
        return kernel(*operands)
    return lax.platform_dependent(*operands, cpu=xla, cuda=kernel)


def _local(config: FusedConfig, *operands: jax.Array, axes: Axes) -> Any:
    """Runs on the operands of one device, whatever mesh they came from."""
    across = axes_of(shared_factors(config, operands[0].ndim), axes)
    if not across or config.static:
        return run(config, *operands)
    # The scale is that of the values of whatever runs, as on one device: another program's would
    # be off by an ulp here and there. So it is made of the scales that the rows get by themselves.
    x, residual, *rest, _ = operands
    data, scale, *total = run(dataclasses.replace(config, granularity="row"), *operands)
    static = dataclasses.replace(config, static=True, residual=False)
    given = _largest_scale(config, data, scale, across)
    return (*run(static, *total or (x,), residual, *rest, given), *total)


def _largest_scale(
    config: FusedConfig, data: jax.Array, scale: jax.Array, across: tuple[str, ...]
) -> jax.Array:
    """The scale of all, from each row's own: the largest, but that an amax of 0 has the scale 1."""
    is_zero = (scale == 1) & (data.astype(jnp.float32) == 0).all(axis=-1, keepdims=True)
    own = tuple(range(config.batch_dims, scale.ndim)) if config.granularity == "tensor" else -1
    scale = absolute_max(jnp.where(is_zero, 0.0, scale), axis=own, keepdims=True)
    scale = all_max(scale, across)
    return jnp.where(scale == 0, 1.0, scale)


@functools.cache
def operation(config: FusedConfig) -> Any:
    """custom_vjp -> custom_vmap -> partition -> platform, for one configuration."""
    batched = jax.custom_batching.custom_vmap(
        partition(functools.partial(_local, config), functools.partial(fused_rule, config))
    )

    @batched.def_vmap
    def _vmap(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> Any:
        deeper, operands = batch_fused(config, axis_size, in_batched, operands)
        out = operation(deeper)(*operands)
        return out, (True,) * len(out)

    return undifferentiable(
        batched,
        f"{config.op}: it cannot be differentiated in this version; put"
        " jax.lax.stop_gradient around its operands",
    )
