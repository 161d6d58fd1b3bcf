"""What a GPU alone can show: cublasLt and its ways around, the branches of other GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import codes, integers, operand, pair_id, scaled
from jax.lax import Precision

import jax_fp8

pytestmark = pytest.mark.gpu

F32_OUT = {"preferred_element_type": jnp.float32}
PRECISE = {**F32_OUT, "precision": Precision.HIGHEST}
SECOND_KERNEL = "finished by a second kernel"


def multiply_and_plan(x, w, **options):
    """The result, and the plan of the one product that ran."""
    jax_fp8.clear_plans()
    result = jax.block_until_ready(jax_fp8.scaled_matmul(x, w, **options))
    (plan,) = (
        p for p in jax_fp8.plans() if p["operation"] == "scaled_matmul" and p["when"] == "run"
    )
    return result, plan


# --- cublasLt and the naive kernel ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "heavy", "positive"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("m, n, k", [(1, 256, 4096), (300, 500, 1000), (512, 1024, 2048)], ids=str)
def test_cublaslt_agrees_with_naive(rng, m, n, k, granularity, kind):
    """To 0.1 % of the norm, with sums that are promoted to float32."""
    x = operand(rng, (m, k), granularity=granularity, kind=kind)
    w = operand(rng, (n, k), granularity=granularity, kind=kind)
    one, other = (
        np.asarray(jax_fp8.scaled_matmul(x, w, implementation=implementation, **PRECISE))
        for implementation in ("cublaslt", "naive")
    )
    assert np.linalg.norm(one - other) <= 1e-3 * np.linalg.norm(other)


@pytest.mark.parametrize("k", [4096, 16384])
def test_the_worst_case_of_fast_accumulation_is_data_of_one_sign(rng, k):
    x, w = operand(rng, (64, k), kind="positive"), operand(rng, (64, k), kind="positive")
    expected, magnitudes = ref.product(x, w)
    fast, precise = (
        np.asarray(jax_fp8.scaled_matmul(x, w, implementation="cublaslt", **options))
        for options in (F32_OUT, PRECISE)
    )
    ref.assert_close(fast, expected, ref.random_error(magnitudes, k, fast=True))
    ref.assert_close(precise, expected, ref.random_error(magnitudes, k, fast=False))
    # Every step of the fast accumulator drops bits of the same sign.
    assert np.linalg.norm(fast - expected) > np.linalg.norm(precise - expected)
    assert np.abs(fast - expected).max() > ref.random_error(magnitudes, k, fast=False).max()


# --- The branches of other GPUs -------------------------------------------------------------------


@pytest.mark.parametrize("capability", [75, 80, 89, 90, 100])
@pytest.mark.parametrize(
    "granularities",
    [("tensor", "tensor"), ("row", "row"), ("tensor", "row"), ("row", "tensor"), ref.BLOCKS],
    ids=pair_id,
)
@pytest.mark.parametrize("out", [ref.F32, ref.BF16], ids=pair_id)
def test_the_default_on_every_generation(rng, forced_capability, capability, granularities, out):
    forced_capability(capability)
    x = operand(rng, (70, 272), granularity=granularities[0])
    w = operand(rng, (48, 272), granularity=granularities[1])
    bias = jnp.asarray(rng.standard_normal(48), jnp.bfloat16)
    got, plan = multiply_and_plan(
        x, w, bias=bias, preferred_element_type=out, precision=Precision.HIGHEST
    )
    expected, magnitudes = ref.product(x, w, bias)
    error = ref.epilogue_error(expected, ref.random_error(magnitudes, 272, False), None, bias)
    ref.assert_close(got, expected, error)
    blocks = granularities == ref.BLOCKS
    tensor_cores = capability == 90 if blocks else capability >= 89
    assert plan["implementation"] == ("cublaslt" if tensor_cores else "decode")
    if tensor_cores:
        rows = granularities != ("tensor", "tensor")
        assert (SECOND_KERNEL in plan["algorithm"]) == (rows and capability != 90)


@pytest.mark.parametrize("capability", [89, 90, 100])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("out", ref.FP8, ids=pair_id)
def test_fp8_results_on_every_generation(rng, forced_capability, capability, granularity, out):
    forced_capability(capability)
    x = integers(rng, (35, 96), granularity="tensor", largest=2)
    x = scaled(x.data, np.ones(ref.scale_shape(x.shape, granularity), np.float32), granularity)
    w = scaled(x.data[:32], x.scale[:32], granularity)
    got, amax = jax_fp8.scaled_matmul(
        x,
        w,
        preferred_element_type=out,
        output_scale=0.5,
        return_amax=True,
        implementation="cublaslt",
    )
    expected = ref.product(x, w)[0].astype(np.float32)
    data = ref.round_saturate(expected, np.float32(2), out).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(got.data).astype(np.float32), data)
    assert float(amax) == np.abs(expected).max()


@pytest.mark.parametrize("capability", [89, 100, 120])
def test_block_scales_are_refused_off_hopper(rng, forced_capability, capability):
    forced_capability(capability)
    x, w = operand(rng, (4, 32), granularity=(1, 128)), operand(rng, (8, 32), granularity="row")
    message = "cublasLt has block scales on compute capability 9.x alone"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax_fp8.scaled_matmul(x, w, implementation="cublaslt").block_until_ready()


# Rows beyond a multiple of 4; scales along K that are no multiple of 4; and all that is.
BLOCK_SHAPES = [(4, 256, 512), (7, 144, 528), (130, 200, 1040), (257, 136, 16), (1024, 512, 1024)]


@pytest.mark.parametrize("x_granularity", ref.GRANULARITIES, ids=pair_id)
@pytest.mark.parametrize("w_granularity", ref.GRANULARITIES, ids=pair_id)
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=pair_id)
@pytest.mark.parametrize(
    "options", [{}, {"bias": ref.BF16, "activation": "gelu"}, {"bias": ref.F32}], ids=str
)
def test_block_scales_in_cublaslt(
    rng, forced_capability, x_granularity, w_granularity, shape, options
):
    if x_granularity not in ref.BLOCKS and w_granularity not in ref.BLOCKS:
        pytest.skip("no blocks")
    forced_capability(90)
    m, n, k = shape
    x = operand(rng, (m, k), granularity=x_granularity)
    w = operand(rng, (n, k), granularity=w_granularity)
    bias = jnp.asarray(rng.standard_normal(n), options["bias"]) if "bias" in options else None
    activation = options.get("activation")
    got, plan = multiply_and_plan(x, w, bias=bias, activation=activation, **F32_OUT)
    expected, magnitudes = ref.product(x, w, bias, activation)
    sums, _ = ref.product(x, w, bias)
    error = ref.random_error(magnitudes, k, fast=False)
    ref.assert_close(got, expected, ref.epilogue_error(sums, error, activation, bias, True))
    assert (plan["implementation"], plan["accumulation"]) == ("cublaslt", "precise")
    assert (SECOND_KERNEL in plan["algorithm"]) == (options.get("bias") == ref.F32)


@pytest.mark.parametrize("out", [*ref.WIDE, *ref.FP8], ids=pair_id)
@pytest.mark.parametrize("shape", [(3, 30, 272), (2, 5000, 272)], ids=pair_id)
def test_block_scaled_batches_and_results(rng, forced_capability, out, shape):
    forced_capability(90)
    x = integers(rng, shape, granularity=(1, 128), largest=1)
    w = integers(rng, (shape[0], 272, 272), granularity=(128, 128), largest=1)
    options = {"output_scale": 4.0} if out in ref.FP8 else {}
    got, plan = multiply_and_plan(x, w, preferred_element_type=out, **options)
    assert plan["implementation"] == "cublaslt"
    expected = ref.product(x, w)[0].astype(np.float32)
    if out in ref.FP8:
        got, expected = got.data, ref.round_saturate(expected, np.float32(0.25), out)
    np.testing.assert_array_equal(
        np.asarray(got).astype(np.float32), expected.astype(out).astype(np.float32)
    )


@pytest.mark.parametrize("m", [1, 2, 3])
def test_few_rows_of_block_scales(rng, forced_capability, m):
    forced_capability(90)
    x = operand(rng, (m, 272), granularity=(1, 128))
    w = operand(rng, (48, 272), granularity=(128, 128))
    expected, magnitudes = ref.product(x, w)
    for implementation in ("cublaslt", None):
        got, plan = multiply_and_plan(x, w, implementation=implementation, **F32_OUT)
        assert implementation is None or plan["implementation"] == implementation
        ref.assert_close(got, expected, ref.random_error(magnitudes, 272, fast=False))


@pytest.mark.parametrize("capability", [75, 80])
def test_cublaslt_is_refused_before_8_9(rng, forced_capability, capability):
    forced_capability(capability)
    x, w = operand(rng, (4, 32)), operand(rng, (8, 32))
    message = (
        f"capability {capability // 10}.{capability % 10}, and FP8 tensor cores begin with 8.9"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax_fp8.scaled_matmul(x, w, implementation="cublaslt").block_until_ready()


def test_what_has_no_tensor_cores_runs_the_naive_kernel(rng, forced_capability):
    forced_capability(70)
    x, w = operand(rng, (4, 32)), operand(rng, (8, 32))
    assert multiply_and_plan(x, w)[1]["implementation"] == "naive"
    with pytest.raises(jax.errors.JaxRuntimeError, match="begin with compute capability 7.5"):
        jax_fp8.scaled_matmul(x, w, implementation="decode").block_until_ready()


def test_what_cublaslt_has_not_is_decoded(rng):
    x, w = operand(rng, (4, 32), ref.E5M2), operand(rng, (8, 32), ref.E5M2)
    assert multiply_and_plan(x, w)[1]["implementation"] == "decode"


@pytest.mark.parametrize("implementation", ["cublaslt", "small_m", "decode", "naive"])
def test_a_named_implementation_is_the_one_that_runs(rng, implementation):
    x, w = operand(rng, (4, 32)), operand(rng, (8, 32))
    _, plan = multiply_and_plan(x, w, implementation=implementation)
    assert (plan["implementation"], plan["platform"]) == (implementation, "cuda")


# --- One call where one is enough -----------------------------------------------------------------


FP8_OUT = {"preferred_element_type": jnp.float8_e4m3fn, "output_scale": 1.0, "return_amax": True}


@pytest.mark.parametrize(
    "options",
    [
        F32_OUT,
        PRECISE,
        {"preferred_element_type": jnp.bfloat16},
        {"preferred_element_type": jnp.float16},
        {"bias": jnp.bfloat16, **F32_OUT},
        {"bias": jnp.bfloat16, "activation": "gelu"},
        {"bias": jnp.float16, "activation": "relu", "preferred_element_type": jnp.float16},
        {"activation": "gelu", **PRECISE},
    ],
    ids=str,
)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("m", [1, 7, 32], ids=lambda m: f"m={m}")
def test_one_call_of_cublaslt_is_enough_for(rng, forced_capability, m, granularity, options):
    forced_capability(90)
    x = operand(rng, (m, 64), granularity=granularity)
    w = operand(rng, (32, 64), granularity=granularity)
    if "bias" in options:
        options = {**options, "bias": jnp.ones(32, options["bias"])}
    _, plan = multiply_and_plan(x, w, **options)
    assert plan["implementation"] == "cublaslt"
    assert plan["shape"] == [1, m, 32, 64]
    assert SECOND_KERNEL not in plan["algorithm"]


@pytest.mark.parametrize("dtypes", [(ref.E4M3, ref.E4M3), (ref.E4M3, ref.E5M2)], ids=pair_id)
def test_one_call_is_enough_for_an_fp8_result_and_a_batch(rng, dtypes):
    x, w = operand(rng, (32, 64), dtypes[0]), operand(rng, (32, 64), dtypes[1])
    assert SECOND_KERNEL not in multiply_and_plan(x, w, **FP8_OUT)[1]["algorithm"]
    x, w = (scaled(jnp.stack([o.data] * 3), o.scale[None]) for o in (x, w))
    _, plan = multiply_and_plan(x, w)
    assert plan["shape"] == [3, 32, 32, 64]
    assert SECOND_KERNEL not in plan["algorithm"]


@pytest.mark.parametrize(
    "x_granularity, batch, options",
    [
        ("tensor", (), {"bias": jnp.ones(32, jnp.float32)}),
        ("tensor", (), {"bias": jnp.ones(32, jnp.float16)}),
        ("tensor", (), {**FP8_OUT, "preferred_element_type": jnp.float8_e5m2}),
        ("row", (), FP8_OUT),
        ("row", (3,), {}),
        ("tensor", (3,), FP8_OUT),
    ],
    ids=["f32-bias", "f16-bias", "e5m2-out", "row-fp8-out", "row-batch", "batch-fp8-out"],
)
def test_a_second_kernel_finishes(rng, x_granularity, batch, options):
    x, w = operand(rng, (*batch, 32, 64), granularity=x_granularity), operand(rng, (*batch, 32, 64))
    assert SECOND_KERNEL in multiply_and_plan(x, w, **options)[1]["algorithm"]


@pytest.mark.parametrize("shape", [(2100, 4096), (6, 700, 2048), (3, 2600, 4096)], ids=pair_id)
@pytest.mark.parametrize("out", [ref.BF16, ref.E4M3], ids=pair_id)
def test_sums_that_do_not_fit_into_the_workspace_at_once(rng, shape, out):
    *batch, m, n = shape
    x = integers(rng, (*batch, m, 48), granularity="row", largest=2)
    w = integers(rng, (*batch, n, 48), granularity="row", largest=2)
    bias = jnp.asarray(rng.integers(-20, 20, n), jnp.float32)
    options = FP8_OUT if out == ref.E4M3 else {"preferred_element_type": out}
    got, plan = multiply_and_plan(x, w, bias=bias, implementation="cublaslt", **options)
    assert SECOND_KERNEL in plan["algorithm"]
    expected = ref.product(x, w, bias)[0].astype(np.float32)
    if out == ref.BF16:
        np.testing.assert_array_equal(np.asarray(got), expected.astype(ref.BF16))
        return
    data = ref.round_saturate(expected, np.float32(1), out)
    np.testing.assert_array_equal(
        np.asarray(got[0].data).astype(np.float32), data.astype(np.float32)
    )
    assert float(got[1]) == np.abs(expected).max()


# --- Operands that start anywhere -----------------------------------------------------------------


@pytest.mark.parametrize("offset", [1, 3, 8, 16, 17])
def test_slices_of_larger_arrays(implementation, rng, offset):
    """XLA may hand over a part of a buffer, with whatever address it starts at."""
    if implementation == "xla":
        pytest.skip("XLA adds in another order in another program")
    m, n, k = 40, 48, 80
    flat_x, flat_w = (codes(rng, (offset + rows * k,)).data for rows in (m, n))
    scales = jnp.asarray(np.exp(rng.standard_normal(offset + m)), jnp.float32)
    biases = jnp.asarray(rng.standard_normal(offset + n), jnp.bfloat16)

    def operands(flat_x, flat_w, scales):
        return (
            scaled(flat_x[offset:].reshape(m, k), scales[offset:].reshape(m, 1), "row"),
            scaled(flat_w[offset:].reshape(n, k), scales[offset - 1 : offset].reshape(1, 1)),
        )

    @jax.jit
    def multiply_slices(flat_x, flat_w, scales, biases):
        x, w = operands(flat_x, flat_w, scales)
        return jax_fp8.scaled_matmul(
            x, w, bias=biases[offset:], implementation=implementation, **PRECISE
        )

    expected, magnitudes = ref.product(*operands(flat_x, flat_w, scales), biases[offset:])
    try:
        got = jax.block_until_ready(multiply_slices(flat_x, flat_w, scales, biases))
    except jax.errors.JaxRuntimeError as error:
        # cublasLt cannot; where it was named nothing else may run.
        assert implementation == "cublaslt" and offset % 16
        assert "does not start at a multiple of 16 bytes" in str(error)
        return
    ref.assert_close(got, expected, ref.random_error(magnitudes, k, fast=False))
