"""fused_matmul and fused_chain of many rows, and with scales that are given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from around_cases import ALL, COMBINATIONS, EPS, expected, operands, quantized
from cases import on_gpu, scaled

import jax_fp8
from jax_fp8 import ChainLink as Link

pytestmark = pytest.mark.slow

#: Of what is multiplied here, so that little of it saturates.
SCALE = 2.0**-7


@pytest.fixture
def implementation(quantizer):
    """Of fused_matmul: it has those of quantize."""
    return quantizer


@pytest.fixture(params=["rowwise", "static"])
def recipe(request):
    return request.param


def options_of(recipe, implementation):
    scale = jnp.float32(SCALE) if recipe == "static" else None
    return {"recipe": recipe, "scale": scale, "implementation": implementation}


def check(x, w, around, implementation, recipe="rowwise"):
    options = options_of(recipe, implementation)
    got = jax_fp8.fused_matmul(x, w, **around, eps=EPS, **options)
    assert got.dtype == x.dtype
    multiplied = quantized(x, around.get("norm"), EPS, implementation, options["scale"])
    is_other = implementation != "kernel" and "norm" in around
    is_rounded = x.shape[0] > 16
    made = expected(x, w, multiplied=multiplied, is_other=is_other, is_rounded=is_rounded, **around)
    ref.assert_close(got, *made)
    return got


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("granularity", ["row", *on_gpu("tensor")])
def test_every_combination(implementation, recipe, rng, parts, granularity):
    for m in (3, 150) if ref.on_gpu() else (17,):
        check(*operands(rng, m, 304, 272, parts, granularity), implementation, recipe)


@pytest.mark.parametrize("m", [17, *on_gpu(64, 129, 300)])
@pytest.mark.parametrize(
    "size", [(16, 16), (48, 144), *on_gpu((272, 128), (1008, 1040), (16, 9008))], ids=str
)
def test_every_end(implementation, recipe, rng, m, size):
    for parts in (ALL, ("bias",), ("swiglu",), ("residual",)):
        check(*operands(rng, m, *size, parts), implementation, recipe)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "m, n, k",
    [(1024, 28672, 4096), (2048, 4096, 14336), (4100, 6144, 4096), (17, 4096, 14336)],
    ids=str,
)
def test_the_sizes_of_models(rng, m, n, k):
    """Of many tiles a block, whose sums are finished while the next ones are multiplied."""
    for parts in (("swiglu",), ("residual",), ("norm", "swiglu", "bias", "residual")):
        x, w, around = operands(rng, m, n, k, parts)
        options = {**around, "eps": EPS, "recipe": "rowwise"}
        got = jax_fp8.fused_matmul(x, w, **options, implementation="kernel")
        some = np.unique(rng.integers(0, m, 32))
        if "residual" in around:
            around["residual"] = around["residual"][some]
        made = quantized(x[some], around.get("norm"), EPS, "kernel")
        ref.assert_close(
            got[some], *expected(x[some], w, multiplied=made, is_rounded=True, **around)
        )
        want = jax_fp8.fused_matmul(x, w, **options, implementation="xla")
        wide = np.asarray(want).astype(np.float32)
        off = np.asarray(got).astype(np.float32) - wide
        assert np.abs(off).max() < 2.0**-4 * np.abs(wide).max()
        assert np.sqrt(np.square(off).mean() / np.square(wide).mean()) < 2.0**-6


@pytest.mark.gpu
@pytest.mark.parametrize("k", [16, 272, 1040, 4096, 14336, 14352])
@pytest.mark.parametrize("parts", [(), ("norm",)], ids=str)
def test_few_rows_are_quantized_as_by_a_call(rng, recipe, k, parts):
    """Of one row of no more than 14336 a product does that by itself."""
    granularity = "tensor" if recipe == "static" else "row"
    options = options_of(recipe, "kernel")
    for m in (1, 2, 3, 4, 5):
        x, w, around = operands(rng, m, 336, k, parts, granularity)
        if m > 1:
            x = x.at[0].set(0).at[1, k - 1].set(jnp.inf if m % 2 else jnp.nan)
        multiplied = quantized(x, around.get("norm"), EPS, "kernel", options["scale"])
        want = jax_fp8.scaled_matmul(
            multiplied, w, preferred_element_type=jnp.bfloat16, implementation="small_m"
        )
        got = jax_fp8.fused_matmul(x, w, **around, eps=EPS, **options)
        ref.assert_same_bits(got, want)
        assert m == 1 or np.isnan(np.asarray(got)[1].astype(np.float32)).any()


def test_a_static_scale_saturates_and_keeps_what_is_not_finite(implementation, rng):
    x, w, _ = operands(rng, 18, 40, 64, ())
    x = x.at[0, 0].set(1e4).at[1, 3].set(jnp.inf).at[2, 5].set(jnp.nan)
    w = scaled(w.data.at[:, :8].set(1), w.scale, "row")
    got = check(x, w, {}, implementation, "static")
    bad = np.isnan(np.asarray(got)).all(axis=-1)
    assert bad[1] and bad[2] and not bad[0] and not bad[3:].any()
    # Of each row by itself, whatever scale the others would need.
    ref.assert_same_bits(check(x.at[0, 0].set(0), w, {}, implementation, "static")[3:], got[3:])
    for scale in (jnp.nan, jnp.inf, 0.0):
        options = {"recipe": "static", "scale": scale, "implementation": implementation}
        assert np.isnan(np.asarray(jax_fp8.fused_matmul(x, w, **options))).all()


@pytest.mark.parametrize("parts", [(), ("norm",), ("swiglu",), ALL], ids="+".join)
def test_what_is_not_finite_stays_in_its_row(implementation, rng, parts):
    x, w, around = operands(rng, 20, 48, 256, parts)
    w = scaled(w.data.at[:, 7].set(1), w.scale, "row")
    clean = check(x.at[2].set(1), w, around, implementation)
    x = x.at[2, 7].set(jnp.inf)
    options = {"eps": EPS, "recipe": "rowwise", "implementation": implementation}
    after = np.asarray(jax_fp8.fused_matmul(x, w, **around, **options))
    assert np.isnan(after[2].astype(np.float64)).all()
    ref.assert_same_bits(np.delete(after, 2, 0), np.delete(np.asarray(clean), 2, 0))


def test_it_is_deterministic_under_jit_and_alone(implementation, recipe, rng):
    x, w, around = operands(rng, 300 if ref.on_gpu() else 20, 304, 1040, ALL)
    activation = around.pop("activation")
    options = options_of(recipe, implementation)

    def run(x, w, around):
        return jax_fp8.fused_matmul(x, w, **around, activation=activation, eps=EPS, **options)

    first = run(x, w, around)
    for _ in range(3):
        ref.assert_same_bits(jax.jit(run)(x, w, around), first)


# --- Chains ---------------------------------------------------------------------------------------


def block(rng, m, width, hidden, scales=(None, None, None)):
    """x, and an MLP and the next two products, each with a scale for what it multiplies.

    Of these products one multiplies a norm of what is in front of it.
    """
    x, up, around = operands(rng, m, 2 * hidden, width, ("norm", "swiglu"))
    _, down, added = operands(rng, m, width, hidden, ("residual",))
    _, third, normed = operands(rng, m, width, width, ("norm",))
    _, last, biased = operands(rng, m, width, width, ("bias",))
    return x, [
        Link(up, eps=EPS, **around, scale=scales[0]),
        Link(down, **added, scale=scales[1]),
        Link(third, eps=EPS, **normed, scale=scales[2]),
        Link(last, **biased, residual=1, scale=scales[0]),
    ]


@pytest.mark.parametrize("m", [1, 5, 16, 40, *on_gpu(600)])
def test_a_chain_is_the_separate_calls(implementation, recipe, rng, m):
    """Where a result is multiplied next with a scale that is given, its codes come with it."""
    scales = (jnp.float32(SCALE), SCALE * 2, np.float32(SCALE))
    x, links = block(rng, m, 256, 272, scales if recipe == "static" else (None,) * 3)
    options = {"recipe": recipe, "implementation": implementation}
    found = jax_fp8.fused_chain(x, links, **options)
    want = jax_fp8.fused_chain(x, links, one_call=False, **options)
    # In one program XLA adds up otherwise than in several.
    loose = ref.on_gpu() and (implementation == "xla" or (implementation is None and m > 16))
    for got, one in zip(found, want, strict=True):
        if loose:
            got, one = (np.asarray(y).astype(np.float32) for y in (got, one))
            np.testing.assert_allclose(got, one, rtol=2.0**-4, atol=0.5 * float(np.std(one)))
        else:
            ref.assert_same_bits(got, one)


@pytest.mark.parametrize("m", [1, 5, 16, 40])
def test_codes_of_what_is_not_finite(implementation, rng, m):
    x, w, _ = operands(rng, m, 64, 48, ())
    changed = jnp.zeros((m, 64), ref.BF16).at[0, 0].set(jnp.inf).at[m // 2, 3].set(jnp.nan)
    residual = changed.at[m - 1, 5].set(1e4 if m > 1 else jnp.nan)  # Which saturates.
    _, down, _ = operands(rng, m, 80, 64, ())
    bad = sorted({0, m // 2})
    options = {"recipe": "static", "implementation": implementation}
    for scale in (SCALE, jnp.nan, jnp.inf, 0.0):
        links = [Link(w, residual=residual, scale=SCALE), Link(down, scale=scale)]
        found = jax_fp8.fused_chain(x, links, **options)
        is_nan = np.isnan(np.asarray(found[1]))
        np.testing.assert_array_equal(is_nan.all(-1), np.isin(range(m), bad) | (scale != SCALE))
        np.testing.assert_array_equal(is_nan.any(-1), is_nan.all(-1))
        if implementation == "kernel":
            want = jax_fp8.fused_chain(x, links, one_call=False, **options)
            for got, one in zip(found, want, strict=True):
                ref.assert_same_bits(got, one)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 12, 2304])
@pytest.mark.parametrize("parts", [("residual",), ("swiglu",), ("swiglu", "bias", "residual")])
def test_codes_of_many_tiles(rng, m, parts):
    """Of several tiles for each thread block, whose residuals take the place of what has left."""
    x, w, around = operands(rng, m, 8192, 272, parts)
    k = 4096 if "swiglu" in parts else 8192
    _, narrow, _ = operands(rng, 1, 64, k, ())
    links = [Link(w, **around, scale=SCALE), Link(narrow, scale=SCALE)]
    options = {"recipe": "static", "implementation": "kernel"}
    for _ in range(3):
        found = jax_fp8.fused_chain(x, links, **options)
        want = jax_fp8.fused_chain(x, links, one_call=False, **options)
        for got, one in zip(found, want, strict=True):
            ref.assert_same_bits(got, one)


@pytest.mark.parametrize("of", ["x", "scale"])
def test_vmap_is_a_loop(implementation, rng, of):
    x, w, around = operands(rng, 9, 48, 64, ("norm", "bias"))
    scales, many = jnp.float32([SCALE, 2 * SCALE, 4 * SCALE]), jnp.stack([x, x + 1, -x])
    options = {"recipe": "static", "implementation": implementation, "eps": EPS}

    def run(x, scale):
        (y,) = jax_fp8.fused_chain(x, [Link(w, **around, eps=EPS, scale=scale)], **options_of_chain)
        return jax_fp8.fused_matmul(x, w, **around, scale=scale, **options), y

    options_of_chain = {name: options[name] for name in ("recipe", "implementation")}
    axes = (0, None) if of == "x" else (None, 0)
    given = (many, scales[0]) if of == "x" else (x, scales)
    got = jax.vmap(run, axes)(*given)
    for i in range(3):
        own = (many[i], scales[0]) if of == "x" else (x, scales[i])
        for y, want in zip(got, run(*own), strict=True):
            # More rows than sixteen round their sums.
            y, want = (np.asarray(a).astype(np.float32) for a in (y[i], want))
            np.testing.assert_allclose(y, want, rtol=2.0**-6, atol=2.0**-5 * float(np.std(want)))


# --- What runs ------------------------------------------------------------------------------------


def ran(*args, **options):
    jax_fp8.clear_plans()
    jax.block_until_ready(jax_fp8.fused_matmul(*args, **options))
    return [p for p in jax_fp8.plans() if p["when"] == "run"]


@pytest.mark.gpu
def test_one_kernel_behind_the_quantization_is_the_default(rng, recipe):
    x, w, around = operands(rng, 1024, 8192, 64, ("norm", "swiglu", "residual"))
    (found,) = ran(x, w, **around, **options_of(recipe, None))
    assert found["implementation"] == "large_m"
    assert found["parts"] == "norm, quantize, product, swiglu, residual"


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 2304])
def test_the_next_product_finds_its_codes_written(rng, recipe, m):
    x, w, _ = operands(rng, m, 8192, 64, ())
    links = [Link(w), Link(operands(rng, 1, 4096, 8192, ())[1])]
    if recipe == "static":
        links = [dataclasses.replace(link, scale=SCALE) for link in links]
    options = {"recipe": recipe, "implementation": "kernel"}
    jax_fp8.clear_plans()
    got = jax.block_until_ready(jax_fp8.fused_chain(x, links, **options))
    found = sorted(p["parts"] for p in jax_fp8.plans() if p["when"] == "run")
    first = "product" if recipe == "static" else "quantize, product"
    assert found == [first, "quantize, product"]
    want = jax_fp8.fused_chain(x, links, one_call=False, **options)
    for one, other in zip(got, want, strict=True):
        ref.assert_same_bits(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("of", ["w", "residual"])
@pytest.mark.parametrize("offset", [1, 8, 16])
def test_parts_of_larger_buffers(rng, offset, of):
    """What does not start at a multiple of 16 bytes goes in steps, unless XLA copies it."""
    x, w, around = operands(rng, 1024, 8192, 272, ("residual",))
    part = w.data if of == "w" else around["residual"]
    flat = jnp.concatenate([jnp.zeros(offset, part.dtype), part.reshape(-1)])

    @jax.jit
    def run(flat):
        found = flat[offset:].reshape(part.shape)
        multiplied = scaled(found, w.scale, "row") if of == "w" else w
        residual = around["residual"] if of == "w" else found
        return jax_fp8.fused_matmul(x, multiplied, residual=residual, recipe="rowwise")

    jax_fp8.clear_plans()
    got = np.asarray(run(flat))
    found = {p["implementation"] for p in jax_fp8.plans() if p["operation"] == "fused_matmul"}
    assert found in ({"large_m"}, {"steps"})
    assert found == {"large_m"} or offset * part.dtype.itemsize % 16
    made = expected(x, w, multiplied=quantized(x), is_rounded=True, **around)
    ref.assert_close(got, *made)


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [75, 80, 89, 100, 120])
def test_other_gpus_take_steps(rng, forced_capability, recipe, capability):
    for parts in (ALL, (), ("bias", "swiglu")):
        x, w, around = operands(rng, 1024, 8192, 272, parts)
        forced_capability(capability)
        options = options_of(recipe, None)
        (found,) = ran(x, w, **around, **options)
        assert found["implementation"] == "steps"
        check(x, w, around, None, recipe)
        with pytest.raises(jax.errors.JaxRuntimeError, match="'kernel' cannot .*many rows.*9.0"):
            jax.block_until_ready(
                jax_fp8.fused_matmul(x, w, **{**options, "implementation": "kernel"})
            )
