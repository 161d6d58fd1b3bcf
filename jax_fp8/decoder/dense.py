"""Dense: a product with weights as checkpoints keep them, in FP8 or wide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_fp8
from jax_fp8.checkpoint import Activation, concatenate

#: Up to so many rows the weights are decoded and the activations stay wide: reading the weights is
#: all that counts there, and it saves the time and the error of quantizing activations. Measured on
#: Hopper, whose kernel for few rows takes no scales of blocks.
WEIGHT_ONLY_ROWS, WEIGHT_ONLY_ROWS_OF_BLOCKS = 8, 1
#: What the kernels of ``jax_fp8.fused_matmul`` take: rows, and bytes of them where there is a norm
#: of wide activations.
FUSED_ROWS, FUSED_NORM_BYTES = 8, 96 << 10
#: Where that is faster than cublasLt's products of quantized activations: rows and K of few, and
#: from how many rows on.
FUSED_ROWS_QUANTIZED, FUSED_K_QUANTIZED, FUSED_MANY_ROWS = 16, 18432, 4096


class Frozen(nnx.Variable):
    """What an inference model reads and nothing trains."""


class Dense(nnx.Module):
    """``x @ weight.T + bias`` with a weight of ``(out, in)``.

    Attributes:
      weight: a ScaledArray, or a wide array.
      bias: ``(out,)``, or None.
      activation: how the input of an FP8 weight is quantized.
      input_scale: a static scale, float32 ``()``, or None.
      names: the modules of the checkpoint of which this is made.
      weight_only_rows: up to so many rows, an input in 16 bits is left wide; None: as many as that
        is faster for on Hopper.
      amax: where a calibration collects the input's amax, or None.
    """

    def __init__(
        self,
        weight: Any,
        bias: Any = None,
        *,
        activation: Activation | None = None,
        input_scale: Any = None,
        names: Sequence[str] = (),
        weight_only_rows: int | None = None,
    ) -> None:
        self.granularity: Any = getattr(weight, "granularity", None)
        self.weight = Frozen(weight.data if self.granularity else weight)
        self.scale: Any = nnx.data(Frozen(weight.scale) if self.granularity else None)
        self.bias: Any = nnx.data(None if bias is None else Frozen(bias))
        self.input_scale: Any = nnx.data(None if input_scale is None else Frozen(input_scale))
        self.activation = activation or Activation(None)
        self.names = tuple(names)
        if weight_only_rows is None:
            is_block = isinstance(self.granularity, tuple)
            weight_only_rows = WEIGHT_ONLY_ROWS_OF_BLOCKS if is_block else WEIGHT_ONLY_ROWS
        self.weight_only_rows = weight_only_rows
        self.amax: Any = nnx.data(None)

    @property
    def values(self) -> Any:
        """The weight: a ScaledArray, or a wide array."""
        if self.scale is None:
            return self.weight[...]
        return jax_fp8.ScaledArray(self.weight[...], self.scale[...], self.granularity)

    def quantization(self, x: jax.Array) -> dict[str, Any] | None:
        """How what makes the input may quantize it; None leaves it wide, as ``x`` is.

        Returns:
          Options of ``jax_fp8.quantize`` and of the fused producers.
        """
        operand, bound = self.activation.operand, self.activation.bound
        if self.scale is None or operand is None or self._is_few(x):
            return None
        if bound is not None or (operand.power_of_two and self.input_scale is None):
            return None  # Which only this product's own quantization can do.
        scale = None if self.input_scale is None else self.input_scale[...]
        return {"dtype": operand.dtype, "granularity": operand.granularity, "scale": scale}

    def __call__(self, x: Any, dtype: Any = None) -> jax.Array:
        """Multiplies ``(..., in)``, wide or a ScaledArray; the result has ``dtype``, or ``x``'s."""
        dtype = dtype or x.dtype
        bias = None if self.bias is None else self.bias[...]
        weight = self.values
        if self.amax is not None:
            # A maximum may lose a NaN.
            amax = jnp.where(jnp.isfinite(x).all(), jnp.max(jnp.abs(x)), jnp.inf)
            self.amax[...] = jnp.maximum(self.amax[...], amax.astype(jnp.float32))
        if self.scale is None:
            return _wide_product(x, weight, bias)
        if not isinstance(x, jax_fp8.ScaledArray):
            options = self.quantization(x) or self._own_quantization(x)
            if options is None:
                # The kernels that decode weights take 16 bits.
                if x.dtype == jnp.float32:
                    return _wide_product(x, jax_fp8.dequantize(weight), bias)
                return jax_fp8.matmul(x, weight, recipe="weight_only", bias=bias)
            x = jax_fp8.quantize(x, **options)
        return jax_fp8.scaled_matmul(x, weight, bias=bias, preferred_element_type=dtype)

    def fused_recipe(self, x: jax.Array, *, norm: bool = False) -> str | None:
        """The recipe of ``jax_fp8.fused_matmul`` for as many rows as ``x``; None: it is not taken.

        Args:
          x: of its rows and dtype the input is.
          norm: whether a norm is what comes before.
        """
        rows, k = math.prod(x.shape[:-1]), self.weight.shape[-1]
        if (
            self.granularity not in ("tensor", "row")
            or self.weight.dtype != jnp.float8_e4m3fn
            or x.dtype != jnp.bfloat16
            or k % 16
            or self.amax is not None
        ):
            return None
        if self._is_few(x):
            fits = rows <= FUSED_ROWS and (not norm or 2 * (rows + 1) * k <= FUSED_NORM_BYTES)
            return "weight_only" if fits else None
        options = self.quantization(x)
        is_few = rows <= FUSED_ROWS_QUANTIZED and k <= FUSED_K_QUANTIZED
        # Columns of results come in steps of eight, and a SwiGLU halves them.
        is_many = rows >= FUSED_MANY_ROWS and self.weight.shape[0] % 16 == 0
        if (
            not (is_few or is_many)
            or not _is_hopper_or_no_gpu()
            or options is None
            or options["dtype"] != jnp.float8_e4m3fn
        ):
            return None
        known = {("row", True): "rowwise", ("tensor", False): "static"}
        return known.get((options["granularity"], options["scale"] is None))

    def link(self, *, recipe: str, **around: Any) -> jax_fp8.ChainLink:
        """This product with the norm, activation and residual of a ``jax_fp8.ChainLink``."""
        bias = None if self.bias is None else self.bias[...]
        scale = self.input_scale[...] if recipe == "static" else None
        return jax_fp8.ChainLink(self.values, bias=bias, scale=scale, **around)

    def _own_quantization(self, x: jax.Array) -> dict[str, Any] | None:
        """Options of ``quantize`` that fused producers do not have; None leaves ``x`` wide."""
        operand, bound = self.activation.operand, self.activation.bound
        if operand is None or self._is_few(x):
            return None
        options: dict[str, Any] = {"dtype": operand.dtype, "granularity": operand.granularity}
        if bound is None:
            return options | {"power_of_two": operand.power_of_two}
        # Scales of a bounded amax: what lies beyond saturates.
        amax = jnp.minimum(jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32), bound)
        return options | {
            "scale": jnp.maximum(amax / float(jnp.finfo(operand.dtype).max), 2.0**-126)
        }

    def _is_few(self, x: jax.Array) -> bool:
        return x.dtype != jnp.float32 and math.prod(x.shape[:-1]) <= self.weight_only_rows


