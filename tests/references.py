"""The operations in numpy and float64 over the same FP8 bytes, and how far results may be off.

Every tolerance of the tests comes from here; what is not rounded on the way is compared bitwise.
"""

import math

import jax
import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
FP8, WIDE = (E4M3, E5M2), (F32, BF16, F16)
BLOCKS = ((1, 128), (128, 128))
GRANULARITIES = ("tensor", "row", *BLOCKS)
SMALLEST_NORMAL = np.float32(2.0**-126)


def fp8_max(dtype):
    return np.float32(ml_dtypes.finfo(dtype).max)


def all_codes(dtype):
    return np.arange(256, dtype=np.uint8).view(dtype)


def finite_codes(dtype):
    codes = all_codes(dtype)
    return codes[np.isfinite(codes.astype(np.float32))]


def random_codes(rng, shape, dtype):
    return rng.choice(finite_codes(dtype), shape)


# --- Scales ---------------------------------------------------------------------------------------


def block_of(shape, granularity):
    """Rows and columns that share a scale, for an array of rank 2 or more."""
    whole = {"tensor": (None, shape[-1]), "row": (1, shape[-1])}
    return whole.get(granularity, granularity)


def scale_shape(shape, granularity):
    if granularity == "tensor":
        return (1,) * len(shape)
    rows, columns = block_of(shape, granularity)
    last = 1 if granularity == "row" else math.ceil(shape[-1] / columns)
    if rows == 1:
        return (*shape[:-1], last)
    return (*shape[:-2], math.ceil(shape[-2] / rows), last)


def expand(scale, shape, granularity):
    """Repeats a scale for each element that it belongs to."""
    scale = np.asarray(scale)
    if isinstance(granularity, tuple):
        scale = np.repeat(scale, granularity[1], axis=-1)[..., : shape[-1]]
        if granularity[0] > 1:
            scale = np.repeat(scale, granularity[0], axis=-2)[..., : shape[-2], :]
    return np.broadcast_to(scale, shape)


def amax(x, granularity):
    """The largest magnitude under each scale, NaN where there is a NaN, 0 of nothing."""
    x = np.abs(np.asarray(x).astype(np.float32))
    out = np.zeros(scale_shape(x.shape, granularity), np.float32)
    for index in np.ndindex(out.shape):
        if granularity == "tensor":
            part = x
        elif granularity == "row":
            part = x[index[:-1]]
        else:
            rows, columns = granularity
            part = x[index[:-2]] if rows > 1 else x[index[:-1]]
            part = part[..., index[-1] * columns : (index[-1] + 1) * columns]
            if rows > 1:
                part = part[index[-2] * rows : (index[-2] + 1) * rows]
        out[index] = part.max(initial=0)
    return out


def dynamic_scale(amax, dtype, power_of_two=False):
    scale = np.maximum(amax / fp8_max(dtype), SMALLEST_NORMAL)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)  # The mantissa of a power of two is 1/2.
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)
    return np.where(amax == 0, np.float32(1), np.where(np.isfinite(amax), scale, np.float32("nan")))


def inverse(scale):
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        reciprocal = np.float32(1) / scale
    return np.where(np.isfinite(scale) & np.isfinite(reciprocal), reciprocal, np.float32("nan"))


