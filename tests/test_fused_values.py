"""The fused producers against float64, and the kernel against the definition in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import on_gpu, pair_id, sample

import jax_fp8

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]

PRODUCERS = ("rms_norm", "layer_norm", "swiglu", "gelu")
NORMS = PRODUCERS[:2]
GRANULARITIES = ("tensor", "row", (1, 128))
SPECIAL = [np.nan, np.inf, -np.inf]

producers = pytest.mark.parametrize("producer", PRODUCERS)
norms = pytest.mark.parametrize("producer", NORMS)
granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=pair_id)


def operands(rng, producer, shape, wide=ref.F32, kind="normal", weight_type=ref.F32):
    """x for a result of `shape`, and what else the producer takes."""
    columns = shape[-1] * (2 if producer == "swiglu" else 1)
    x = (2 * sample(rng, kind, (*shape[:-1], columns))).astype(wide)
    vectors = {"rms_norm": 1, "layer_norm": 2}.get(producer, 0)
    return x, *(sample(rng, "normal", shape[-1:]).astype(weight_type) for _ in range(vectors))


def call(producer, operands, **options):
    function = getattr(jax_fp8, f"{producer}_quantize")
    return function(*(jnp.asarray(operand) for operand in operands), **options)


def check(producer, operands, fuser, granularity="row", dtype=ref.E4M3, scale=None, eps=1e-5):
    options = {"eps": eps} if producer in NORMS else {}
    got = call(
        producer,
        operands,
        dtype=dtype,
        granularity=granularity,
        scale=scale,
        implementation=fuser,
        **options,
    )
    assert (got.dtype, got.granularity) == (dtype, granularity)
    y, error = ref.fused(producer, *operands, **options, implementation=fuser)
    ref.assert_quantized(got, y, error, scale)
    return got


# --- Values ---------------------------------------------------------------------------------------

SHAPE = (2, 5, 392)  # Aligned packs of 8, whole blocks and a partial one.


@producers
@granularities
@pytest.mark.parametrize(
    "wide, dtype",
    [(ref.BF16, ref.E4M3), (ref.F16, ref.E5M2), (ref.F32, ref.E4M3)],
    ids=pair_id,
)
def test_dynamic(fuser, rng, producer, granularity, wide, dtype):
    got = check(producer, operands(rng, producer, SHAPE, wide), fuser, granularity, dtype)
    assert np.abs(np.asarray(got.data).astype(np.float32)).max() == ref.fp8_max(dtype)


@producers
@granularities
@pytest.mark.parametrize("dtype", ref.FP8, ids=pair_id)
def test_static(fuser, rng, producer, granularity, dtype):
    # Some of the data saturates, and some of it is subnormal.
    scale = np.exp2(rng.uniform(-12, -6, ref.scale_shape(SHAPE, granularity))).astype(np.float32)
    scale[..., 0] *= -1
    data = operands(rng, producer, SHAPE, ref.BF16)
    check(producer, data, fuser, granularity, dtype, scale)


# Packs that are not whole, one column, rows shorter and longer than what a thread block holds,
# and those that the blocks share.
@producers
@granularities
@pytest.mark.parametrize(
    "shape",
    [(3, 5, 131), (1, 1), (17,), (2, 3000)]
    + on_gpu((7, 3), (300, 8), (3, 5001), (2, 4096), (3, 16384), (3, 16392), (2, 28672))
    + on_gpu((2, 100_000), (2, 33_001), (1, 14336), (2000, 264)),
    ids=pair_id,
)
def test_shapes(fuser, rng, producer, granularity, shape):
    wide = ref.BF16 if shape[-1] % 16 else ref.F32
    check(producer, operands(rng, producer, shape, wide), fuser, granularity)


@pytest.mark.gpu
@producers
@granularities
def test_more_rows_than_one_wave(rng, producer, granularity):
    for shape in ((9000, 1024), (40_000, 72)):
        check(producer, operands(rng, producer, shape, ref.BF16), "kernel", granularity)


@pytest.mark.gpu
@producers
@granularities
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("wide", [ref.BF16, ref.F16], ids=pair_id)
def test_rows_that_leave_nothing_over(rng, producer, granularity, static, wide):
    """For which there are kernels of their own, if all is of one type and the result E4M3."""
    for shape in ((600, 4096), (200, 14336)):
        data = operands(rng, producer, shape, wide, weight_type=wide)
        scale = None
        if static:
            scale = np.exp2(rng.uniform(-8, -4, ref.scale_shape(shape, granularity)))
            scale = scale.astype(np.float32)
        check(producer, data, "kernel", granularity, scale=scale)


@pytest.mark.gpu
@producers
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shape", [(9000, 2048), (5000, 2056), (3, 4000, 264)], ids=pair_id)
def test_tensor_scales_of_more_rows_than_stay_on_the_chip(rng, producer, residual, shape):
    """The same bits as with the scale given, which is the largest of the rows' own."""
    if residual and producer not in NORMS:
        pytest.skip("norms alone have a residual")
    data = [jnp.asarray(a) for a in operands(rng, producer, shape, ref.BF16, weight_type=ref.BF16)]
    added = data[0][..., ::-1] if residual else None

    def run(x, added, **options):
        if added is not None:
            options["residual"] = added
        result = call(producer, (x, *data[1:]), implementation="kernel", **options)
        return result if added is not None else (result, None)

    def each(granularity):
        one = functools.partial(run, granularity=granularity)
        return (jax.vmap(one) if len(shape) == 3 else one)(data[0], added)

    (tensor, total), (rows, _) = each("tensor"), each("row")
    ref.assert_same_bits(tensor.scale, jnp.max(rows.scale, axis=(-2, -1), keepdims=True))
    for entry in np.ndindex(shape[:-2]):
        given = None if added is None else added[entry]
        again, again_total = run(data[0][entry], given, scale=tensor.scale[entry])
        ref.assert_same_bits(tensor.data[entry], again.data)
        if residual:
            ref.assert_same_bits(total[entry], again_total)
            ref.assert_same_bits(total[entry], data[0][entry] + given)


