"""Runs every kernel once, on small and ragged shapes, and checks its numbers.

A program for compute-sanitizer, which makes kernels many times slower:

  compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py [WHAT ...]

WHAT is "quantize", "cast_transpose", "fused", "fused_matmul" (which has chains of few rows too),
"many_rows" (in chains) or an implementation of the product; all of them if nothing is said. With
--part I/N it runs every Nth check, from the Ith on, so that N processes share them.
It exits with 1 when a number is wrong. On a CPU it runs the loops of the host.
"""

import argparse
import itertools
import sys

import jax
import numpy as np
import references as ref
from sanitize_fused import (
    check_fused,
    check_fused_chain,
    check_fused_matmul,
    check_many_rows,
    check_up_and_down,
)
from sanitize_products import check_edges, check_product, check_wide

import jax_fp8
from jax_fp8._src import ffi

# Vector loads and whole tiles with edges; single elements and nothing but edges.
QUANTIZE_SHAPES = ((2, 130, 264), (2, 3, 131))
# Rows of several thread blocks; tensors of all blocks of the device, aligned and not.
LONG_SHAPES = {"row": ((20, 40_008),), "tensor": ((600, 456), (547, 501))}
LARGEST_TENSOR = (3000, 4100)  # For which a thread's registers are too few.
# Of chains: rows, the columns of a SwiGLU's result, K. Some are quantized by clusters.
FEW, MANY = ((1, 48, 144), (12, 8192, 272), (2, 8208, 16)), ((40, 48, 144), (300, 8752, 272))
RECIPES = ("rowwise", "static")

rng = np.random.default_rng(0)


def implementations():
    return (
        ("cublaslt", "small_m", "decode", "naive") if jax.default_backend() == "gpu" else ("naive",)
    )


# --- quantize -------------------------------------------------------------------------------------


def check_quantize(granularity):
    """All types of one granularity, dynamic and static, as one program."""
    shapes = QUANTIZE_SHAPES + LONG_SHAPES.get(granularity, ())
    variants = list(itertools.product(shapes, ref.WIDE, ref.FP8, (False, True)))
    if granularity == "tensor":
        variants.append((LARGEST_TENSOR, ref.BF16, ref.E4M3, False))
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


# --- cast_transpose -------------------------------------------------------------------------------

# Edges of tiles in vectors on either side; single bytes; words of four; more than a band of tiles.
CAST_SHAPES = ((2, 130, 264), (144, 264), (2, 3, 131), (132, 61), (1300, 136))
# Of more tiles than run at once, for scales that all of them wait for.
MANY_TILES = (1700, 5384)
KEY = np.array([1, 2], np.uint32)


def check_cast_transpose(granularity):
    """All types of one granularity, rounded both ways, as one program."""
    modes = ["dynamic", "stochastic", "transposed", *["static"] * (granularity == "tensor")]
    variants = list(itertools.product(CAST_SHAPES, ref.WIDE, modes))
    formats = itertools.cycle(ref.FP8)
    variants = [(*variant, next(formats)) for variant in variants]
    if granularity in ("tensor", "row"):
        variants += [(MANY_TILES, ref.BF16, "dynamic", dtype) for dtype in ref.FP8]
    xs = [rng.standard_normal(shape).astype(wide) for shape, wide, _, _ in variants]

    @jax.jit
    def run(xs):
        return [
            jax_fp8.cast_transpose(
                x,
                dtype=dtype,
                granularity=granularity,
                scale=0.01 if mode == "static" else None,
                power_of_two=mode == "transposed",
                key=KEY if mode == "stochastic" else None,
                straight=mode != "transposed",
                return_amax=granularity == "tensor",
                implementation="kernel",
            )
            for x, (_, _, mode, dtype) in zip(xs, variants, strict=True)
        ]

    for (straight, transposed, *amax), x, (_, _, mode, dtype) in zip(
        run(xs), xs, variants, strict=True
    ):
        scale = np.float32(0.01) if mode == "static" else None
        bits = ref.random_bits(KEY, x.shape) if mode == "stochastic" else None
        for layout, turn in ((straight, np.asarray), (transposed, lambda a: a.swapaxes(-1, -2))):
            if layout is None:
                continue
            data, want = ref.quantize(
                turn(x),
                dtype,
                granularity,
                scale,
                mode == "transposed",
                None if bits is None else turn(bits),
            )
            ref.assert_same_bits(layout.data, data)
            ref.assert_same_bits(layout.scale, want)
        if amax:
            ref.assert_same_bits(amax[0], ref.amax(x, granularity))
    return len(variants)


