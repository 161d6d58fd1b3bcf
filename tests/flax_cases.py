"""What a layer with an FP8 product must give, from what its operands are quantized to."""

import jax
import jax.numpy as jnp
import numpy as np
import references as ref
from cases import is_fast
from opt_einsum.parser import parse_einsum_input

#: Dtypes of the input, of the computation and of the parameters.
DTYPES = [
    (jnp.float32, None, jnp.float32),
    (jnp.bfloat16, None, jnp.float32),
    (jnp.bfloat16, jnp.bfloat16, jnp.float32),
    (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    (jnp.bfloat16, None, jnp.bfloat16),
    (jnp.float32, jnp.float16, jnp.float32),
    (jnp.int32, None, jnp.float32),
    (jnp.float16, jnp.float32, jnp.float16),
]


def dtypes_id(dtypes):
    return "-".join("none" if dtype is None else jnp.dtype(dtype).name for dtype in dtypes)


def samples(shape, dtype=jnp.float32, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(4 * x if dtype == jnp.int32 else x, dtype)


def rounded(x, axes=None, amax=None):
    """The values of ``x`` in E4M3, in float64, with one scale or one for what lies along ``axes``.

    ``amax`` is that of a scale that is not taken from ``x``.
    """
    x = np.asarray(x).astype(np.float32)
    if amax is None:
        amax = np.max(np.abs(x), axis=axes, keepdims=True)
    scale = ref.dynamic_scale(np.asarray(amax, np.float32), ref.E4M3)
    codes = ref.round_saturate(x, ref.inverse(scale), ref.E4M3)
    return codes.astype(np.float64) * np.float64(scale)


def assert_product(got, spec, x, w, recipe="tensorwise", amaxes=(None, None)):
    """Holds a result to the exact product of what the recipe makes of ``x`` and ``w``."""
    inputs, result, _ = parse_einsum_input((spec, x.shape, w.shape), shapes=True)
    left, right = inputs.split(",")
    contracted = (set(left) & set(right)) - set(result)
    operands = []
    for labels, operand, amax in ((left, x, amaxes[0]), (right, w, amaxes[1])):
        along = tuple(i for i, label in enumerate(labels) if label in contracted)
        operands.append(rounded(operand, along if recipe == "rowwise" else None, amax))
    subscripts = f"{inputs}->{result}"
    want = np.einsum(subscripts, *operands)
    magnitudes = np.einsum(subscripts, *map(np.abs, operands))
    size = np.prod([x.shape[left.index(label)] for label in contracted])
    ref.assert_close(got, want, ref.random_error(magnitudes, size, is_fast(None)))


def assert_same_structure(one, other):
    """The same tree with the same shapes and dtypes."""
    describe = lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf).name)  # noqa: E731
    one, other = jax.tree.map(describe, one), jax.tree.map(describe, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.leaves(one) == jax.tree.leaves(other)