@pytest.mark.gpu
@pytest.mark.parametrize("largest", [0.0, 0.1, 0.2, 0.3, 5.0, np.inf, np.nan])
@pytest.mark.parametrize("smallest", [-0.1, -0.75, -9.0, -np.inf, -np.nan])
def test_the_largest_of_a_gelu_may_be_of_a_negative_value(rng, largest, smallest):
    """A tensor that is read twice, of whose values above zero only the largest is asked."""
    low = smallest if np.isfinite(smallest) else -9.0
    x = rng.uniform(low, largest if np.isfinite(largest) else 5.0, (2048, 4096))
    x[1234, 567], x[765, 224] = largest, smallest
    x = jnp.asarray(x, ref.BF16)
    tensor, rows = (
        jax_fp8.gelu_quantize(x, granularity=granularity, implementation="kernel")
        for granularity in ("tensor", "row")
    )
    ref.assert_same_bits(tensor.scale, jnp.max(rows.scale, axis=(-2, -1), keepdims=True))
    again = jax_fp8.gelu_quantize(x, scale=tensor.scale, implementation="kernel")
    ref.assert_same_bits(tensor.data, again.data)


@norms
@pytest.mark.parametrize("weight_type", ref.WIDE, ids=pair_id)
@pytest.mark.parametrize("wide", ref.WIDE, ids=pair_id)
def test_weights_of_every_type(fuser, rng, producer, weight_type, wide):
    for columns in (40, 131):
        data = operands(rng, producer, (5, columns), wide, weight_type=weight_type)
        check(producer, data, fuser)


@producers
def test_heavy_tails(fuser, rng, producer):
    check(producer, operands(rng, producer, SHAPE, kind="heavy"), fuser)


@norms
@pytest.mark.parametrize("eps", [0.0, 1e-6, 3.0])
def test_eps(fuser, rng, producer, eps):
    check(producer, operands(rng, producer, (5, 64)), fuser, eps=eps)


