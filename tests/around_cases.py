"""Operands of fused_matmul, and what it makes of them in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import references as ref
from cases import operand, sample, scaled

import jax_fp8

PARTS = ("norm", "bias", "swiglu", "residual")
COMBINATIONS = [c for size in range(5) for c in itertools.combinations(PARTS, size)]
ALL = COMBINATIONS[-1]

EPS = 1e-5
#: Of bfloat16: half of the distance from 1 to the next number.
BF16_ROUNDING = 2.0**-8


def quantized(x, norm=None, eps=EPS, implementation=None, scale=None):
    """What is multiplied, for ``expected``: by ``"rowwise"``, or by ``"static"`` with a scale."""
    granularity = "row" if scale is None else "tensor"
    options = {"granularity": granularity, "scale": scale, "implementation": implementation}
    if norm is None:
        return jax_fp8.quantize(x, **options)
    return jax_fp8.rms_norm_quantize(x, norm, eps=eps, **options)


def expected(
    x,
    w,
    norm=None,
    bias=None,
    activation=None,
    residual=None,
    eps=EPS,
    first=False,
    multiplied=None,
    is_other=False,
    is_rounded=False,
):
    """The result in float64, and what it may be off by before it is rounded.

    ``first`` and ``multiplied`` say what is multiplied by w: the bfloat16 x times the norm's
    weight, or this in FP8, of which an element may be ``is_other``, next to it; else the norm in
    bfloat16. Sums may be added up fast, and ``is_rounded`` to bfloat16.
    """
    dtype = np.asarray(x).dtype
    wide, weights = np.asarray(x).astype(np.float64), ref.values(w)
    h, factor, ties = wide, 1.0, 0.0
    if multiplied is not None:
        h, ties = ref.values(multiplied), 2.0**-3 * is_other
    elif norm is not None:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            squares = np.square(wide).sum(-1, keepdims=True)
            squares = np.where(np.isfinite(np.float32(squares)), squares, np.nan)
            rms = 1 / np.sqrt(squares / wide.shape[-1] + eps)
        g = np.asarray(norm).astype(np.float64)
        if first:
            h, factor = (wide * g).astype(dtype).astype(np.float64), rms
        else:
            # An implementation may round the other way, where a value is near the middle.
            h = (wide * g * rms).astype(dtype).astype(np.float64)
            ties = 8 * BF16_ROUNDING
    with np.errstate(invalid="ignore"):
        y = h @ weights.T * factor
        magnitudes = np.abs(h) @ np.abs(weights).T * factor
        largest = (np.abs(h)[..., None, :] * np.abs(weights)).max(-1) if ties else 0.0
    sums = ref.sum_error(magnitudes, x.shape[-1])
    if multiplied is not None:  # By FP8 tensor cores, it may be.
        sums = np.maximum(sums, ref.random_error(magnitudes, x.shape[-1], fast=is_rounded))
    if is_rounded:
        sums = sums + BF16_ROUNDING * (np.abs(y) + sums)
    error = sums + ties * largest + 8 * 2.0**-24 * np.abs(y)
    if bias is not None:
        y = y + np.asarray(bias).astype(np.float64)
        error = error + 2.0**-24 * np.abs(y)
    if activation:
        (gate, up), (of_gate, of_up) = np.split(y, 2, -1), np.split(error, 2, -1)
        y, error = ref.gated(gate, gate, up, 4)
        silu = np.abs(gate / (1 + np.exp(-gate)))
        error = error + 1.1 * of_gate * (np.abs(up) + of_up) + silu * of_up
    if residual is not None:
        y = y + np.asarray(residual).astype(np.float64)
        error = error + 2.0**-24 * np.abs(y)
    return y, error


def operands(rng, m, n, k, parts, granularity="row", dtype=ref.BF16, w_dtype=ref.E4M3):
    """x, w and the keywords for ``parts`` of norm, bias, swiglu and residual."""
    x = jnp.asarray(sample(rng, "normal", (m, k)).astype(dtype))
    w = operand(rng, (n, k), w_dtype, granularity)
    w = scaled(w.data, w.scale / np.float32(np.sqrt(k)), granularity)
    columns = n // 2 if "swiglu" in parts else n
    made = {
        "norm": jnp.asarray(1 + 0.3 * rng.standard_normal(k), dtype),
        "bias": jnp.asarray(rng.standard_normal(n), jnp.float32),
        "residual": jnp.asarray(3 * rng.standard_normal((m, columns)), dtype),
    }
    around = {name: value for name, value in made.items() if name in parts}
    return x, w, around | ({"activation": "swiglu"} if "swiglu" in parts else {})
