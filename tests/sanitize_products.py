"""Products of every implementation, for sanitize.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import references as ref

import jax_fp8

PRODUCT_SHAPES = ((130, 136, 272), (33, 21, 45))  # M, N, K
SMALL_M_SHAPES = (
    *((1, 136, 272), (7, 40, 1040), (16, 40, 1040), (20, 21, 16), (64, 50, 144)),
    *((3, 8500, 144), (12, 8500, 144), (17, 8500, 144)),  # Three tiles for some blocks.
    *((2, 2200, 16400), (9, 2200, 16400), (2, 40, 65552)),  # On Hopper, X in parts.
    *((2, 40, 27664), (16, 40, 20496), (20, 40, 8208)),  # Several blocks share K.
)
# Ragged, and then such as take tiles of other sizes in the Hopper kernel.
WIDE_SHAPES = (
    *PRODUCT_SHAPES,
    (260, 8200, 80),
    (120, 24584, 80),
    (257, 4104, 144),
    (60, 24584, 80),
    (100, 4200, 80),
)
GRANULARITIES = (("tensor", "tensor"), ("row", "row"), ("tensor", "row"), ref.BLOCKS)
BIASES = (None, ref.BF16, ref.F32, ref.F16)
ACTIVATIONS = (None, "relu", "gelu")
OUTPUT_SCALE = 2.0**-4

rng = np.random.default_rng(0)


def scaled(data, scale, granularity):
    return jax_fp8.ScaledArray(jnp.asarray(data), jnp.asarray(scale), granularity)


def operand(shape, dtype, granularity):
    if dtype not in ref.FP8:  # As the reference takes a wide x; the library takes its data.
        return scaled(
            rng.standard_normal(shape).astype(dtype), np.ones((1, 1), np.float32), "tensor"
        )
    scale = np.exp(rng.standard_normal(ref.scale_shape(shape, granularity)))
    return scaled(ref.random_codes(rng, shape, dtype), scale.astype(np.float32), granularity)


def variants_of(implementation, pair):
    """Shapes, scales and results; the epilogues go around with them."""
    wide = pair[0] not in ref.FP8
    if implementation == "cublaslt" and (wide or pair == (ref.E5M2, ref.E5M2)):
        return
    epilogues = itertools.cycle(itertools.product(BIASES, ACTIVATIONS))
    combinations = tuple(("tensor", g) for g in ref.GRANULARITIES) if wide else GRANULARITIES
    shapes = SMALL_M_SHAPES if implementation == "small_m" else PRODUCT_SHAPES
    for shape, granularities in itertools.product(shapes, combinations):
        if implementation == "small_m" and any(isinstance(one, tuple) for one in granularities):
            continue
        # Any codes of E5M2 would leave the range of float16.
        outs = [out for out in (*ref.WIDE, *ref.FP8) if out != ref.F16 or ref.E5M2 not in pair]
        for out in outs:
            yield shape, granularities, out, *next(epilogues)


def check_product(implementation, pair):
    variants = list(variants_of(implementation, pair))

    # What the results of a shape share: of large weights the making takes longer than all else.
    @functools.cache
    def operands(shape, granularities):
        m, n, k = shape
        w = operand((n, k), pair[1], granularities[1])
        # So that the sums are inside of float16's range.
        w = scaled(w.data, w.scale * 2.0**-16, granularities[1])
        return operand((m, k), pair[0], granularities[0]), w

    sums = functools.cache(lambda *of: ref.product(*operands(*of)))
    biases = [
        None if bias is None else jnp.asarray(rng.standard_normal(shape[1]), bias)
        for shape, _, _, bias, _ in variants
    ]

    @jax.jit
    def run(inputs, biases):
        results = []
        for (x, w), bias, (_, _, out, _, activation) in zip(inputs, biases, variants, strict=True):
            fp8 = {"output_scale": OUTPUT_SCALE, "return_amax": True} if out in ref.FP8 else {}
            options = {
                "bias": bias,
                "activation": activation,
                "preferred_element_type": out,
                "precision": "highest",
                "implementation": implementation,
                **fp8,
            }
            if pair[0] in ref.FP8:
                results.append(jax_fp8.scaled_matmul(x, w, **options))
            else:
                results.append(jax_fp8.matmul(x.data, w, recipe="weight_only", **options))
        return results

    results = run([operands(*variant[:2]) for variant in variants], biases)
    for result, bias, variant in zip(results, biases, variants, strict=True):
        check_result(result, *sums(*variant[:2]), bias, variant[-1])
    return len(variants)


def check_result(result, sums, magnitudes, bias, activation):
    """Sums are those of the operands, without the bias."""
    added = 0.0 if bias is None else np.asarray(bias).astype(np.float64)
    expected = ref.activate(sums + added, activation)
    error = ref.epilogue_error(sums, ref.arbitrary_error(magnitudes), activation, bias, True)
    if not isinstance(result, tuple):
        ref.assert_close(result, expected, error)
        return
    data, amax = result[0].data, float(result[1])
    largest = float(ref.fp8_max(data.dtype))
    divided = expected / OUTPUT_SCALE
    error_of_data = error / OUTPUT_SCALE + 2.0**-22 * np.abs(divided)
    ref.assert_close(data, np.clip(divided, -largest, largest), error_of_data)
    assert abs(amax - np.abs(expected).max()) <= error.max() + ref.half_ulp(amax, ref.F32)


def check_wide(implementation, wide):
    """16-bit activations."""
    shapes = SMALL_M_SHAPES if implementation == "small_m" else WIDE_SHAPES
    epilogues = itertools.cycle(itertools.product(BIASES, ACTIVATIONS, (ref.F32, wide)))
    variants = [
        (operand((n, k), dtype, "row"), rng.standard_normal((m, k)).astype(wide), *next(epilogues))
        for (m, n, k), dtype in itertools.product(shapes, ref.FP8)
    ]
    for w, x, bias, activation, out in variants:
        bias = None if bias is None else jnp.asarray(rng.standard_normal(w.shape[0]), bias)
        w = scaled(w.data, w.scale * 2.0**-12, "row")  # Inside of float16's range.
        result = jax_fp8.matmul(
            x,
            w,
            recipe="weight_only",
            bias=bias,
            activation=activation,
            preferred_element_type=out,
            implementation=implementation,
        )
        as_operand = scaled(x, np.ones((1, 1), np.float32), "tensor")
        check_result(result, *ref.product(as_operand, w), bias, activation)
    return len(variants)


def check_edges(implementation):
    """Nothing to contract, nothing at all, an FP8 result that is infinite, a batch."""

    def full(shape, scale):
        return scaled(np.full(shape, 448, ref.E4M3), np.full((1, 1), scale, np.float32), "tensor")

    batch_x, batch_w = operand((3, 5, 48), ref.E4M3, "row"), operand((3, 24, 48), ref.E4M3, "row")
    fp8 = {"preferred_element_type": ref.E4M3, "output_scale": 1.0, "return_amax": True}

    @jax.jit
    def run():
        def multiply(x, w, **options):
            return jax_fp8.scaled_matmul(x, w, implementation=implementation, **options)

        return (
            multiply(full((5, 0), 1.0), full((16, 0), 1.0), bias=jnp.ones(16)),
            multiply(full((0, 32), 1.0), full((16, 32), 1.0), **fp8),
            multiply(full((5, 32), 1e38), full((16, 32), 1.0), **fp8),
            multiply(batch_x, batch_w, preferred_element_type=jnp.float32, precision="highest"),
        )

    bias_alone, empty, infinite, batch = run()
    np.testing.assert_array_equal(bias_alone, np.ones((5, 16)))
    assert empty[0].shape == (0, 16) and float(empty[1]) == 0
    assert np.isnan(np.asarray(infinite[0].data).astype(np.float32)).all()
    assert np.isinf(infinite[1])
    expected, magnitudes = ref.product(batch_x, batch_w)
    ref.assert_close(batch, expected, ref.arbitrary_error(magnitudes))
    return 4