def round_saturate(x, factor, dtype):
    """``x * factor`` in float32, to nearest even, saturated; infinities become NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.clip(x * factor, -fp8_max(dtype), fp8_max(dtype)).astype(np.float32)
        return np.where(np.isinf(x), np.float32("nan"), scaled).astype(dtype)


def quantize(x, dtype, granularity, scale=None, power_of_two=False, bits=None):
    """The data and the scale that quantize must give, bit for bit; with bits, stochastically."""
    x = np.asarray(x).astype(np.float32)
    if scale is None:
        scale = dynamic_scale(amax(x, granularity), dtype, power_of_two)
    scale = np.asarray(scale, np.float32).reshape(scale_shape(x.shape, granularity))
    factor = expand(inverse(scale), x.shape, granularity)
    if bits is not None:
        return round_stochastic(x, factor, bits, dtype), scale
    return round_saturate(x, factor, dtype), scale


# --- Stochastic rounding --------------------------------------------------------------------------


def threefry(key, high, low):
    """Threefry-2x32 with 20 rounds, from the paper: Salmon et al., SC 2011."""
    key = [np.uint32(word) for word in key]
    key.append(np.uint32(0x1BD11BDA) ^ key[0] ^ key[1])
    a, b = (np.array(word, np.uint32, ndmin=1) for word in (high, low))
    with np.errstate(over="ignore"):
        a, b = a + key[0], b + key[1]
        for i in range(20):
            rotation = np.uint32((13, 15, 26, 6, 17, 29, 16, 24)[i % 8])
            a = a + b
            b = (b << rotation | b >> (np.uint32(32) - rotation)) ^ a
            if i % 4 == 3:
                step = i // 4 + 1
                a, b = a + key[step % 3], b + key[(step + 1) % 3] + np.uint32(step)
    return a, b


def random_bits(key, shape):
    """16 bits for each element: four in a row share a counter."""
    index = np.arange(math.prod(shape), dtype=np.uint64)
    counter = index // np.uint64(4)
    high, low = (counter >> np.uint64(32)), counter & np.uint64(0xFFFFFFFF)
    words = threefry(key, high.astype(np.uint32), low.astype(np.uint32))
    word = np.where(index & np.uint64(2), words[1], words[0])
    half = np.where(index & np.uint64(1), word >> np.uint32(16), word & np.uint32(0xFFFF))
    return half.astype(np.uint32).reshape(shape)


def round_stochastic(x, factor, bits, dtype):
    """Down to a multiple of the distance of codes, after 16 bits below it have been added."""
    info = ml_dtypes.finfo(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (x * factor).astype(np.float32)
        magnitude = np.minimum(np.abs(scaled), fp8_max(dtype))
        _, exponent = np.frexp(np.maximum(magnitude, np.float32(info.smallest_normal)))
        unit = np.ldexp(1.0, exponent - 1 - info.nmant)
        total = (magnitude / unit).astype(np.float32) + (bits * 2.0**-16).astype(np.float32)
        rounded = np.copysign(np.floor(total) * unit, scaled)
        return np.where(np.isinf(x) | np.isnan(scaled), np.nan, rounded).astype(dtype)


def values(x):
    """What a ScaledArray stands for, in float64."""
    data = np.asarray(x.data).astype(np.float64)
    return data * expand(np.asarray(x.scale, np.float64), data.shape, x.granularity)


# --- Fused producers ------------------------------------------------------------------------------

ROUNDING = 2.0**-24


def _norm(x, weight, bias, eps, roundings):
    """Values and what they may be off by, after so many roundings on top of each other in a sum."""
    mean, off = 0.0, 0.0
    if bias is not None:
        mean = x.mean(-1, keepdims=True)
        off = (roundings + 2) * ROUNDING * np.abs(x).mean(-1, keepdims=True)
    centered = x - mean
    variance = np.square(centered).mean(-1, keepdims=True) + eps
    factor = 1 / np.sqrt(variance)
    error = ((roundings / 2 + 8) * ROUNDING + off**2 / (2 * variance)) * np.abs(centered) + off
    error = error * factor * np.abs(weight)
    y = centered * factor * weight + (0.0 if bias is None else bias)
    return y, error + ROUNDING * (np.abs(y) + (0.0 if bias is None else np.abs(bias)))


def gated(x, exponent, up, roundings):
    """``x / (1 + exp(-exponent)) * up``; the exponent itself is off by some roundings."""
    gate = 1 / (1 + np.exp(-exponent))
    relative = (12 + roundings * np.abs(exponent)) * ROUNDING
    y = x * gate * up
    return y, relative * np.abs(y) + np.abs(x * up) * 2.0**-125


def fused(producer, x, weight=None, bias=None, eps=0.0, implementation=None):
    """The values of a producer in float64, and what those of an implementation may be off by.

    A kernel adds up a row in trees of 3, 5 and 5 levels with one addition for each 8192 columns
    in between, plain JAX in two steps of up to 128 and K / 128 additions; to these come the
    roundings of the squares and the mean.
    """
    x = np.asarray(x).astype(np.float64)
    columns = x.shape[-1]
    kernel = implementation == "kernel" or (implementation is None and on_gpu())
    roundings = 16 + columns / 8192 if kernel else 128 + columns / 128
    weight, bias = (
        None if vector is None else np.asarray(vector).astype(np.float64)
        for vector in (weight, bias)
    )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if producer.endswith("norm"):
            return _norm(x, weight, bias, eps, roundings)
        if producer == "swiglu":
            gate, up = np.split(x, 2, axis=-1)
            return gated(gate, gate, up, 4)
        two_z = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return gated(x, two_z, 1.0, 6)


def on_gpu():
    return jax.default_backend() == "gpu"


def assert_quantized(got, y, error, scale=None):
    """Holds codes and scales to what any values within ``error`` of ``y`` may become.

    Rounding and saturation are monotonic, so the code of a value lies between the codes of the
    ends; where these are the same, as nearly everywhere, it is compared bitwise.
    """
    assert got.shape == y.shape
    shape = scale_shape(y.shape, got.granularity)
    assert got.scale.shape == shape and got.scale.dtype == F32
    if scale is not None:
        assert_same_bits(got.scale, np.asarray(scale, np.float32).reshape(shape))
    else:
        largest, worst = (_largest(np.abs(a), got.granularity) for a in (y, error))
        expected = np.where(largest == 0, 1.0, largest / float(fp8_max(got.dtype)))
        allowed = (worst + 2 * ROUNDING * largest) / float(fp8_max(got.dtype))
        np.testing.assert_array_less(np.abs(got.scale - expected), allowed + 2.0**-126)
    factor = expand(inverse(np.asarray(got.scale)), y.shape, got.granularity).astype(np.float64)
    data = np.asarray(got.data).astype(np.float32)
    ends = []
    for sign in (-1, 1):
        end = (y + sign * error * np.sign(factor)) * factor
        end = end + sign * (2 * ROUNDING * np.abs(end) + 2.0**-149)
        largest = float(fp8_max(got.dtype))
        ends.append(np.clip(end, -largest, largest).astype(got.dtype).astype(np.float32))
    low, high = ends
    wrong = ~((low <= data) & (data <= high))
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} codes are wrong, first at {np.argwhere(wrong)[0]}:"
        f" {data[wrong][0]}, between {low[wrong][0]} and {high[wrong][0]} were right"
    )
    assert np.sum(low != high) <= max(4, 0.01 * y.size), "the bounds say too little here"


def _largest(x, granularity):
    """As amax, but in float64."""
    if granularity == "tensor":
        return np.max(x, keepdims=True, initial=0.0)
    columns = x.shape[-1] if granularity == "row" else granularity[1]
    if x.shape[-1] == 0:
        return np.zeros(scale_shape(x.shape, granularity))
    starts = np.arange(0, x.shape[-1], columns)
    return np.maximum.reduceat(x, starts, axis=-1)


# --- Products -------------------------------------------------------------------------------------


def activate(y, activation):
    if activation == "relu":
        return np.where(y < 0, 0.0, y)
    if activation == "gelu":
        return 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return y


def product(x, w, bias=None, activation=None):
    """``activation(x @ w.T + bias)`` in float64, and S: the sum of the magnitudes it is made of."""
    a, b = values(x), np.swapaxes(values(w), -1, -2)
    bias = 0.0 if bias is None else np.asarray(bias).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return activate(a @ b + bias, activation), np.abs(a) @ np.abs(b)


# What the sums may be off by, from the 13 fractional bits to which a Hopper tensor core aligns the
# products of a step, and, where it accumulates fast, its accumulator too.


def normal_error(expected, k, fast):
    """For near-normal data: of the root mean square of the whole result."""
    rms = np.sqrt(np.mean(np.square(expected)))
    return (8e-4 * math.sqrt(k) if fast else 2e-3) * rms * np.ones_like(expected)


def random_error(magnitudes, k, fast):
    """For random data with heavy tails or of one sign: of each element's S."""
    return (2e-3 + 2e-5 * k * fast) * magnitudes


