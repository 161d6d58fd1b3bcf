"""Random operands, and weights that rotate over more than the L2 cache holds."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jax_fp8
from benchmarks import timing

Prepare = Callable[[jax.Array], tuple[Any, ...]]

#: Rows of a result that are compared with what is expected.
COMPARED = 64


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Normal values of a seed and a shape."""
    # With the seed alone, rows of x would be rows of a weight of the same seed, and their products
    # outliers.
    key = jax.random.fold_in(jax.random.key(seed), math.prod(shape))
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def wide(w: jax.Array) -> tuple[Any, ...]:
    """As it is."""
    return (w,)


def half(w: jax.Array) -> tuple[Any, ...]:
    """In float16."""
    return (w.astype(jnp.float16),)


def tensor(w: jax.Array) -> tuple[Any, ...]:
    """In E4M3 with one scale."""
    return (jax_fp8.quantize(w),)


def row(w: jax.Array) -> tuple[Any, ...]:
    """In E4M3 with a scale for each row."""
    return (jax_fp8.quantize(w, granularity="row"),)


def block(w: jax.Array) -> tuple[Any, ...]:
    """In E4M3 with a scale for each 128 x 128 elements."""
    return (jax_fp8.quantize(w, granularity=(128, 128)),)


def row_block(x: jax.Array) -> tuple[Any, ...]:
    """In E4M3 with a scale for each 128 elements of a row."""
    return (jax_fp8.quantize(x, granularity=(1, 128)),)


def nbytes(tree: Any) -> int:
    """Of all arrays in the tree, or of what ``jax.eval_shape`` says of them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Weights:
    """Copies of (N, K) bfloat16 weights, prepared in several ways, made as they are needed.

    Copy i is of seed 1 + i, however it is prepared.
    """

    def __init__(self, n: int, k: int) -> None:
        self._shape = (n, k)
        self._made: dict[Prepare, tuple[Callable[[int], Any], list[tuple[Any, ...]]]] = {}
        self._lock = threading.Lock()

    def get(self, prepare: Prepare, calls: int) -> list[tuple[Any, ...]]:
        """As many copies as a chain of that many calls wants."""
        with self._lock:
            if prepare not in self._made:
                make = jax.jit(lambda seed: prepare(normal(seed, self._shape)))
                self._made[prepare] = (make, [])
            make, made = self._made[prepare]
            count = timing.copies_for(nbytes(jax.eval_shape(make, 1)), calls)
            for seed in range(len(made), count):
                made.append(make(1 + seed))
            return made[:count]

    def first(self, prepare: Prepare) -> tuple[Any, ...]:
        """The first copy."""
        return self.get(prepare, 1)[0]


#: The reference need not be fast, but must be there soon.
_AT_ONCE = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@functools.cache
def _reference(m: int, n: int, k: int) -> Any:
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        x, w = x[:COMPARED].astype(jnp.float32), w.astype(jnp.float32)
        return jnp.einsum("mk,nk->mn", x, w, precision=jax.lax.Precision.HIGHEST)

    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((m, k), (n, k)))
    return timing.compile_with(jax.jit(product).lower(x, w), _AT_ONCE)


def reference(x: jax.Array, w: jax.Array) -> jax.Array:
    """The first COMPARED rows of the wide product, in float32."""
    return _reference(x.shape[0], *w.shape)(x, w)


@jax.jit
def _relative(result: jax.Array, expected: jax.Array) -> jax.Array:
    off = result[: expected.shape[0]].astype(jnp.float32) - expected
    return jnp.sqrt(jnp.mean(off**2) / jnp.mean(expected**2))


def rms_error(result: jax.Array, expected: jax.Array) -> float:
    """The root mean square of the error in the first rows over that of what is expected."""
    return float(_relative(result, expected))
