"""Runs every kernel once, on small and ragged shapes, and checks its numbers.

A program for compute-sanitizer, which makes kernels many times slower:

  compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py [WHAT ...]

WHAT is "quantize" or an implementation of the product; all of them if nothing is said. It exits
with 1 when a number is wrong. On a CPU it runs the loops of the host.
"""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import references as ref

import jax_fp8

# Vector loads and whole tiles with edges; single elements and nothing but edges.
QUANTIZE_SHAPES = ((2, 130, 264), (2, 3, 131))
PRODUCT_SHAPES = ((130, 136, 272), (33, 21, 45))  # M, N, K
SMALL_M_SHAPES = ((1, 136, 272), (16, 40, 1040), (20, 21, 16), (64, 50, 144))
GRANULARITIES = (("tensor", "tensor"), ("row", "row"), ("tensor", "row"), ref.BLOCKS)
BIASES = (None, ref.BF16, ref.F32, ref.F16)
ACTIVATIONS = (None, "relu", "gelu")

rng = np.random.default_rng(0)


def implementations():
    return (
        ("cublaslt", "small_m", "decode", "naive") if jax.default_backend() == "gpu" else ("naive",)
    )


# --- quantize -------------------------------------------------------------------------------------


def check_quantize(granularity):
    """All types of one granularity, dynamic and static, as one program."""
    variants = list(itertools.product(QUANTIZE_SHAPES, ref.WIDE, ref.FP8, (False, True)))
    inputs = []
    for shape, wide, _, static in variants:
        x = rng.standard_normal(shape).astype(wide)
        scale = np.exp(rng.standard_normal(ref.scale_shape(shape, granularity)) - 5)
        inputs.append((x, scale.astype(np.float32) if static else None))

    @jax.jit
    def run(inputs):
        return [
            jax_fp8.quantize(
                x,
                dtype=dtype,
                granularity=granularity,
                scale=scale,
                return_amax=True,
                implementation="kernel",
            )
            for (x, scale), (_, _, dtype, _) in zip(inputs, variants, strict=True)
        ]

    for (got, amax), (x, scale), (_, _, dtype, _) in zip(
        run(inputs), inputs, variants, strict=True
    ):
        data, want = ref.quantize(x, dtype, granularity, scale)
        ref.assert_same_bits(got.data, data)
        ref.assert_same_bits(got.scale, want)
        ref.assert_same_bits(amax, ref.amax(x, granularity))
    return len(variants)


# --- scaled_matmul --------------------------------------------------------------------------------


def scaled(data, scale, granularity):
    return jax_fp8.ScaledArray(jnp.asarray(data), jnp.asarray(scale), granularity)


def operand(shape, dtype, granularity):
    scale = np.exp(rng.standard_normal(ref.scale_shape(shape, granularity)))
    return scaled(ref.random_codes(rng, shape, dtype), scale.astype(np.float32), granularity)


def variants_of(implementation, pair):
    """Shapes, scales and results; the epilogues go around with them."""
    if implementation == "cublaslt" and pair == (ref.E5M2, ref.E5M2):
        return
    epilogues = itertools.cycle(itertools.product(BIASES, ACTIVATIONS))
    shapes = SMALL_M_SHAPES if implementation == "small_m" else PRODUCT_SHAPES
    for shape, granularities in itertools.product(shapes, GRANULARITIES):
        if implementation == "small_m" and granularities == ref.BLOCKS:
            continue
        # Any codes of E5M2 would leave the range of float16.
        outs = [out for out in (*ref.WIDE, *ref.FP8) if out != ref.F16 or ref.E5M2 not in pair]
        for out in outs:
            yield shape, granularities, out, *next(epilogues)


def check_product(implementation, pair):
    variants, inputs = list(variants_of(implementation, pair)), []
    for (m, n, k), (x_granularity, w_granularity), out, bias, _ in variants:
        x = operand((m, k), pair[0], x_granularity)
        w = operand((n, k), pair[1], w_granularity)
        if out == ref.F16:
            x = scaled(x.data, x.scale * 2.0**-12, x_granularity)
        inputs.append((x, w, None if bias is None else jnp.asarray(rng.standard_normal(n), bias)))

    @jax.jit
    def run(inputs):
        results = []
        for (x, w, bias), (_, _, out, _, activation) in zip(inputs, variants, strict=True):
            fp8 = {"output_scale": 4096.0, "return_amax": True} if out in ref.FP8 else {}
            results.append(
                jax_fp8.scaled_matmul(
                    x,
                    w,
                    bias=bias,
                    activation=activation,
                    preferred_element_type=out,
                    precision="highest",
                    implementation=implementation,
                    **fp8,
                )
            )
        return results

    for result, (x, w, bias), variant in zip(run(inputs), inputs, variants, strict=True):
        check_result(result, x, w, bias, variant[-1])
    return len(variants)


def check_result(result, x, w, bias, activation):
    expected, magnitudes = ref.product(x, w, bias, activation)
    sums, _ = ref.product(x, w, bias)
    error = ref.epilogue_error(sums, ref.arbitrary_error(magnitudes), activation, bias, True)
    if not isinstance(result, tuple):
        ref.assert_close(result, expected, error)
        return
    data, amax = result[0].data, float(result[1])
    largest = float(ref.fp8_max(data.dtype))
    error_of_data = error / 4096 + 2.0**-22 * np.abs(expected / 4096)
    ref.assert_close(data, np.clip(expected / 4096, -largest, largest), error_of_data)
    assert abs(amax - np.abs(expected).max()) <= error.max() + ref.half_ulp(amax, ref.F32)


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


def main(chosen):
    # Timing runs cublasLt in graphs, which compute-sanitizer seldom survives.
    jax_fp8.set_plan_choice("heuristic")
    unknown = set(chosen) - {"quantize", *implementations()}
    if unknown:
        print(f"unknown: {', '.join(unknown)}", file=sys.stderr)
        return 2
    groups = []
    if not chosen or "quantize" in chosen:
        groups = [(f"quantize {g}", check_quantize, (g,)) for g in ref.GRANULARITIES]
    for implementation in implementations():
        if chosen and implementation not in chosen:
            continue
        for pair in itertools.product(ref.FP8, ref.FP8):
            name = f"scaled_matmul {implementation} {pair[0]} x {pair[1]}"
            groups.append((name, check_product, (implementation, pair)))
        groups.append((f"scaled_matmul {implementation}, edges", check_edges, (implementation,)))
    wrong = 0
    for name, check, arguments in groups:
        try:
            outcome = f"{check(*arguments)} right"
        except AssertionError as error:
            wrong += 1
            outcome = f"WRONG: {error}"
        print(f"{name}: {outcome}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