def arbitrary_error(magnitudes):
    """For any data, accumulated precisely: one large product may hide 127 small ones."""
    return 2.0**-6 * magnitudes


def sum_error(magnitudes, k):
    """For float32 sums in any order, whose additions may cut off what they do not keep."""
    return (k + 8) * 2.0**-23 * magnitudes


def half_ulp(value, dtype):
    info = ml_dtypes.finfo(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(value), float(info.smallest_normal)))
    return np.ldexp(0.5, exponent - 1 - info.nmant)


def epilogue_error(sums, error, activation=None, bias=None, hardware_tanh=False):
    """``error`` after the bias and the activation, which round to float32 eight times at most.

    Scales and bias take one each; gelu, whose slope is below 1.13, the other six, of numbers up to
    the size of the bias and of the sum with it, ``sums``. The GPU's own tanh is off by up to 2^-11
    of its value (PTX ISA, tanh.approx.f32), and gelu multiplies it by half of the sum.
    """
    sums = np.abs(np.where(np.isfinite(sums), sums, 0.0))
    largest = sums + error
    if bias is not None:
        largest = largest + np.abs(np.asarray(bias).astype(np.float64))
    error = error + 8 * 2.0**-24 * largest
    if activation != "gelu":
        return error
    return 1.13 * error + hardware_tanh * 2.0**-12 * sums


def assert_close(actual, expected, error, dtype=None):
    """Holds ``error`` plus half an ulp of the output for each element; NaN and Inf must agree."""
    actual = np.asarray(actual)
    dtype = actual.dtype if dtype is None else dtype
    actual, expected = actual.astype(np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    error = np.broadcast_to(error, expected.shape)[finite]
    allowed = error + half_ulp(np.abs(expected[finite]) + error, dtype)
    off = np.abs(actual[finite] - expected[finite])
    worst = np.argmax(off - allowed) if off.size else 0
    assert np.all(off <= allowed), (
        f"{np.sum(~(off <= allowed))} of {off.size} elements are off by more than allowed; worst:"
        f" {actual[finite][worst]} for {expected[finite][worst]}, allowed {allowed[worst]}"
    )


def assert_same_bits(actual, expected):
    """Bitwise equality, where a NaN equals any NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    unsigned = np.dtype(f"u{actual.dtype.itemsize}")
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(actual.astype(np.float32)), nan)
    different = (actual.view(unsigned) != expected.view(unsigned)) & ~nan
    assert not different.any(), (
        f"{different.sum()} of {different.size} elements differ, first at"
        f" {np.argwhere(different)[0]}: {actual[different][0]} for {expected[different][0]}"
    )


def assert_same_trees(actual, expected):
    """Bitwise equality of all leaves of two trees."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)
