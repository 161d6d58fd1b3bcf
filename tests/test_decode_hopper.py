"""16-bit activations by FP8 weights, in shapes that take each of the Hopper kernel's tiles.

What holds for every kernel is in test_weight_only.py; on other GPUs these are more of the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import integers, operand, pair_id

import jax_fp8

pytestmark = pytest.mark.gpu
wides = pytest.mark.parametrize("wide", (ref.BF16, ref.F16), ids=pair_id)
w_dtypes = pytest.mark.parametrize("w_dtype", ref.FP8, ids=pair_id)

# On an H200's 132 multiprocessors each takes a tile of another size, in this order: 128 x 256 of
# W's and of X's rows, 256 x 128, 128 x 128, 256 x 64, 128 x 64, 64 x 64, 64 x 32. None is a
# multiple of its tile, and of the stages along K the last is partial.
SHAPES = (
    (520, 8200, 80),
    (513, 17000, 336),
    (257, 4104, 1040),
    (60, 24584, 80),
    (250, 4104, 336),
    (100, 4200, 208),
    (1, 200, 16),
)
shapes = pytest.mark.parametrize("m, n, k", SHAPES, ids=str)


def multiply(x, w, **options):
    return jax_fp8.matmul(x, w, recipe="weight_only", implementation="decode", **options)


def exact(x, w):
    """The product of integers whose sums, and these times w's powers of two, are exact."""
    x, data = np.asarray(x).astype(np.float32), np.asarray(w.data).astype(np.float32)
    return np.matmul(x, np.swapaxes(data, -1, -2)) * np.swapaxes(np.asarray(w.scale), -1, -2)


@wides
@w_dtypes
@shapes
def test_integers_are_exact(rng, m, n, k, w_dtype, wide):
    x = jnp.asarray(rng.integers(-3, 4, (m, k)).astype(wide))
    w = integers(rng, (n, k), w_dtype, granularity="row")
    expected = exact(x, w)
    got = multiply(x, w, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(multiply(x, w), expected.astype(wide))


@wides
@pytest.mark.parametrize("activation", ["relu", None])
@shapes
def test_bias_and_activation(rng, m, n, k, activation, wide):
    x = jnp.asarray(rng.integers(-3, 4, (m, k)).astype(wide))
    w = integers(rng, (n, k))
    bias = rng.integers(-9, 10, n).astype(np.float32)
    expected = exact(x, w) + bias
    if activation == "relu":
        expected = np.maximum(expected, 0)
    got = multiply(x, w, bias=jnp.asarray(bias), activation=activation)
    np.testing.assert_array_equal(got, expected.astype(wide))


@wides
@w_dtypes
@shapes
def test_nan_in_the_weights_reaches_its_column_alone(rng, m, n, k, w_dtype, wide):
    x = jnp.asarray(rng.integers(-3, 4, (m, k)).astype(wide))
    w = integers(rng, (n, k), w_dtype)
    expected = exact(x, w)
    rows = np.unique(np.append(rng.integers(0, n, 9), n - 1))
    data = np.array(w.data)
    data[rows, rng.integers(0, k, rows.size)] = np.nan
    expected[:, rows] = np.nan
    w = jax_fp8.ScaledArray(jnp.asarray(data), w.scale)
    got = multiply(x, w, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(got, expected)


@wides
@pytest.mark.parametrize("w_granularity", ["tensor", "row"])
@pytest.mark.parametrize("m, n, k", [(70, 264, 272), (300, 1032, 80)], ids=str)
def test_entries_of_a_batch_do_not_mix(rng, m, n, k, w_granularity, wide):
    x = jnp.asarray(rng.integers(-3, 4, (3, m, k)).astype(wide))
    w = integers(rng, (3, n, k), granularity=w_granularity)
    expected = exact(x, w)
    np.testing.assert_array_equal(multiply(x, w), expected.astype(wide))
    got = multiply(x, w, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(got, expected)


@shapes
def test_the_same_bits_again(rng, m, n, k):
    x = jnp.asarray(rng.standard_normal((m, k)).astype(ref.BF16))
    w = operand(rng, (n, k), granularity="row")
    call = jax.jit(lambda x, w: multiply(x, w, preferred_element_type=jnp.float32))
    first = np.asarray(call(x, w))
    for _ in range(3):
        ref.assert_same_bits(call(x, w), first)