class Parallel(nnx.Module):
    """Products of one input whose weights cannot be one, side by side."""

    def __init__(self, parts: Sequence[Dense]) -> None:
        self.parts = nnx.List(parts)

    def quantization(self, x: jax.Array) -> dict[str, Any] | None:
        """As of a Dense, where all parts agree; None else, and each quantizes for itself."""
        same = {
            (p.activation, p.input_scale is None, p.scale is None, p.weight_only_rows)
            for p in self.parts
        }
        agree = len(same) == 1 and self.parts[0].input_scale is None
        return self.parts[0].quantization(x) if agree else None

    def fused_recipe(self, x: jax.Array, *, norm: bool = False) -> str | None:
        """None: there is no one product to be in one with."""
        return None

    def __call__(self, x: Any, dtype: Any = None) -> jax.Array:
        """The results, one after the other along the last axis."""
        return jnp.concatenate([part(x, dtype) for part in self.parts], axis=-1)


def fuse(parts: Sequence[Dense]) -> Dense | Parallel:
    """One product for several of the same input: wide, or FP8 of the same kind.

    Different tensor scales become row scales, which changes no value. Of several static
    scales of the input the largest is taken.
    """
    first = parts[0]
    kinds = {(p.activation, p.weight[...].dtype, p.input_scale is None) for p in parts}
    biases = [part.bias for part in parts]
    if len(kinds) > 1 or any(bias is None for bias in biases) != all(b is None for b in biases):
        return Parallel(parts)
    if first.scale is None:
        weight: Any = jnp.concatenate([part.values for part in parts])
    else:
        granularities = {part.granularity for part in parts}
        rows = [part.values.shape[0] for part in parts]
        blocks = [g for g in granularities if isinstance(g, tuple)]
        # A block would hold rows of two, or have a scale of another kind beside it.
        if blocks and (len(granularities) > 1 or any(n % blocks[0][0] for n in rows[:-1])):
            return Parallel(parts)
        weight = concatenate([part.values for part in parts])
    bias = None if first.bias is None else jnp.concatenate([bias[...] for bias in biases])
    scales = [part.input_scale[...] for part in parts if part.input_scale is not None]
    return Dense(
        weight,
        bias,
        activation=first.activation,
        input_scale=jnp.max(jnp.stack(scales)) if scales else None,
        names=[name for part in parts for name in part.names],
        weight_only_rows=first.weight_only_rows,
    )


def _is_hopper_or_no_gpu() -> bool:
    """Other GPUs have no products of the library's own in FP8, but cublasLt's."""
    return str(getattr(jax.devices()[0], "compute_capability", "9.0")).startswith("9.")


def _wide_product(x: jax.Array, weight: jax.Array, bias: Any) -> jax.Array:
    y = jnp.einsum("...k,nk->...n", x, weight)
    return y if bias is None else y + bias
