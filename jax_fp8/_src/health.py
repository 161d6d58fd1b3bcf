"""Statistics of quantized operands, carried out of a product by the gradient of a probe."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8._src.scaled_array import ScaledArray, expand_scale, fp8_max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OperandStats:
    """What quantization did to an operand, as float32 sums, so that those of several calls add up.

    Attributes:
      calls: how many times the operand was quantized.
      amax: the sum over calls of the largest magnitude before quantization.
      size: elements.
      saturated: elements beyond the largest FP8 value by more than rounding to it explains.
      flushed: elements that became zero and had not been.
      signal: the sum of squares.
      noise: the sum of squares of what quantization changed.
    """

    calls: Any
    amax: Any
    size: Any
    saturated: Any
    flushed: Any
    signal: Any
    noise: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HealthProbe:
    """An argument of ``dot_general`` whose gradient is the statistics of the product's operands.

    Attributes:
      activation: of the forward product's activation.
      weight: of its weight.
      gradient: of the gradient that comes back, as the first product that takes it quantizes it.
      wgrad_activation: of the activation as the weight's gradient takes it.
      dgrad_weight: of the weight as the activation's gradient takes it.
      wgrad_gradient: of the gradient as the weight's gradient takes it.

    An operand that stays wide, or was quantized elsewhere, has zeros; so has one of the last three
    whose codes are those of the activation, weight or gradient, transposed.
    """

    activation: OperandStats
    weight: OperandStats
    gradient: OperandStats
    wgrad_activation: OperandStats
    dgrad_weight: OperandStats
    wgrad_gradient: OperandStats


#: Their names, in this order.
OPERANDS = tuple(field.name for field in dataclasses.fields(HealthProbe))


def no_stats() -> OperandStats:
    """All zeros."""
    return OperandStats(*(jnp.zeros((), jnp.float32) for _ in dataclasses.fields(OperandStats)))


def health_probe() -> HealthProbe:
    """A probe for ``dot_general``: zeros, which change no number.

    >>> import jax, jax.numpy as jnp, jax_fp8
    >>> x, w = jnp.ones((4, 32)), jnp.ones((32, 8))
    >>> def loss(w, probe):
    ...     dims = (((1,), (0,)), ((), ()))
    ...     return jax_fp8.dot_general(x, w, dims, probe=probe).sum()
    >>> stats = jax.grad(loss, argnums=1)(w, jax_fp8.health_probe())
    >>> jax_fp8.summarize(stats)["weight"]["amax"]
    1.0
    """
    return HealthProbe(*(no_stats() for _ in OPERANDS))


def _saturation(dtype: Any) -> float:
    """Half a step beyond the largest value: what is larger rounds to a value that there is not."""
    info = jnp.finfo(dtype)
    largest = fp8_max(dtype)
    return largest + 0.5 * float(info.eps) * 2.0 ** math.floor(math.log2(largest))


def stats_of(x: jax.Array, quantized: ScaledArray) -> OperandStats:
    """The statistics of ``x`` as it was quantized, in plain JAX."""
    x = x.astype(jnp.float32)
    scale = expand_scale(quantized.scale, quantized.shape, quantized.granularity)
    data = quantized.data.astype(jnp.float32)
    beyond = jnp.abs(x) > _saturation(quantized.dtype) * scale
    return OperandStats(
        calls=jnp.ones((), jnp.float32),
        amax=jnp.max(jnp.abs(x), initial=0.0),
        size=jnp.full((), x.size, jnp.float32),
        saturated=jnp.sum(beyond, dtype=jnp.float32),
        flushed=jnp.sum((x != 0) & (data == 0), dtype=jnp.float32),
        signal=jnp.sum(x * x),
        noise=jnp.sum((x - data * scale) ** 2),
    )


def summarize(stats: HealthProbe) -> dict[str, dict[str, float]]:
    """Plain numbers of the statistics that the gradient of a probe holds.

    Args:
      stats: a HealthProbe of scalars.

    Returns:
      By the names of the probe's operands, of those that were quantized: ``amax`` (the mean over
      calls), ``saturated`` and ``flushed`` (of 1), and ``snr_db``, ten times the
      decimal logarithm of signal over noise.
    """
    found = {}
    for name in OPERANDS:
        s = jax.tree.map(np.asarray, getattr(stats, name))
        if s.calls == 0:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            snr_db = float(10 * np.log10(np.float64(s.signal) / np.float64(s.noise)))
        found[name] = {
            "amax": float(s.amax / s.calls),
            "saturated": float(s.saturated / max(s.size, 1)),
            "flushed": float(s.flushed / max(s.size, 1)),
            "snr_db": snr_db,
        }
    return found
