"""Along which axes a fused producer can be divided over a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_fp8._src.fused_definition import FusedConfig
from jax_fp8._src.partition import Rule, name_of
from jax_fp8._src.quantize import quantize_rule


def fused_rule(config: FusedConfig, *operands: jax.Array) -> Rule:
    """As quantize's, but that the last axis of all but GELU goes through as a whole."""
    x = operands[0]
    given = config.data_shape(x.shape)
    shape = jax.ShapeDtypeStruct(given, x.dtype)
    quantize = dataclasses.replace(config.quantize, batch_dims=config.batch_dims)
    rule = quantize_rule(quantize, shape, jnp.zeros(()))
    if config.producer != "gelu":
        rule = rule.without(name_of(rule.operands[0][-1]))
    of_x = rule.operands[0]
    # A placeholder of the bias gets the batch axes of the weight.
    entries = of_x[: config.batch_dims] if config.batched_weight else ()
    of_weight = (*entries, None)
    data, scale, _ = rule.results
    return dataclasses.replace(
        rule,
        operands=(
            of_x,
            of_x if config.residual else (),
            of_weight if config.norm else (),
            of_weight if config.producer == "layer_norm" else entries,
            scale if config.static else (),
        ),
        results=(data, scale, of_x) if config.residual else (data, scale),
    )
