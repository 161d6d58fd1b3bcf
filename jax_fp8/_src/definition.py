"""What a scaled product is: the static part of a call, and its meaning in plain JAX."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src.epilogue import activate
from jax_fp8._src.numerics import absolute_max, round_saturate
from jax_fp8._src.scaled_array import FP8_DTYPES, Granularity, expand_scale


@dataclasses.dataclass(frozen=True)
class CallConfig:
    """The static part of a product: everything but the arrays."""

    out_dtype: jnp.dtype
    x_granularity: Granularity
    w_granularity: Granularity
    has_bias: bool
    activation: str | None
    fast: bool
    implementation: str | None
    #: Leading axes of both operands that are not multiplied with each other.
    batch_dims: int = 0
    #: Trailing axes of both operands that are summed over, as one K; blocks are along the last.
    contracted: int = 1
    #: Pretends this compute capability (as 90 for 9.0) when not 0. For tests alone.
    capability: int = 0

    @property
    def has_blocks(self) -> bool:
        """Whether a scale changes along K."""
        return isinstance(self.x_granularity, tuple) or isinstance(self.w_granularity, tuple)

    @property
    def is_fp8(self) -> bool:
        """Whether the result is FP8, with an output scale and an amax."""
        return self.out_dtype in FP8_DTYPES


def reference(
    config: CallConfig,
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array,
    inverse_out_scale: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The definition in plain JAX, in float32: the oracle of the tests, and what the CPU runs.

    Without a bias, or an FP8 result, their operands are placeholders, and so is the amax.
    """
    return finish(config, _sums(config, x, x_scale, w, w_scale), bias, inverse_out_scale)


def _sums(
    config: CallConfig, x: jax.Array, x_scale: jax.Array, w: jax.Array, w_scale: jax.Array
) -> jax.Array:
    wide_x, wide_w = x.astype(jnp.float32), w.astype(jnp.float32)
    if config.has_blocks:
        wide_x = wide_x * expand_scale(x_scale, x.shape, config.x_granularity)
        wide_w = wide_w * expand_scale(w_scale, w.shape, config.w_granularity)
    y = lax.dot_general(
        wide_x, wide_w, (((2,), (2,)), ((0,), (0,))), precision=lax.Precision.HIGHEST
    )
    if not config.has_blocks:
        # After the product, the larger scale first: what leaves float32's range then is infinite,
        # and no value is lost below it.
        w_scale = w_scale.mT
        y = y * jnp.maximum(x_scale, w_scale) * jnp.minimum(x_scale, w_scale)
    return y


def finish(
    config: CallConfig, y: jax.Array, bias: jax.Array, inverse_out_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Bias, activation and cast of the scaled float32 sums (..., M, N), and their amax."""
    if config.has_bias:
        y = y + bias.astype(jnp.float32)
    y = activate(y, config.activation)
    if config.is_fp8:
        amax = absolute_max(y).reshape(inverse_out_scale.shape)
        return round_saturate(y, inverse_out_scale, config.out_dtype), amax
    return y.astype(config.out_dtype), inverse_out_scale
