"""How a product with what stands around it runs: one handler, or in steps."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8._src import ffi, fused_operation
from jax_fp8._src.batching import loop, with_axis
from jax_fp8._src.definition import CallConfig
from jax_fp8._src.fused_definition import FusedConfig, reciprocal_rms
from jax_fp8._src.partition import Axes, Rule, axes_of, partition
from jax_fp8._src.product_rule import product_rule, summed_factors
from jax_fp8._src.quantize import QuantizeConfig, quantize_local
from jax_fp8._src.recipe import E4M3
from jax_fp8._src.scaled_array import Granularity
from jax_fp8._src.scaled_matmul import on_device
from jax_fp8._src.undifferentiable import undifferentiable

#: What the kernels take. Of 16 bits, as ffi/gemv.cu says: rows, and bytes of shared memory for a
#: norm's x.
_MOST_ROWS, _NORM_BYTES = 8, 96 << 10
#: Quantized, rows of ffi/small_m_hopper.cu. More are those of ffi/large_m_hopper.cu: the columns of
#: its results come in steps. Two of an H100's 132 multiprocessors have a tile of (rows, rows of W).
_FEW_ROWS, _COLUMN_STEP = 16, 8
_TILE, _TILES_AT_ONCE, _LEAST_FILL = (256, 256), 66, 0.75


@dataclasses.dataclass(frozen=True)
class AroundConfig:
    """The static part of a call: everything but the arrays."""

    granularity: Granularity
    eps: float
    has_norm: bool
    has_bias: bool
    activation: str | None
    has_residual: bool
    #: Whether x, or its norm, goes to E4M3, with scales of its rows or one that is given.
    quantizes: bool
    static: bool
    implementation: str | None
    #: As of a CallConfig.
    capability: int = 0

    def has_many_rows(self, x: jax.Array) -> bool:
        """Whether sums are added up fast and rounded to bfloat16, where they are of that dtype."""
        return self.quantizes and math.prod(x.shape[:-1]) > _FEW_ROWS

    @property
    def sums(self) -> CallConfig:
        """Of the product among the steps."""
        return CallConfig(
            out_dtype=jnp.dtype(jnp.float32),
            x_granularity="row" if self.quantizes and not self.static else "tensor",
            w_granularity=self.granularity,
            has_bias=False,
            activation=None,
            fast=False,
            implementation=self.implementation,
            capability=self.capability,
        )


def kernel_refusal(config: AroundConfig, x: Any, w: Any, norm: Any) -> str | None:
    """Why the kernel cannot compute this on any device, or None."""
    rows, k = math.prod(x.shape[:-1]), x.shape[-1]
    columns = w.shape[0] // (2 if config.activation else 1)
    if x.dtype != jnp.bfloat16 or w.dtype != E4M3:
        return f"it multiplies bfloat16 by float8_e4m3fn, not {x.dtype.name} by {w.dtype.name}"
    if isinstance(config.granularity, tuple):
        return f"it takes no block scales, and w has granularity {config.granularity}"
    if rows > _MOST_ROWS and not config.quantizes:
        return f"it takes up to {_MOST_ROWS} rows, not {rows}"
    if rows > _FEW_ROWS and columns % _COLUMN_STEP:
        return (
            f"with more than {_FEW_ROWS} rows it writes columns in steps of {_COLUMN_STEP}, and"
            f" there are {columns}"
        )
    if k % 16 or k == 0:
        return f"it reads K in steps of 16, and K is {k}"
    if config.has_norm and norm.dtype != x.dtype:
        return f"it multiplies by a bfloat16 norm, not {norm.dtype.name}"
    if config.has_norm and not config.quantizes and (rows + 1) * k * 2 > _NORM_BYTES:
        return f"{rows} rows of K = {k} are too large to stay in shared memory, as a norm takes"
    return None


def best_in_steps(config: AroundConfig, x: Any, w: Any, norm: Any) -> bool:
    """Whether steps are what is best, as the kernel cannot compute it, or its tiles are too few."""
    if kernel_refusal(config, x, w, norm):
        return True
    rows = math.prod(x.shape[:-1])
    if rows <= _FEW_ROWS:
        return False
    tiles = math.ceil(rows / _TILE[0]) * math.ceil(w.shape[0] / _TILE[1])
    return tiles / (math.ceil(tiles / _TILES_AT_ONCE) * _TILES_AT_ONCE) < _LEAST_FILL


def kernel(
    configs: Sequence[AroundConfig],
    x: jax.Array,
    operands: Sequence[Sequence[jax.Array]],
    added: Sequence[int | None],
) -> tuple[jax.Array, ...]:
    """The handler, which knows (rows, columns) only, for one product or a chain of them.

    Args:
      configs: of each product.
      x: of the first one.
      operands: of each product w, its scale, the bias, the norm, the residual and the scale of what
        is multiplied.
      added: of each product the one before it whose result is the residual, or None.
    """
    rows, links = math.prod(x.shape[:-1]), []
    for config, own, index in zip(configs, operands, added, strict=True):
        w, w_scale, bias, norm, residual, scale = own
        is_there = config.has_residual and index is None
        links.append(
            ffi.Link(
                w=w,
                w_scale=w_scale,
                bias=bias if config.has_bias else None,
                norm=norm if config.has_norm else None,
                residual=residual.reshape(rows, residual.shape[-1]) if is_there else index,
                scale=scale.reshape(1, 1) if config.static else None,
                eps=config.eps,
                swiglu=config.activation == "swiglu",
            )
        )
    results = ffi.fused_matmul(
        x.reshape(rows, x.shape[-1]),
        links,
        quantizes=configs[0].quantizes,
        many_rows=configs[0].has_many_rows(x),
        implementation=configs[0].implementation or "",
        capability=configs[0].capability,
    )
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in results)


def _kernel(config: AroundConfig, x: jax.Array, *operands: jax.Array) -> tuple[jax.Array]:
    (y,) = kernel((config,), x, (operands,), (None,))
    return (y,)


def _quantized(
    config: AroundConfig, x: jax.Array, norm: jax.Array, scale: jax.Array
) -> tuple[jax.Array, ...]:
    """The data and the scales of x or of its norm: those of each row, or the one that is given."""
    none, implementation = jnp.zeros((), jnp.float32), config.implementation
    granularity: Granularity = "tensor" if config.static else "row"
    given = scale.reshape((1,) * x.ndim) if config.static else none
    if not config.has_norm:
        of_x = QuantizeConfig(E4M3, granularity, config.static, False, implementation)
        data, scale, _ = quantize_local(of_x, x, given, axes={})
        return data, scale
    of_norm = FusedConfig(
        "rms_norm", config.eps, E4M3, granularity, config.static, False, implementation
    )
    return fused_operation.run(of_norm, x, none, norm, none, given)


def steps(
    config: AroundConfig,
    *operands: jax.Array,
    across: tuple[str, ...] = (),
    gathered: tuple[str, ...] = (),
) -> tuple[jax.Array]:
    """The meaning in plain JAX around a bare product.

    Axes ``across`` of a mesh divide K, and ``gathered`` N where that must be whole for a SwiGLU.
    """
    x, w, w_scale, bias, norm, residual, given = operands
    h, scale = x, jnp.ones((1,) * x.ndim, jnp.float32)
    if config.quantizes:
        h, scale = _quantized(config, x, norm, given)
    elif config.has_norm:
        wide = x.astype(jnp.float32)
        factor = reciprocal_rms(wide, config.eps, across)
        h = (wide * norm.astype(jnp.float32) * factor).astype(x.dtype)
    placeholder = jnp.ones((1,), jnp.float32)
    sums = config.sums
    if config.has_many_rows(x) and x.dtype == jnp.bfloat16 and not (across or gathered):
        sums = dataclasses.replace(sums, out_dtype=x.dtype, fast=True)
    y, _ = on_device(sums, h, scale, w, w_scale, placeholder, placeholder)
    y = y.astype(jnp.float32)
    if across:
        y = lax.psum(y, across)
    if config.has_bias:
        y = y + bias.astype(jnp.float32)
    if gathered:
        y = lax.all_gather(y, gathered, axis=y.ndim - 1, tiled=True)
    if config.activation == "swiglu":
        gate, up = jnp.split(y, 2, axis=-1)
        y = jax.nn.silu(gate) * up
    if config.has_residual:
        y = y + residual.astype(jnp.float32)
    return (y.astype(x.dtype),)


def local(config: AroundConfig, *operands: jax.Array, axes: Axes) -> tuple[jax.Array]:
    """Runs on the operands of one device, whatever mesh they came from."""
    x, w, _, _, norm, *_ = operands
    in_one = functools.partial(_kernel, config)
    if config.implementation == "kernel":
        return in_one(*operands)
    across = axes_of(summed_factors(config.sums), axes)
    gathered = axes_of(("n",), axes) if config.activation else ()
    in_steps = functools.partial(steps, config, across=across, gathered=gathered)
    # Where K is divided, a device has no sum that anything could be done to.
    takes_steps = across or gathered or best_in_steps(config, x, w, norm)
    if takes_steps or config.implementation == "xla":
        return in_steps(*operands)
    return lax.platform_dependent(*operands, cpu=in_steps, cuda=in_one)


def _rule(config: AroundConfig, *operands: jax.Array) -> Rule:
    """As of the bare product, but that a SwiGLU takes gates and values on the same device.

    Of weights and float32 sums the smaller ones are brought together there. A row that gets a scale
    is whole on each.
    """
    x, w, w_scale, bias, *_ = operands
    one = jnp.ones((1,) * x.ndim, jnp.float32)
    # The scales of x are no operand.
    sums = dataclasses.replace(config.sums, x_granularity="tensor", has_bias=config.has_bias)
    rule = product_rule(sums, x, one, w, w_scale, bias, jnp.ones((1,), jnp.float32))
    of_x, _, of_w, of_scale, of_bias, _ = rule.operands
    of_y, named = rule.results[0], config.implementation == "kernel"
    if config.activation == "swiglu":
        of_y = (*of_y[:-1], None)
    rule = dataclasses.replace(
        rule,
        operands=(
            of_x,
            of_w,
            of_scale,
            of_bias,
            of_x[-1:] if config.has_norm else (None,),
            of_y if config.has_residual else (),
            (),
        ),
        results=(of_y,),
        multiplied=(0, 1),
    )
    if config.activation == "swiglu" and (named or 4 * math.prod(x.shape[:-1]) > x.shape[-1]):
        rule = rule.without("n")
    needs_rows = config.quantizes and (config.has_norm or not config.static)
    return rule.without(summed_factors(sums)[0]) if named or needs_rows else rule


@functools.cache
def operation(config: AroundConfig) -> Any:
    """custom_vjp -> custom_vmap -> partition -> platform, for one configuration."""
    batched = jax.custom_batching.custom_vmap(
        partition(functools.partial(local, config), functools.partial(_rule, config))
    )

    @batched.def_vmap
    def _vmap(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> Any:
        x, *shared, residual, scale = operands
        run = operation(config)
        rows = jax.ShapeDtypeStruct((axis_size, *x.shape[in_batched[0] :]), x.dtype)
        named = config.implementation == "kernel"
        apart = any(in_batched[1:5]) or in_batched[6]
        if apart or (named and kernel_refusal(config, rows, shared[0], shared[3])):
            # Weights of its own for each entry, or more rows than the kernel takes.
            return loop(run, in_batched, operands), (True,)

        if config.has_residual:
            residual = with_axis(residual, in_batched[5], axis_size)
        return run(with_axis(x, in_batched[0], axis_size), *shared, residual, scale), (True,)

    return undifferentiable(
        batched,
        "fused_matmul: it cannot be differentiated in this version; put"
        " jax.lax.stop_gradient around its operands, or use jax_fp8.matmul",
    )
