import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import operand, scaled

import jax_fp8
from jax_fp8.checkpoint import concatenate


def assert_values(got, weights):
    """Exactly the values of the weights, one after the other."""
    want = np.concatenate([ref.values(w) for w in weights], axis=-2)
    np.testing.assert_array_equal(ref.values(got), want)


@pytest.mark.parametrize("granularities", [("tensor",) * 3, ("row",) * 3, ("row", "tensor", "row")])
@pytest.mark.parametrize("dtype", ref.FP8)
def test_scales_of_tensors_become_scales_of_rows(rng, granularities, dtype):
    outs = (5, 1, 130)
    weights = [
        operand(rng, (out, 33), dtype, granularity)
        for out, granularity in zip(outs, granularities, strict=True)
    ]
    got = concatenate(weights)
    assert (got.granularity, got.shape, got.dtype) == ("row", (136, 33), dtype)
    assert_values(got, weights)


def test_one_scale_stays_one(rng):
    weights = [
        scaled(ref.random_codes(rng, (n, 8), ref.E4M3), np.full((1, 1), 3.0)) for n in (2, 3)
    ]
    weights = [jax.tree.map(lambda x: x.astype(x.dtype), w) for w in weights]
    got = concatenate(weights)
    assert (got.granularity, got.scale.shape) == ("tensor", (1, 1))
    assert_values(got, weights)
    traced = jax.jit(concatenate)(weights)
    assert traced.granularity == "row"
    assert_values(traced, weights)


@pytest.mark.parametrize(
    "granularity, outs", [((128, 128), (256, 128, 130)), ((1, 128), (5, 130, 2))]
)
def test_blocks(rng, granularity, outs):
    weights = [operand(rng, (out, 200), granularity=granularity) for out in outs]
    got = concatenate(weights)
    assert got.granularity == granularity
    assert_values(got, weights)


def test_stacked_weights(rng):
    """Of scanned layers: (layers, out, in), with a scale for each layer."""
    weights = [operand(rng, (3, out, 16)) for out in (4, 6)]
    assert_values(concatenate(weights), weights)
    many = [scaled(w.data, np.exp(rng.standard_normal((3, 1, 1))).astype(ref.F32)) for w in weights]
    got = concatenate(many)
    assert got.shape == (3, 10, 16)
    assert_values(got, many)


def test_requantized_to_the_largest(rng):
    weights = [operand(rng, (out, 24)) for out in (8, 16, 4)]
    weights[1] = jax_fp8.ScaledArray(weights[1].data, weights[1].scale * 3, "tensor")
    got = concatenate(weights, requantize=True)
    assert (got.granularity, got.shape) == ("tensor", (28, 24))
    largest = max(float(w.scale[0, 0]) for w in weights)
    assert float(got.scale[0, 0]) == largest
    ref.assert_same_bits(got.data[8:24], weights[1].data)
    values = np.concatenate([ref.values(w) for w in weights]).astype(np.float32)
    data, _ = ref.quantize(values, ref.E4M3, "tensor", np.float32(largest))
    ref.assert_same_bits(got.data, data)


def test_multiplies_as_the_weights_do(rng):
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    weights = [operand(rng, (out, 64), kind="heavy") for out in (16, 32)]
    got = jax_fp8.matmul(x, concatenate(weights), granularity="row")
    want = [jax_fp8.matmul(x, w, granularity="row") for w in weights]
    np.testing.assert_allclose(got, np.concatenate(want, axis=-1), rtol=1e-6, atol=1e-5)


def test_what_does_not_fit_raises(rng):
    def weight(shape, granularity="tensor", dtype=ref.E4M3):
        return operand(rng, shape, dtype, granularity)

    blocks = [weight((130, 128), (128, 128)), weight((128, 128), (128, 128))]
    for weights, options, error, message in (
        ([], {}, ValueError, "there are no weights"),
        ([weight((4, 8)), weight((4, 9))], {}, ValueError, "differ in axis -2 alone"),
        ([weight((8,)), weight((8,))], {}, ValueError, r"got shapes \[\(8,\), \(8,\)\]"),
        ([weight((4, 8)), weight((4, 8), dtype=ref.E5M2)], {}, ValueError, "must have one dtype"),
        ([weight((128, 8)), weight((128, 8), (128, 128))], {}, ValueError, "one granularity"),
        (blocks, {}, ValueError, r"a multiple of 128 rows, got shapes \[\(130, 128\)"),
        (blocks, {"requantize": True}, ValueError, "requantize is for granularity 'tensor'"),
        ([jnp.ones((3, 4))], {}, TypeError, r"concatenate: weights\[0\] must be a .*ScaledArray"),
    ):
        with pytest.raises(error, match=message):
            concatenate(weights, **options)