def test_a_mean_that_is_far_off(fuser, rng):
    x, weight, bias = operands(rng, "layer_norm", (4, 520))
    check("layer_norm", (x + 10, weight, bias), fuser)


@pytest.mark.parametrize("producer", ["swiglu", "gelu"])
def test_the_ends_of_the_gate(fuser, producer):
    x = np.float32([[-3e38, -1000.0, -200.0, -80.0, -9.0, -5.0, -1e-3, -0.0]])
    x = np.concatenate([x, -x], axis=-1)
    if producer == "swiglu":
        x = np.concatenate([x, np.full_like(x, 0.5)], axis=-1)
    got = check(producer, (x,), fuser, scale=np.full((1, 1), 2.0**-9, np.float32))
    data = np.asarray(got.data).astype(np.float32)[0]
    assert data[0] == 0 and data[8] == 448


@pytest.mark.gpu
@producers
@granularities
@pytest.mark.parametrize("implementation", ["xla", None])
def test_plain_jax_and_the_default_on_a_gpu(rng, producer, granularity, implementation):
    check(producer, operands(rng, producer, SHAPE, ref.BF16), implementation, granularity)


# --- Residual -------------------------------------------------------------------------------------


@norms
@granularities
@pytest.mark.parametrize("columns", [264, 131, *on_gpu(20_000)])
@pytest.mark.parametrize("wide", ref.WIDE, ids=pair_id)
def test_a_residual_is_added_and_rounded_first(fuser, rng, producer, granularity, columns, wide):
    data = operands(rng, producer, (6, columns), wide)
    residual = sample(rng, "normal", (6, columns)).astype(wide)
    options = {"granularity": granularity, "implementation": fuser}
    got, total = call(producer, data, residual=residual, **options)
    want = (data[0].astype(np.float32) + residual.astype(np.float32)).astype(wide)
    ref.assert_same_bits(total, want)
    # The same kernel on the sum, which has been rounded: the same bits.
    ref.assert_same_trees(got, call(producer, (want, *data[1:]), **options))
    y, error = ref.fused(producer, want, *data[1:], eps=1e-6, implementation=fuser)
    ref.assert_quantized(got, y, error)


@norms
def test_a_sum_beyond_the_range_of_its_type(fuser, producer):
    x = np.full((2, 64), 60000, np.float16)
    x[1] = 1
    rest = [np.ones(64, np.float32)] * (2 if producer == "layer_norm" else 1)
    got, total = call(producer, (x, *rest), residual=x, granularity="row", implementation=fuser)
    assert np.isinf(np.asarray(total)[0]).all()
    data = np.asarray(got.data).astype(np.float32)
    assert np.isnan(data[0]).all() and np.isfinite(data[1]).all()


# --- Zero, NaN, Inf -------------------------------------------------------------------------------


def group_of(shape, granularity, index):
    numbers = np.arange(np.prod(ref.scale_shape(shape, granularity)))
    groups = ref.expand(numbers.reshape(ref.scale_shape(shape, granularity)), shape, granularity)
    return groups == groups[index]


@producers
@granularities
@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize("columns", [131, *on_gpu(264, 16_392)])
def test_nothing_that_is_not_finite_becomes_finite(
    fuser, rng, producer, granularity, value, columns
):
    shape = (4, 3, columns)
    x, *rest = operands(rng, producer, shape)
    x[1, 2, 130] = value
    own = np.zeros(shape, bool)
    own[(1, 2, slice(None) if producer in NORMS else 130)] = True
    for static in (False, True):
        scale = np.full(ref.scale_shape(shape, granularity), 0.01, np.float32) if static else None
        got = call(
            producer,
            (x, *rest),
            granularity=granularity,
            scale=scale,
            implementation=fuser,
        )
        wrong = np.isnan(np.asarray(got.data).astype(np.float32))
        expected = own
        if not static:
            scales = ref.expand(np.asarray(got.scale), shape, granularity)
            np.testing.assert_array_equal(wrong, np.isnan(scales))
            expected = group_of(shape, granularity, (1, 2, 130))
            if producer in NORMS:
                expected = expected | own
        np.testing.assert_array_equal(wrong, expected)