def check_known_amaxes():
    """Row scales in two calls, as where rows are spread over devices."""
    variants = list(itertools.product(CAST_SHAPES, ref.WIDE))
    xs = [rng.standard_normal(shape).astype(wide) for shape, wide in variants]

    @jax.jit
    def run(xs):
        found = []
        for x in xs:
            shape = (1,) * (3 - x.ndim) + x.shape
            batch, rows, columns = shape
            x = x.reshape(shape)
            scales = ((batch, rows, 1), (batch, columns, 1))
            found.append(
                ffi.cast_transpose(
                    *(x, None, None),
                    entries=batch,
                    dtype=ref.E4M3,
                    block=(1, 0),
                    scale_shapes=scales,
                    layouts=(True, True),
                    power_of_two=False,
                    amax=False,
                    known=ffi.line_amaxes(x),
                )
            )
        return found

    for (straight, transposed, scale, turned_scale, _), x in zip(run(xs), xs, strict=True):
        for data, of_data, values in (
            (straight, scale, x),
            (transposed, turned_scale, x.swapaxes(-1, -2)),
        ):
            want, want_scale = ref.quantize(values, ref.E4M3, "row")
            ref.assert_same_bits(data.reshape(want.shape), want)
            ref.assert_same_bits(of_data.reshape(want_scale.shape), want_scale)
    return len(variants)


def part(text):
    first, count = (int(number) for number in text.split("/"))
    if not 1 <= first <= count:
        raise ValueError(text)
    return slice(first - 1, None, count)


def main():
    known = ("quantize", "cast_transpose", "fused", "fused_matmul", "many_rows", *implementations())
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", metavar="WHAT", help=", ".join(known))
    parser.add_argument("--part", type=part, default="1/1", metavar="I/N")
    arguments = parser.parse_args()
    chosen = arguments.what
    if not set(chosen) <= set(known):
        parser.error(f"WHAT is among {', '.join(known)}, got {', '.join(chosen)}")
    # Timing runs cublasLt in graphs, which compute-sanitizer seldom survives.
    jax_fp8.set_plan_choice("heuristic")
    groups = []
    if not chosen or "quantize" in chosen:
        groups = [(f"quantize {g}", check_quantize, (g,)) for g in ref.GRANULARITIES]
    if not chosen or "cast_transpose" in chosen:
        groups += [(f"cast_transpose {g}", check_cast_transpose, (g,)) for g in ref.GRANULARITIES]
        groups.append(("cast_transpose, known amaxes", check_known_amaxes, ()))
    if not chosen or "fused" in chosen:
        producers = ("rms_norm", "layer_norm", "swiglu", "gelu")
        groups += [(f"{p}_quantize", check_fused, (p,)) for p in producers]
    if not chosen or "fused_matmul" in chosen:
        for recipe, in_steps in itertools.product(("weight_only", "rowwise"), (False, True)):
            said = f"fused_matmul {recipe}{', in steps' if in_steps else ''}"
            groups.append((said, check_fused_matmul, (in_steps, recipe)))
        for recipe in ("weight_only", "rowwise"):
            groups.append((f"fused_chain {recipe}", check_fused_chain, (recipe,)))
        groups.append(("fused_matmul, many rows", check_many_rows, ()))
        groups += [(f"fused_chain {r}, few rows", check_up_and_down, (r, FEW)) for r in RECIPES]
    if not chosen or "many_rows" in chosen:
        groups += [(f"fused_chain {r}, many rows", check_up_and_down, (r, MANY)) for r in RECIPES]
    for implementation in implementations():
        if chosen and implementation not in chosen:
            continue
        for pair in itertools.product((*ref.FP8, ref.BF16, ref.F16), ref.FP8):
            name = f"scaled_matmul {implementation} {pair[0]} x {pair[1]}"
            groups.append((name, check_product, (implementation, pair)))
        for wide in (ref.BF16, ref.F16) if implementation != "cublaslt" else ():
            name = f"matmul {implementation} {wide.name}, weight_only"
            groups.append((name, check_wide, (implementation, wide)))
        groups.append((f"scaled_matmul {implementation}, edges", check_edges, (implementation,)))
    wrong = 0
    for name, check, of_check in groups[arguments.part]:
        try:
            outcome = f"{check(*of_check)} right"
        except AssertionError as error:
            wrong += 1
            outcome = f"WRONG: {error}"
        print(f"{name}: {outcome}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
