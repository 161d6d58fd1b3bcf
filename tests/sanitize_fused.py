"""The fused producers, and products with what stands around them, for sanitize.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import references as ref
from around_cases import ALL, COMBINATIONS, EPS, expected, operands, quantized

import jax_fp8
from jax_fp8._src import scaled_matmul as products

AROUND_SHAPES = ((1, 136, 272), (3, 8500, 144), (7, 40, 1040))
#: X comes in parts in the last ones.
AROUND_SHAPES_QUANTIZED = (
    (1, 136, 272),  # Which the product quantizes.
    (16, 136, 272),
    (3, 8500, 144),
    (12, 40, 12304),
    (9, 40, 20496),
)

rng = np.random.default_rng(0)


# --- The fused producers --------------------------------------------------------------------------

# Vector loads with whole and partial blocks; columns that leave packs partial; rows longer than a
# thread block holds; and those that leave nothing over.
FUSED_SHAPES = ((300, 264), (3, 131), (2, 16_520), (2, 16_384))
# More rows than run at once, for a scale that all of them wait for.
MANY_ROWS = (1300, 4096)


def check_fused(producer):
    """All types and granularities of one producer, dynamic and static, as one program."""
    granularities = [g for g in ref.GRANULARITIES if g != (128, 128)]
    variants = list(itertools.product(FUSED_SHAPES, ref.WIDE, granularities, (False, True)))
    formats = itertools.cycle(ref.FP8)
    variants = [(*variant, next(formats)) for variant in variants]
    variants.append((MANY_ROWS, ref.BF16, "tensor", False, jnp.float8_e4m3fn))
    inputs, norm = [], producer.endswith("norm")
    for shape, wide, granularity, static, _ in variants:
        columns = shape[1] * (2 if producer == "swiglu" else 1)
        x, residual = (rng.standard_normal((shape[0], columns)).astype(wide) for _ in range(2))
        vectors = [rng.standard_normal(columns).astype(wide) for _ in range(2)]
        scale = np.exp(rng.standard_normal(ref.scale_shape(shape, granularity)) - 4)
        inputs.append((x, residual, vectors, scale.astype(np.float32) if static else None))
    count = {"rms_norm": 1, "layer_norm": 2}.get(producer, 0)
    function = getattr(jax_fp8, f"{producer}_quantize")

    @jax.jit
    def run(inputs):
        results = []
        for (x, residual, vectors, scale), (*_, granularity, _, dtype) in zip(
            inputs, variants, strict=True
        ):
            options = {"dtype": dtype, "granularity": granularity, "scale": scale}
            options["implementation"] = "kernel"
            plain = function(x, *vectors[:count], **options)
            added = function(x, *vectors[:count], residual=residual, **options) if norm else None
            results.append((plain, added))
        return results

    for (plain, added), (x, residual, vectors, scale) in zip(run(inputs), inputs, strict=True):
        options = {"eps": 1e-6, "implementation": "kernel"}
        y, error = ref.fused(producer, x, *vectors[:count], **options)
        ref.assert_quantized(plain, y, error, scale)
        if norm:
            total = (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
            ref.assert_same_bits(added[1], total)
            y, error = ref.fused(producer, total, *vectors[:count], **options)
            ref.assert_quantized(added[0], y, error, scale)
    return len(variants) * (1 + norm)


def check_fused_matmul(in_steps, recipe):
    """All that may stand around a product, in one kernel or two or, as on other GPUs, in steps."""
    shapes = AROUND_SHAPES if recipe == "weight_only" else AROUND_SHAPES_QUANTIZED
    cases = list(itertools.product(COMBINATIONS, shapes))
    products._forced_capability = 80 if in_steps else 0
    try:
        for parts, (m, n, k) in cases:
            x, w, around = operands(rng, m, n, k, parts)
            got = jax_fp8.fused_matmul(x, w, eps=EPS, recipe=recipe, **around)
            multiplied = None if recipe == "weight_only" else quantized(x, around.get("norm"))
            first = not in_steps and jax.default_backend() == "gpu"
            ref.assert_close(got, *expected(x, w, first=first, multiplied=multiplied, **around))
    finally:
        products._forced_capability = 0
    return len(cases)


def check_fused_chain(recipe):
    """The bits of separate calls. A product starts early beside a kernel of one block, and many."""
    shapes = ((1, 48, 272), (8, 5456, 144), (3, 16, 40_000))
    options = {"recipe": recipe, "implementation": "kernel"}
    for m, n, k in shapes:
        x, w, around = operands(rng, m, n, k, ("residual",))
        _, up, norm = operands(rng, m, 2 * n, n, ("norm", "swiglu"))
        _, same, _ = operands(rng, m, n, n, ())
        first = jax_fp8.ChainLink(w, **around)
        links = [first, jax_fp8.ChainLink(up, **norm), jax_fp8.ChainLink(same, residual=0)]
        found = jax_fp8.fused_chain(x, links, **options)
        apart = jax_fp8.fused_chain(x, links, one_call=False, **options)
        for got, want in zip(found, apart, strict=True):
            ref.assert_same_bits(got, want)
    return len(shapes)


def check_many_rows():
    """Also more tiles than run at once."""
    shapes = ((40, 48, 144), (300, 8752, 272))
    for m, n, k in shapes:
        for parts in ((), ("swiglu", "bias"), ("residual",), ALL):
            x, w, around = operands(rng, m, n, k, parts)
            options = {"recipe": "rowwise", "implementation": "kernel"}
            got = jax_fp8.fused_matmul(x, w, eps=EPS, **around, **options)
            multiplied = quantized(x, around.get("norm"))
            bounds = expected(x, w, multiplied=multiplied, is_rounded=True, **around)
            ref.assert_close(got, *bounds)
    return len(shapes)


def check_up_and_down(recipe, shapes):
    """Chains whose results are wide: with scales that are given, codes come with them."""
    scale = 2.0**-6 if recipe == "static" else None
    for m, n, k in shapes:
        x, w, around = operands(rng, m, 2 * n, k, ("swiglu",))
        _, down, added = operands(rng, m, k, n, ("residual",))
        links = [jax_fp8.ChainLink(w, **around, scale=scale)]
        links += [jax_fp8.ChainLink(down, **added, scale=scale)]
        links += [jax_fp8.ChainLink(w, **around, scale=scale)]
        options = {"recipe": recipe, "implementation": "kernel"}
        found = jax_fp8.fused_chain(x, links, **options)
        apart = jax_fp8.fused_chain(x, links, one_call=False, **options)
        for got, want in zip(found, apart, strict=True):
            ref.assert_same_bits(got, want)
    return len(shapes)
