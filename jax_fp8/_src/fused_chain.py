"""fused_chain: several fused_matmul, each of what the one before has made, in one call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from jax_fp8._src import fused_matmul_operation
from jax_fp8._src.batching import loop, with_axis
from jax_fp8._src.fused_matmul import check_x, link_of
from jax_fp8._src.fused_matmul_operation import (
    AroundConfig,
    best_in_steps,
    kernel,
    kernel_refusal,
)
from jax_fp8._src.partition import Axes, Rule, partition
from jax_fp8._src.scaled_array import ScaledArray
from jax_fp8._src.undifferentiable import undifferentiable


@dataclasses.dataclass(frozen=True, eq=False)
class ChainLink:
    """A product of ``fused_chain``.

    Attributes:
      w: as of fused_matmul, like all that follow.
      norm: None, or the weight of an RMSNorm of what is multiplied.
      eps: of the norm.
      bias: None, or ``(N,)``.
      activation: None, or ``"swiglu"``.
      residual: None, an array, or the index of the link before this one whose result is added.
      scale: None, or with the recipe ``"static"`` that of what is multiplied.
    """

    w: ScaledArray
    norm: Any = None
    eps: float = 1e-6
    bias: Any = None
    activation: str | None = None
    residual: Any = None
    scale: Any = None


def fused_chain(
    x: Any,
    links: Sequence[ChainLink],
    *,
    recipe: str = "weight_only",
    implementation: str | None = None,
    one_call: bool = True,
) -> tuple[Any, ...]:
    """``fused_matmul`` of ``x``, of its result, of the result of that, and so on, in one call.

    The results are those of separate calls. On Hopper, each product of 16-bit activations starts
    before the one in front of it has ended: it reads the first of its weights on what room that one
    leaves at its end. So do, for up to sixteen rows that are quantized, the quantization, if it is
    a kernel of its own, and its product. Separate calls cannot do that, as each is a node of its
    own in the graph that XLA captures.

    Over a mesh one call divides nothing but the rows of ``x``: where weights are divided, or
    columns of ``x`` or of a residual, these are brought together on each device. Separate calls
    multiply them where they lie.

    Args:
      x: as of ``fused_matmul``.
      links: at least one.
      recipe: as of ``fused_matmul``, for all links.
      implementation: likewise; ``"kernel"`` where it takes every link, None where one call is
        best for all of them, and each by itself otherwise.
      one_call: False makes separate calls of it.

    Returns:
      The result of each link.

    Raises:
      As ``fused_matmul``, and:
      TypeError: for links that are none, or a residual that is a bool.
      ValueError: for no links, or a residual that is the index of no link before.

    >>> import jax.numpy as jnp, jax_fp8
    >>> x, w = jnp.array([[3, -3]], jnp.bfloat16), jax_fp8.quantize(jnp.array([[1.0, 0], [0, 4.0]]))
    >>> links = [jax_fp8.ChainLink(w), jax_fp8.ChainLink(w, residual=0)]
    >>> [y.tolist() for y in jax_fp8.fused_chain(x, links)]
    [[[3.0, -12.0]], [[6.0, -60.0]]]
    """
    op = "fused_chain"
    x = check_x(op, x)
    links = tuple(links)
    if not links:
        raise ValueError(f"{op}: there must be a link")
    multiplied = jax.ShapeDtypeStruct(x.shape, x.dtype)
    results: list[jax.ShapeDtypeStruct] = []
    configs: list[AroundConfig] = []
    operands: list[jax.Array] = []
    for index, link in enumerate(links):
        if not isinstance(link, ChainLink):
            raise TypeError(f"{op}: links must be jax_fp8.ChainLink, got {type(link).__name__}")
        residual, added = link.residual, None
        if isinstance(residual, bool):
            raise TypeError(f"{op}: a residual is an array or the index of a link, got {residual}")
        if isinstance(residual, int):
            if not 0 <= residual < index:
                raise ValueError(
                    f"{op}: link {index} can add the result of a link before it, got {residual}"
                )
            added, residual = results[residual], None
        config, own = link_of(
            f"{op}, link {index}",
            multiplied,
            *(link.w, link.norm, link.eps, link.bias, link.activation),
            residual=residual,
            scale=link.scale,
            recipe=recipe,
            implementation=implementation,
            added=added,
        )
        configs.append(config)
        operands += own
        columns = link.w.shape[0] // (2 if link.activation else 1)
        multiplied = jax.ShapeDtypeStruct((*x.shape[:-1], columns), x.dtype)
        results.append(multiplied)
    indices = tuple(link.residual if isinstance(link.residual, int) else None for link in links)
    chain = _ChainConfig(tuple(configs), indices)
    return _operation(chain)(x, *operands) if one_call else _in_turn(_apart, chain, x, *operands)


# --- How it runs ----------------------------------------------------------------------------------

#: Of each link, but for x: w, its scale, the bias, the norm, the residual, and the scale of x.
_OPERANDS = 6


@dataclasses.dataclass(frozen=True)
class _ChainConfig:
    links: tuple[AroundConfig, ...]
    #: The link whose result is added, or None.
    added: tuple[int | None, ...]

    @property
    def implementation(self) -> str | None:
        return self.links[0].implementation

    def split(self, operands: Sequence[Any]) -> list[Sequence[Any]]:
        """Those of each link."""
        return [operands[i : i + _OPERANDS] for i in range(0, len(operands), _OPERANDS)]

    def any_link(self, is_so: Callable[..., Any], x: Any, operands: Sequence[Any]) -> bool:
        """Whether ``is_so(config, what is multiplied, w, norm)`` of one of the links."""
        for config, (w, _, _, norm, *_) in zip(self.links, self.split(operands), strict=True):
            multiplied = jax.ShapeDtypeStruct((*x.shape[:-1], w.shape[1]), x.dtype)
            if is_so(config, multiplied, w, norm):
                return True
        return False


def _in_turn(
    run: Callable[..., tuple[jax.Array]], config: _ChainConfig, x: jax.Array, *operands: jax.Array
) -> tuple[jax.Array, ...]:
    """Each link by itself."""
    results: list[jax.Array] = []
    for link, added, own in zip(config.links, config.added, config.split(operands), strict=True):
        *others, residual, scale = own
        if added is not None:
            residual = results[added]
        (x,) = run(link, x, *others, residual, scale)
        results.append(x)
    return tuple(results)


def _apart(link: AroundConfig, *operands: jax.Array) -> tuple[jax.Array]:
    """As ``fused_matmul``, with its transformations and its rule for meshes."""
    result: tuple[jax.Array] = fused_matmul_operation.operation(link)(*operands)
    return result


def _kernel(config: _ChainConfig, x: jax.Array, *operands: jax.Array) -> tuple[jax.Array, ...]:
    return kernel(config.links, x, config.split(operands), config.added)


def _local(config: _ChainConfig, *operands: jax.Array, axes: Axes) -> tuple[jax.Array, ...]:
    """Runs on the operands of one device; a mesh divides nothing but rows."""
    in_one = functools.partial(_kernel, config)
    if config.implementation == "kernel":
        return in_one(*operands)
    if config.implementation == "xla" or config.any_link(best_in_steps, operands[0], operands[1:]):
        each = functools.partial(fused_matmul_operation.local, axes={})
        return _in_turn(each, config, *operands)
    in_steps = functools.partial(_in_turn, fused_matmul_operation.steps, config)
    return lax.platform_dependent(*operands, cpu=in_steps, cuda=in_one)


def _rule(config: _ChainConfig, *operands: jax.Array) -> Rule:
    x, *others = operands
    rows = tuple(f"m{i}" for i in range(x.ndim - 1))
    dimensions: list[tuple[str | None, ...]] = [(*rows, None)]
    for link, own in zip(config.links, config.split(others), strict=True):
        *weights, residual, _ = own
        dimensions += [(None,) * array.ndim for array in weights]
        # The residual is of x's rank, or a placeholder.
        dimensions += [(*rows, None) if link.has_residual and residual.ndim else (), ()]
    return Rule(
        tuple(dimensions),
        ((*rows, None),) * len(config.links),
        dict(zip(rows, x.shape, strict=False)),
    )


@functools.cache
def _operation(config: _ChainConfig) -> Any:
    """custom_vjp -> custom_vmap -> partition -> platform, for one configuration."""
    count = len(config.links)
    batched = jax.custom_batching.custom_vmap(
        partition(functools.partial(_local, config), functools.partial(_rule, config))
    )

    @batched.def_vmap
    def _vmap(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> Any:
        run = _operation(config)
        x, *others = operands
        x_batched, *others_batched = in_batched
        rows = jax.ShapeDtypeStruct((axis_size, *x.shape[x_batched:]), x.dtype)
        shared = not any(any((*own[:-2], own[-1])) for own in config.split(others_batched))
        named = config.implementation == "kernel"
        if not shared or (named and config.any_link(kernel_refusal, rows, others)):
            # Weights of its own for each entry, or more rows than the kernel takes.
            return loop(run, in_batched, operands), (True,) * count

        merged = list(others)
        for i, link in enumerate(config.links):
            at = _OPERANDS * i + _OPERANDS - 2
            if link.has_residual and config.added[i] is None:
                merged[at] = with_axis(others[at], others_batched[at], axis_size)
        return run(with_axis(x, x_batched, axis_size), *merged), (True,) * count

    return undifferentiable(
        batched,
        "fused_chain: it cannot be differentiated in this version; put"
        " jax.lax.stop_gradient around its operands, or use jax_fp8.matmul",
    )
