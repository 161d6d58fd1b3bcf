"""quantize and dequantize as functions: what they take, refuse and return, and vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import operand, pair_id, sample, scaled

import jax_fp8


def test_returns_a_scaled_array(quantizer, rng):
    x = sample(rng, "normal", (3, 130))
    got = jax_fp8.quantize(x, dtype=jnp.float8_e5m2, granularity=[1, 128], implementation=quantizer)
    assert isinstance(got, jax_fp8.ScaledArray)
    assert (got.dtype, got.shape, got.granularity) == (ref.E5M2, (3, 130), (1, 128))
    assert (got.scale.dtype, got.scale.shape) == (jnp.float32, (3, 2))


def test_the_default_is_e4m3_for_each_tensor_and_returns_no_amax(rng):
    got = jax_fp8.quantize(sample(rng, "normal", (3, 16)))
    assert (got.dtype, got.granularity, got.scale.shape) == (ref.E4M3, "tensor", (1, 1))


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_the_amax_is_returned_when_asked_for(quantizer, rng, granularity, static):
    x = sample(rng, "normal", (2, 130, 200))
    scale = np.ones(ref.scale_shape(x.shape, granularity)) if static else None
    options = {"granularity": granularity, "scale": scale, "implementation": quantizer}
    got, amax = jax_fp8.quantize(x, return_amax=True, **options)
    ref.assert_same_bits(amax, ref.amax(x, granularity))
    ref.assert_same_trees(jax_fp8.quantize(x, **options), got)


@pytest.mark.parametrize(
    "scale",
    [0.5, np.float64(0.5), jnp.float32(0.5), jnp.bfloat16(0.5), np.full(1, 0.5, np.float16)],
    ids=lambda scale: type(scale).__name__,
)
def test_a_scalar_is_a_static_scale_for_the_tensor(quantizer, rng, scale):
    x = sample(rng, "normal", (2, 3, 16))
    got = jax_fp8.quantize(x, scale=scale, implementation=quantizer)
    want = jax_fp8.quantize(x, scale=jnp.full((1, 1, 1), 0.5), implementation=quantizer)
    ref.assert_same_trees(got, want)


def test_the_same_bits_every_time(quantizer, rng):
    x = sample(rng, "heavy", (5, 300, 260)).astype(ref.BF16)
    runs = [
        jax_fp8.quantize(x, granularity=granularity, implementation=quantizer)
        for _ in range(4)
        for granularity in ref.GRANULARITIES
    ]
    for run in runs[4:]:
        first = runs[ref.GRANULARITIES.index(run.granularity)]
        ref.assert_same_trees(run, first)


# --- vmap -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_vmap_is_a_loop(quantizer, rng, granularity, static):
    x = sample(rng, "heavy", (2, 3, 130, 140))
    scale = np.exp(rng.standard_normal((2, 3, *ref.scale_shape((130, 140), granularity))))

    def quantize(x, scale):
        return jax_fp8.quantize(
            x,
            granularity=granularity,
            scale=scale.astype(jnp.float32) if static else None,
            return_amax=True,
            implementation=quantizer,
        )

    nested = jax.vmap(jax.vmap(quantize))(x, scale)
    last = np.moveaxis(scale, 1, -1)
    swapped = jax.vmap(jax.vmap(quantize, out_axes=1), in_axes=(1, -1))(x, last)
    for index in np.ndindex(2, 3):
        want = quantize(x[index], scale[index])
        ref.assert_same_trees(jax.tree.map(lambda leaf, i=index: leaf[i], nested), want)
        other = jax.tree.map(lambda leaf, i=index: leaf[i[1], :, i[0]], swapped)
        ref.assert_same_trees(other, want)


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
def test_vmap_over_x_alone_and_over_the_scale_alone(quantizer, rng, granularity):
    x = sample(rng, "normal", (3, 130, 140))
    scales = np.exp(rng.standard_normal((3, *ref.scale_shape((130, 140), granularity))))
    scales = scales.astype(np.float32)

    def quantize(x, scale):
        return jax_fp8.quantize(x, granularity=granularity, scale=scale, implementation=quantizer)

    over_x = jax.vmap(quantize, in_axes=(0, None))(x, scales[0])
    over_scales = jax.vmap(quantize, in_axes=(None, 0))(x[0], scales)
    for i in range(3):
        one, other = (jax.tree.map(lambda leaf, i=i: leaf[i], t) for t in (over_x, over_scales))
        ref.assert_same_trees(one, quantize(x[i], scales[0]))
        ref.assert_same_trees(other, quantize(x[0], scales[i]))


def test_vmap_of_nothing(quantizer):
    got = jax.vmap(lambda x: jax_fp8.quantize(x, implementation=quantizer))(jnp.zeros((0, 3, 16)))
    assert (got.shape, got.scale.shape) == ((0, 3, 16), (0, 1, 1))


# --- Errors ---------------------------------------------------------------------------------------


def test_another_dtype_of_x_raises():
    with pytest.raises(TypeError, match=r"quantize: x must be float32, .*got int32\(2, 3\)"):
        jax_fp8.quantize(jnp.ones((2, 3), jnp.int32))
    with pytest.raises(TypeError, match=r"quantize: x must be .*got float8_e4m3fn\(2, 3\)"):
        jax_fp8.quantize(jnp.ones((2, 3), jnp.float8_e4m3fn))


def test_another_dtype_of_the_result_raises():
    with pytest.raises(TypeError, match="quantize: dtype must be float8_e4m3fn or .*got bfloat16"):
        jax_fp8.quantize(jnp.ones((2, 3)), dtype=jnp.bfloat16)


def test_another_granularity_raises():
    with pytest.raises(ValueError, match="quantize: unknown granularity 'channel'; accepted are"):
        jax_fp8.quantize(jnp.ones((2, 3)), granularity="channel")


@pytest.mark.parametrize(
    "shape, granularity, needed", [((), "row", 1), ((), (1, 128), 1), ((5,), (128, 128), 2)]
)
def test_a_rank_without_such_blocks_raises(shape, granularity, needed):
    message = f"quantize: granularity .* needs x of rank >= {needed}, got rank {len(shape)}"
    with pytest.raises(ValueError, match=message):
        jax_fp8.quantize(jnp.ones(shape), granularity=granularity)


def test_another_implementation_raises():
    with pytest.raises(ValueError, match="quantize: unknown implementation 'cublaslt'; accepted"):
        jax_fp8.quantize(jnp.ones((2, 3)), implementation="cublaslt")


def test_another_dtype_of_the_scale_raises():
    with pytest.raises(TypeError, match="quantize: scale must be float32, got int32"):
        jax_fp8.quantize(jnp.ones((2, 3)), scale=1)


@pytest.mark.parametrize(
    "granularity, shape",
    [
        ("tensor", (2, 1)),
        ("row", (2, 1)),
        ("row", ()),
        ((1, 128), (2, 200, 1)),
        ((128, 128), (2, 2, 1)),
    ],
    ids=pair_id,
)
def test_a_scale_that_does_not_fit_raises(granularity, shape):
    want = r"scale of shape .* does not fit x of shape \(2, 200, 200\) with granularity .* takes \("
    with pytest.raises(ValueError, match="quantize: " + want):
        jax_fp8.quantize(jnp.ones((2, 200, 200)), granularity=granularity, scale=jnp.ones(shape))


def test_a_scale_and_power_of_two_raise():
    with pytest.raises(ValueError, match="quantize: power_of_two is for dynamic scales"):
        jax_fp8.quantize(jnp.ones((2, 3)), scale=1.0, power_of_two=True)


def test_differentiation_raises(quantizer):
    def total(x):
        return jax_fp8.dequantize(jax_fp8.quantize(x, implementation=quantizer)).sum()

    with pytest.raises(NotImplementedError, match="quantize: .*jax.lax.stop_gradient"):
        jax.grad(total)(jnp.ones((2, 3)))


def test_the_advice_for_differentiation_works(quantizer):
    def total(x):
        q = jax_fp8.quantize(jax.lax.stop_gradient(x), implementation=quantizer)
        return (x * jax_fp8.dequantize(q)).sum()

    ref.assert_same_bits(jax.grad(total)(jnp.ones((2, 3))), np.ones((2, 3), np.float32))


@pytest.mark.parametrize("shape", [(), (5,), (2, 1, 3, 4)], ids=pair_id)
def test_dequantize_takes_what_quantize_gives(rng, shape):
    x = np.asarray(sample(rng, "normal", (1, *shape))[0])
    got = jax_fp8.dequantize(jax_fp8.quantize(x))
    np.testing.assert_allclose(got, x, rtol=0, atol=np.abs(x).max() / 16)  # Half of 1 / 2^3.


def test_dequantize_of_a_plain_array_raises():
    with pytest.raises(TypeError, match="dequantize: x must be a jax_fp8.ScaledArray"):
        jax_fp8.dequantize(jnp.ones((2, 3)))


def test_dequantize_to_another_dtype_raises(rng):
    with pytest.raises(TypeError, match="dequantize: dtype must be float32, .*got .*int8"):
        jax_fp8.dequantize(operand(rng, (2, 3)), jnp.int8)


def test_dequantize_checks_the_scale():
    x = scaled(jnp.ones((2, 3), jnp.float8_e4m3fn), jnp.ones((2, 3)), "row")
    with pytest.raises(ValueError, match=r"dequantize: x.scale of shape \(2, 3\) does not fit"):
        jax_fp8.dequantize(x)