@norms
def test_a_sum_of_squares_that_overflows_is_nan_and_not_zero(fuser, rng, producer):
    x, *rest = operands(rng, producer, (3, 264))
    x[1] *= 1e20
    got = call(producer, (x, *rest), granularity="row", implementation=fuser)
    data = np.asarray(got.data).astype(np.float32)
    assert np.isnan(data[1]).all() and np.isfinite(data[[0, 2]]).all()


def test_a_product_that_overflows_is_nan_and_not_the_largest_code(fuser):
    x = np.float32([[3e38, 1.0, 3e38, 1.0]])
    data = call("swiglu", (x,), scale=1.0, implementation=fuser).data
    np.testing.assert_array_equal(np.isnan(np.asarray(data).astype(np.float32)), [[True, False]])


@pytest.mark.parametrize("value", [0.0, 1e-39, *SPECIAL], ids=str)
@producers
def test_a_static_scale_without_a_reciprocal_gives_nan(fuser, rng, producer, value):
    data = operands(rng, producer, (3, 40))
    scale = np.float32([[0.5], [value], [0.5]])
    got = call(producer, data, granularity="row", scale=scale, implementation=fuser)
    wrong = np.isnan(np.asarray(got.data).astype(np.float32))
    np.testing.assert_array_equal(wrong, np.broadcast_to([[False], [True], [False]], (3, 40)))


@producers
@granularities
def test_zeros_have_the_scale_one(fuser, producer, granularity):
    columns = 264 * (2 if producer == "swiglu" else 1)
    rest = {"rms_norm": [np.ones(264)], "layer_norm": [np.ones(264), np.zeros(264)]}
    data = (np.zeros((3, columns), np.float32), *rest.get(producer, []))
    got = call(producer, data, granularity=granularity, implementation=fuser)
    assert np.all(np.asarray(got.scale) == 1)
    assert np.all(np.asarray(got.data).astype(np.float32) == 0)


# --- The kernel alone -----------------------------------------------------------------------------


@pytest.mark.gpu
@producers
@granularities
def test_any_address(rng, producer, granularity):
    """Slices that XLA hands over where they are: the bits depend on no alignment."""
    parts = 2 if producer == "swiglu" else 1
    x, *rest = operands(rng, producer, (8, 264), ref.BF16, weight_type=ref.BF16)
    options = {"granularity": granularity, "implementation": "kernel"}
    want = call(producer, (x, *rest), **options)

    @jax.jit
    def sliced(buffer, offset):
        x = jax.lax.dynamic_slice(buffer, (offset,), (8 * 264 * parts,)).reshape(8, 264 * parts)
        return call(producer, (x, *rest), **options)

    for offset in (0, 1, 3, 8):
        buffer = jnp.concatenate([jnp.zeros(offset, jnp.bfloat16), jnp.asarray(x).ravel()])
        ref.assert_same_trees(sliced(buffer, offset), want)


@pytest.mark.gpu
@norms
def test_a_row_is_the_same_whatever_other_rows_there_are(rng, producer):
    for columns in (131, 1000, 4096, 14336, 20_000):
        data = operands(rng, producer, (700, columns), ref.BF16)
        options = {"granularity": "row", "implementation": "kernel"}
        many = call(producer, data, **options)
        for rows in (1, 5):
            few = call(producer, (data[0][-rows:], *data[1:]), **options)
            ref.assert_same_bits(many.data[-rows:], few.data)
            ref.assert_same_bits(many.scale[-rows:], few.scale)


@pytest.mark.gpu
@producers
@granularities
def test_the_same_bits_every_time(rng, producer, granularity):
    data = operands(rng, producer, (3000, 1032), ref.BF16)
    runs = [
        call(producer, data, granularity=granularity, implementation="kernel") for _ in range(5)
    ]
    for run in runs[1:]:
        ref.assert_same_trees(run, runs[0])
