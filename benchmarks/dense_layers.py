"""A dense layer as users can train it today, bf16 in and out: jax_fp8, XLA and flax.

It is ``y = x @ w`` with ``w`` (K, N), as flax keeps its kernels; all that is quantized is quantized
in the step.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jax_fp8
from benchmarks import operands

Problem = tuple[int, int, int]  # M, N, K

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
_NN = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Layer:
    """One way to write the layer.

    Attributes:
      said: in the table.
      start: of x and w: the state that the layer carries from step to step, () for none.
      step: of the state, x, dy and w: (y, dx, dw, the state of the next step).
      forward: of the state, x and w: what is differentiated, for what it keeps.
    """

    said: str
    start: Callable[[jax.Array, jax.Array], Any]
    step: Callable[..., Any]
    forward: Callable[..., Any]


def _stateless(said: str, multiply: Callable[[jax.Array, jax.Array], jax.Array]) -> Layer:
    def step(state: Any, x: jax.Array, dy: jax.Array, w: jax.Array) -> Any:
        y, pull = jax.vjp(multiply, x, w)
        return y, *pull(dy), state

    return Layer(said, lambda x, w: (), step, lambda state, x, w: multiply(x, w))


def _ours(said: str, **options: Any) -> Layer:
    recipe = jax_fp8.named_recipe(**options)
    return _stateless(said, lambda x, w: jax_fp8.dot_general(x, w, _NN, recipe=recipe))


def _delayed(said: str) -> Layer:
    recipe = jax_fp8.named_recipe("delayed")

    def forward(state: Any, x: jax.Array, w: jax.Array) -> Any:
        return jax_fp8.dot_general(x, w, _NN, recipe=recipe, state=state)

    def step(state: Any, x: jax.Array, dy: jax.Array, w: jax.Array) -> Any:
        y, pull, state = jax.vjp(functools.partial(forward, state), x, w, has_aux=True)
        return y, *pull(dy), state

    def start(x: jax.Array, w: jax.Array) -> Any:
        return jax_fp8.init_scaling(recipe, activation=x, weight=w)

    return Layer(said, start, step, lambda *operands: forward(*operands)[0])


def _flax(said: str, name: str) -> Layer:
    """One of flax's operations, whose state comes back as the gradient of itself."""

    def operation() -> Any:
        from flax.linen import fp8_ops

        return getattr(fp8_ops, name)()

    def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with warnings.catch_warnings():  # One of them is deprecated.
                warnings.simplefilter("ignore")
                return function(*arguments)

        return call

    @quiet
    def start(x: jax.Array, w: jax.Array) -> Any:
        small = jnp.ones((16, 16), x.dtype)
        return operation().init(jax.random.key(0), small, small, _NN)

    @quiet
    def forward(state: Any, x: jax.Array, w: jax.Array) -> Any:
        return operation().apply(state, x, w, _NN)

    def step(state: Any, x: jax.Array, dy: jax.Array, w: jax.Array) -> Any:
        y, pull = jax.vjp(forward, state, x, w)
        state, dx, dw = pull(dy)
        return y, dx, dw, state

    return Layer(said, start, step, forward)


def _scale(x: jax.Array, dtype: Any) -> jax.Array:
    return jnp.max(jnp.abs(x)).astype(jnp.float32) / float(jnp.finfo(dtype).max)


def _cast(x: jax.Array, dtype: Any = E4M3) -> tuple[jax.Array, jax.Array]:
    scale, largest = _scale(x, dtype), float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype), scale


def _scaled_dot(a: Any, b: Any, contract: tuple[int, int], dtype: Any) -> jax.Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    y = lax.dot_general(a[0], b[0], dimensions, preferred_element_type=jnp.float32)
    return (y * (a[1] * b[1])).astype(dtype)


@jax.custom_vjp
def _raw(x: jax.Array, w: jax.Array) -> jax.Array:
    return _raw_forward(x, w)[0]


def _raw_forward(x: jax.Array, w: jax.Array) -> Any:
    kept = _cast(x), _cast(w)
    return _scaled_dot(*kept, (1, 0), x.dtype), kept


def _raw_backward(kept: Any, dy: jax.Array) -> Any:
    x, w = kept
    narrow = _cast(dy, E5M2)
    return _scaled_dot(narrow, w, (1, 1), dy.dtype), _scaled_dot(x, narrow, (0, 0), dy.dtype)


_raw.defvjp(_raw_forward, _raw_backward)


def _wide(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, _NN, preferred_element_type=x.dtype)


LAYERS: dict[str, Layer] = {
    "bf16": _stateless("bf16", _wide),
    **{name: _ours(f"jax_fp8 {name}", name=name) for name in ("tensorwise", "rowwise")},
    "delayed": _delayed("jax_fp8 delayed"),
    "blockwise": _ours("jax_fp8 blockwise", name="blockwise"),
    "wide_wgrad": _ours("jax_fp8 rowwise, dw in bf16", name="rowwise", wide_wgrad=True),
    "xla_raw": _stateless("XLA: quantize, dot, scale", _raw),
    "flax_op": _flax("flax Fp8DotGeneralOp", "Fp8DotGeneralOp"),
    "flax_direct": _flax("flax Fp8DirectDotGeneralOp", "Fp8DirectDotGeneralOp"),
}
#: Of jax_fp8, with activations that are kept in FP8 alone.
NARROW = ("tensorwise", "rowwise", "delayed", "blockwise")


def kept_bytes(layer: Layer, problem: Problem) -> tuple[int, int]:
    """The bytes that the forward pass leaves to the backward one: (of activations, of weights).

    What has as many elements as the weight is the weight's; all else is counted as the
    activation's.
    """
    m, n, k = problem
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((m, k), (k, n)))
    state = jax.eval_shape(layer.start, x, w)
    pull = jax.eval_shape(
        lambda state, x, w: jax.vjp(functools.partial(layer.forward, state), x, w)[1], state, x, w
    )
    leaves = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "dtype")]
    of_weight = [leaf for leaf in leaves if leaf.size == k * n]
    of_weights = operands.nbytes(of_weight)
    return operands.nbytes(leaves) - of_weights, of_weights
