"""jax.export: programs that hold the handlers' calls, also for a platform that is not here."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import training
from cases import operand, pair_id, run_script, sample, scaled
from jax import export
from jax.lax import Precision

import jax_fp8

TARGETS = ("jax_fp8_quantize", "jax_fp8_scaled_matmul")
CHECKS = [export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]


def exported(function, *operands, platform, checks=CHECKS):
    return export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)(*operands)


# --- A round trip on the CPU ----------------------------------------------------------------------


def quantize_and_multiply(x, w):
    xq = jax_fp8.quantize(x, granularity="row", implementation="kernel")
    return jax_fp8.scaled_matmul(xq, w, implementation="naive")


def on_the_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("exports for the CPU and runs it")


@pytest.mark.parametrize("serialized", [False, True], ids=["in memory", "serialized"])
def test_round_trip(rng, serialized):
    on_the_cpu()
    if serialized:
        pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    x, w = jnp.asarray(sample(rng, "normal", (9, 40))), operand(rng, (13, 40))
    program = exported(quantize_and_multiply, x, w, platform="cpu")
    again = export.deserialize(program.serialize()) if serialized else program
    assert again.platforms == ("cpu",)
    ref.assert_same_bits(again.call(x, w), quantize_and_multiply(x, w))


@pytest.mark.parametrize(
    "implementation", ["naive", pytest.param("cublaslt", marks=pytest.mark.gpu)]
)
def test_rows_that_are_not_known_before_the_call(rng, implementation):
    """Nothing can be timed for them when they are compiled."""
    # Of integers, whose sums no algorithm rounds.
    x, w = (jnp.asarray(rng.integers(-4, 5, (n, 64)), jnp.float8_e4m3fn) for n in (48, 32))
    w = jax_fp8.ScaledArray(w, jnp.ones((1, 1)))
    (rows,) = export.symbolic_shape("rows")

    def multiply(x, w):
        x = jax_fp8.ScaledArray(x, jnp.ones((1, 1)))
        return jax_fp8.scaled_matmul(x, w, implementation=implementation)

    program = exported(
        multiply,
        jax.ShapeDtypeStruct((rows, 64), jnp.float8_e4m3fn),
        w,
        platform="cuda" if jax.default_backend() == "gpu" else "cpu",
    )
    for count in (16, 48):
        ref.assert_same_bits(program.call(x[:count], w), multiply(x[:count], w))


def test_fused_matmul(rng):
    """The handler on the CPU; for GPUs a program holds it too, whatever they are."""
    on_the_cpu()
    x = jnp.asarray(sample(rng, "normal", (2, 64)).astype(ref.BF16))
    w, norm = operand(rng, (6, 64), granularity="row"), jnp.ones(64, jnp.bfloat16)

    def multiply(x, w, norm, implementation):
        return jax_fp8.fused_matmul(x, w, norm=norm, implementation=implementation)

    checks = [export.DisabledSafetyCheck.custom_call("jax_fp8_fused_matmul")]
    named = functools.partial(multiply, implementation="kernel")
    program = exported(named, x, w, norm, platform="cpu", checks=checks)
    ref.assert_same_bits(program.call(x, w, norm), named(x, w, norm))
    default = functools.partial(multiply, implementation=None)
    text = exported(default, x, w, norm, platform="cuda", checks=checks).mlir_module()
    assert "@jax_fp8_fused_matmul" in text and "@jax_fp8_scaled_matmul" not in text


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
def test_a_scaled_array_of_a_serialized_program_keeps_its_granularity(rng, granularity):
    on_the_cpu()
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    x = jnp.asarray(sample(rng, "normal", (130, 40)))
    program = exported(
        lambda x: jax_fp8.quantize(x, granularity=granularity), x, platform="cpu"
    ).serialize()
    got = export.deserialize(program).call(x)
    assert got.granularity == granularity
    ref.assert_same_trees(got, jax_fp8.quantize(x, granularity=granularity))


def test_a_process_that_only_loads_a_program_registers_first(rng, tmp_path):
    on_the_cpu()
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    x = jnp.asarray(sample(rng, "normal", (9, 40)))

    def quantize(x):
        return jax_fp8.dequantize(jax_fp8.quantize(x, implementation="kernel"))

    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "want.npy", quantize(x))
    program = exported(quantize, x, platform="cpu").serialize()
    (tmp_path / "program").write_bytes(program)
    run_script(
        f"""
        import pathlib
        import numpy as np
        from jax import export
        import jax_fp8
        jax_fp8.register()
        folder = pathlib.Path({str(tmp_path)!r})
        program = export.deserialize(bytearray((folder / "program").read_bytes()))
        x, want = np.load(folder / "x.npy"), np.load(folder / "want.npy")
        np.testing.assert_array_equal(program.call(x), want)
        """
    )


def test_xla_needs_no_permission(rng):
    on_the_cpu()
    x, w = jnp.asarray(sample(rng, "normal", (9, 40))), operand(rng, (13, 40))
    program = exported(jax_fp8.matmul, x, w, platform="cpu", checks=[])
    assert "jax_fp8" not in re.sub(r"loc\(.*", "", program.mlir_module())
    ref.assert_same_bits(program.call(x, w), jax_fp8.matmul(x, w))


@pytest.mark.parametrize("missing", TARGETS)
def test_a_call_that_was_not_permitted_is_named(rng, missing):
    x, w = jnp.asarray(sample(rng, "normal", (9, 40))), operand(rng, (13, 40))
    checks = [check for check in CHECKS if check.is_custom_call() != missing]
    assert len(checks) == 1
    with pytest.raises(ValueError, match=missing):
        exported(quantize_and_multiply, x, w, platform="cpu", checks=checks)


# --- For a GPU, from anywhere ---------------------------------------------------------------------


def lowered(function, *operands):
    return exported(function, *operands, platform="cuda").mlir_module()


def calls(module, target):
    """The lines of a module that call `target`."""
    return [line for line in module.splitlines() if f"@{target}(" in line]


def product_call(x, w, **options):
    """The module of one product for a GPU, and the line that calls the handler."""
    module = lowered(lambda x, w: jax_fp8.scaled_matmul(x, w, **options), x, w)
    (call,) = calls(module, "jax_fp8_scaled_matmul")
    return module, call


def test_a_product_and_its_attributes(rng):
    x, w = operand(rng, (3, 64), granularity="row"), operand(rng, (32, 64), ref.E5M2, (1, 128))
    _, call = product_call(x, w, activation="gelu", precision=Precision.HIGHEST)
    for attribute in (
        'activation = "gelu"',
        "capability = 0 : i64",
        "fast_accumulation = false",
        'implementation = ""',
        "x_block_rows = 1 : i64",
        "x_block_cols = 0 : i64",
        "w_block_rows = 1 : i64",
        "w_block_cols = 128 : i64",
    ):
        assert attribute in call, (attribute, call)
    assert "tensor<1x3x64xf8E4M3FN>" in call
    assert "tensor<1x32x64xf8E5M2>" in call
    assert "tensor<1x3x32xbf16>" in call
    assert "tensor<33554688xui8>" in call  # 32 MiB and 256 bytes of workspace.


def test_the_default_accumulates_fast_and_an_implementation_is_named(rng):
    x, w = operand(rng, (3, 64)), operand(rng, (32, 64))
    _, call = product_call(x, w, implementation="cublaslt")
    assert "fast_accumulation = true" in call
    assert 'implementation = "cublaslt"' in call


@pytest.mark.parametrize("precision", [None, "highest"])
@pytest.mark.parametrize("op", ["dot_general", "matmul"])
@pytest.mark.parametrize("recipe", training.FP8_RECIPES)
def test_gradients_never_accumulate_fast(rng, recipe, op, precision):
    dtype = jnp.bfloat16 if recipe == "weight_only" else jnp.float32
    x, w = (jnp.asarray(sample(rng, "normal", shape), dtype) for shape in ((48, 64), (64, 32)))
    wq = operand(rng, (32, 64))
    scale = 0.01 if recipe in ("static", "delayed") else None

    def gradients(x, w):
        if op == "dot_general":
            dims = (((1,), (0,)), ((), ()))
            y, pull = training.value_and_pullback(x, w, dims, recipe, precision=precision)
        else:
            options = {"recipe": recipe, "scale": scale, "precision": precision}
            y, pull = jax.vjp(lambda x: jax_fp8.matmul(x, wq, **options), x)
        return y, pull(y)

    module = jax.jit(gradients).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    found = [
        (re.search(r"-> \(tensor<1x(\d+x\d+)x", call)[1], "fast_accumulation = true" in call)
        for call in calls(module, "jax_fp8_scaled_matmul")
    ]
    want = [("48x32", precision is None), ("48x64", False)]
    if op == "dot_general" and recipe != "weight_only":  # Its weights' gradient is a wide product.
        want.append(("64x32", False))
    assert sorted(found) == want


@pytest.mark.parametrize("named", ["decode", "naive"])
def test_what_needs_no_workspace_and_no_padding_has_none(rng, named):
    module, call = product_call(operand(rng, (3, 37)), operand(rng, (5, 37)), implementation=named)
    assert "stablehlo.pad" not in module
    assert "tensor<0xui8>" in call
    assert "tensor<1x3x37xf8E4M3FN>" in call and "tensor<1x5x37xf8E4M3FN>" in call


@pytest.mark.parametrize(
    "out, align_n", [(ref.F32, 4), (ref.BF16, 8), (ref.F16, 8), (ref.E4M3, 16)], ids=pair_id
)
@pytest.mark.parametrize("m", [1, 3], ids=lambda m: f"m={m}")
@pytest.mark.parametrize("n", [1, 4, 8, 16, 20], ids=lambda n: f"n={n}")
@pytest.mark.parametrize("k", [16, 24, 37, 64], ids=lambda k: f"k={k}")
def test_only_what_cublaslt_needs_is_padded(out, align_n, m, n, k):
    one = jnp.ones((1, 1))
    x, w = scaled(np.zeros((m, k), ref.E4M3), one), scaled(np.zeros((n, k), ref.E4M3), one)
    options = {"output_scale": 1.0} if out in ref.FP8 else {}
    module, call = product_call(x, w, preferred_element_type=out, **options)
    wide_n, wide_k = n + -n % align_n, k + -k % 16
    assert f"tensor<1x{m}x{wide_k}xf8E4M3FN>" in call  # M is as it was.
    assert f"tensor<1x{wide_n}x{wide_k}xf8E4M3FN>" in call
    assert ("stablehlo.pad" in module) == ((wide_n, wide_k) != (n, k))


def test_scales_and_bias_are_padded_with_n(rng):
    x, w = operand(rng, (3, 16), granularity="row"), operand(rng, (5, 16), granularity="row")
    module, call = product_call(x, w, bias=jnp.ones(5, jnp.bfloat16))
    assert "tensor<1x8x1xf32>" in call and "tensor<8xbf16>" in call
    assert module.count("stablehlo.pad") == 3


def test_quantize(rng):
    x = jnp.asarray(sample(rng, "normal", (2, 130, 200)))
    module = lowered(lambda x: jax_fp8.quantize(x, granularity=(128, 128)).data, x)
    (call,) = calls(module, "jax_fp8_quantize")
    assert "block_rows = 128 : i64" in call and "block_cols = 128 : i64" in call
    assert "tensor<2x130x200xf8E4M3FN>" in call and "tensor<2x2x2xf32>" in call


def test_a_named_xla_leaves_all_of_it_to_xla(rng):
    x, w = jnp.asarray(sample(rng, "normal", (9, 40))), operand(rng, (13, 40))
    module = lowered(lambda x, w: jax_fp8.matmul(x, w, implementation="xla"), x, w)
    assert not any(calls(module, target) for target in TARGETS)
    assert "dot_general" in module
