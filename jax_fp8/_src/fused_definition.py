"""What the fused producers are: the static part of a call, and their meaning in plain JAX."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src import quantize
from jax_fp8._src.quantize import QuantizeConfig
from jax_fp8._src.scaled_array import BLOCK, Granularity


@dataclasses.dataclass(frozen=True)
class FusedConfig:
    """The static part of a call: everything but the arrays."""

    producer: str
    eps: float
    dtype: jnp.dtype
    granularity: Granularity
    static: bool
    residual: bool
    implementation: str | None
    #: Leading axes that vmap put in front: each entry is quantized as if it were alone.
    batch_dims: int = 0
    #: Whether the weight and the bias have them too.
    batched_weight: bool = False

    @property
    def op(self) -> str:
        """The public name of the operation."""
        return f"{self.producer}_quantize"

    @property
    def norm(self) -> bool:
        """Whether there is a weight."""
        return self.producer.endswith("norm")

    @property
    def quantize(self) -> QuantizeConfig:
        """How the values of one entry are quantized."""
        return QuantizeConfig(self.dtype, self.granularity, self.static, False, self.implementation)

    def data_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the result for ``x`` of ``shape``."""
        return (*shape[:-1], shape[-1] // 2) if self.producer == "swiglu" else shape


def _row_sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, in two steps: so no more than 128 + K / 128 roundings add up."""
    count = math.ceil(x.shape[-1] / BLOCK)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, count * BLOCK - x.shape[-1])]
    blocks = jnp.pad(x, padding).reshape(*x.shape[:-1], count, BLOCK)
    return lax.optimization_barrier(blocks.sum(-1)).sum(-1, keepdims=True)


def reciprocal_rms(x: jax.Array, eps: float, across: tuple[str, ...] = ()) -> jax.Array:
    """``1 / sqrt(mean(x^2) + eps)``; NaN where the sum of squares is not finite.

    The last axis may be divided by the axes ``across`` of a mesh.
    """
    total, count = _row_sum(x * x), max(x.shape[-1], 1)
    if across:
        total, count = lax.psum((total, count), across)
    moment = total / count
    return jnp.where(jnp.isfinite(moment), lax.rsqrt(moment + jnp.float32(eps)), jnp.nan)


def _rms_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return x * weight * reciprocal_rms(x, eps)


def _layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    centered = x - _row_sum(x) / max(x.shape[-1], 1)
    return centered * weight * reciprocal_rms(centered, eps) + bias


def _swiglu(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    gate, up = jnp.split(x, 2, axis=-1)
    return gate / (1 + jnp.exp(-gate)) * up


def _gelu(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    # x * (1 + tanh(z)) / 2 = x / (1 + exp(-2z)), which loses no digits where tanh is near -1.
    two_z = x * jnp.float32(2 * math.sqrt(2 / math.pi)) * (1 + jnp.float32(0.044715) * (x * x))
    return x / (1 + jnp.exp(-two_z))


_PRODUCERS: dict[str, Callable[..., jax.Array]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "swiglu": _swiglu,
    "gelu": _gelu,
}


def _values(config: FusedConfig, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """What is quantized, in float32, and the sum with the residual where there is one."""
    x, residual, weight, bias, _ = operands
    wide = x.astype(jnp.float32)
    total: tuple[jax.Array, ...] = ()
    if config.residual:
        # The barrier keeps XLA, which may compute in more digits than asked for, from leaving the
        # rounding out.
        total = (lax.optimization_barrier((wide + residual.astype(jnp.float32)).astype(x.dtype)),)
        wide = total[0].astype(jnp.float32)
    weight, bias = weight.astype(jnp.float32), bias.astype(jnp.float32)
    return _PRODUCERS[config.producer](wide, weight, bias, config.eps), total


def reference(config: FusedConfig, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """The definition in plain JAX: the oracle of the tests, and what the CPU runs."""
    if config.batch_dims:
        inner = dataclasses.replace(config, batch_dims=config.batch_dims - 1)
        own = 0 if config.batched_weight else None
        axes = (0, 0 if config.residual else None, own, own, 0 if config.static else None)
        return jax.vmap(functools.partial(reference, inner), in_axes=axes)(*operands)
    values, total = _values(config, *operands)
    data, scale, _ = quantize.reference(config.quantize, values, operands[-1])
    return (data, scale, *total)
