"""The extension: its versions, its registration, and what its handlers refuse by themselves."""

import ctypes
import importlib.metadata
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import run_script

import jax_fp8
from jax_fp8._src import _ffi, ffi

# --- Versions -------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_installed_package():
    assert jax_fp8.__version__ == importlib.metadata.version("jax-fp8")


@pytest.mark.parametrize(
    "built, running",
    [((0, 3), (0, 3)), ((0, 3), (0, 4)), ((0, 1), (0, 99)), ((1, 0), (1, 2)), ((0, 3), None)],
)
def test_an_api_version_that_xla_accepts(built, running):
    ffi.check_api_version(built, running)


@pytest.mark.parametrize(
    "built, running", [((0, 4), (0, 3)), ((0, 3), (1, 0)), ((1, 0), (0, 9)), ((0, 1), (0, 0))]
)
def test_an_api_version_that_xla_refuses_is_named_with_the_running_one(built, running):
    versions = [f"API {major}\\.{minor}" for major, minor in (built, running)]
    message = ".*".join([f"jax_fp8 was built for XLA FFI {versions[0]}", "jaxlib", versions[1]])
    with pytest.raises(ImportError, match=message):
        ffi.check_api_version(built, running)


def test_the_running_version_is_known_and_accepts_the_built_one():
    running = ffi._running_api_version()
    assert running is not None and running[0] == 0
    ffi.check_api_version(_ffi.API_VERSION, running)


def test_the_running_version_without_headers_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert ffi._running_api_version() is None
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 7\n")
    assert ffi._running_api_version() is None
    header.write_text("#define XLA_FFI_API_MAJOR 7\n#define XLA_FFI_API_MINOR 12\n")
    assert ffi._running_api_version() == (7, 12)


def test_an_incompatible_version_is_one_error_and_leaves_jax_as_it_is():
    printed = run_script(
        """
        import jax, jax.numpy as jnp, jax_fp8
        from jax_fp8._src import ffi
        ffi._running_api_version = lambda: (0, 0)
        for _ in range(2):
            try:
                jax_fp8.quantize(jnp.ones((2, 16)), implementation="kernel")
            except ImportError as error:
                print(error)
        assert not ffi._registered
        print(jax.jit(lambda x: x @ x)(jnp.ones((4, 4))).sum())
        q = jax_fp8.quantize(jnp.ones((2, 16)), implementation="xla")
        print(jax_fp8.scaled_matmul(q, q, implementation="xla").sum())
        """
    )
    first, second, plain, product = printed.splitlines()
    assert first == second
    assert re.match(r"jax_fp8 was built for XLA FFI API 0\.\d+, but .* has API 0\.0", first)
    assert (plain, product) == ("64.0", "64")


# --- Registration ---------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch):
    """What is registered from here on, as if nothing had been; JAX does not hear of it."""
    calls = []

    def register(target, stages, *, platform):
        calls.append((target, platform, sorted(stages)))

    monkeypatch.setattr(jax.ffi, "register_ffi_target", register)
    monkeypatch.setattr(ffi, "_registered", False)
    return calls


ALL = [
    ("jax_fp8_cast_transpose", "CUDA", ["execute"]),
    ("jax_fp8_cast_transpose", "cpu", ["execute"]),
    ("jax_fp8_fused_matmul", "CUDA", ["execute"]),
    ("jax_fp8_fused_matmul", "cpu", ["execute"]),
    ("jax_fp8_fused_quantize", "CUDA", ["execute"]),
    ("jax_fp8_fused_quantize", "cpu", ["execute"]),
    ("jax_fp8_line_amaxes", "CUDA", ["execute"]),
    ("jax_fp8_line_amaxes", "cpu", ["execute"]),
    ("jax_fp8_quantize", "CUDA", ["execute"]),
    ("jax_fp8_quantize", "cpu", ["execute"]),
    ("jax_fp8_scaled_matmul", "CUDA", ["execute", "instantiate"]),
    ("jax_fp8_scaled_matmul", "cpu", ["execute"]),
]


def test_registers_each_target_once(registered):
    for _ in range(3):
        ffi.register()
    assert sorted(registered) == ALL


def test_registers_each_target_once_from_eight_threads(registered):
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        ffi.register()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(registered) == ALL


def test_a_failed_registration_is_tried_again(registered, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ffi, "_running_api_version", lambda: (0, 0))
        with pytest.raises(ImportError):
            ffi.register()
    assert registered == []
    ffi.register()
    assert sorted(registered) == ALL


def test_importing_starts_nothing(handlers):
    printed = run_script(
        """
        import re

        def libraries():
            maps = open("/proc/self/maps").read()
            return set(re.findall(r"lib(?:cuda|cublas|cublasLt|cudart|nv\\w*)\\.so\\S*", maps))

        import jax
        before = libraries()  # JAX's CUDA plugin may load some.
        import jax_fp8
        from jax._src import xla_bridge
        print(xla_bridge.backends_are_initialized(), jax_fp8._src.ffi._registered)
        print(sorted(libraries() - before))
        """
    )
    assert printed.splitlines() == ["False False", "[]"]


def test_the_first_call_of_a_process_registers_the_handlers():
    printed = run_script(
        """
        import jax, jax.numpy as jnp, jax_fp8
        x = jax_fp8.ScaledArray(jnp.ones((4, 32), jnp.float8_e4m3fn), jnp.ones((1, 1)))
        print(jax_fp8.scaled_matmul(x, x, implementation="naive")[0, 0])
        try:
            jax_fp8.scaled_matmul(x, x, implementation="cublaslt").block_until_ready()
        except jax.errors.JaxRuntimeError as error:
            print(error)
        """,
        JAX_PLATFORMS="cpu",
    )
    assert printed.startswith("32\n")
    assert "jax_fp8_scaled_matmul: implementation 'cublaslt' cannot multiply" in printed


# --- cublasLt -------------------------------------------------------------------------------------


def has_cublaslt():
    for name in (*ffi._cublaslt_candidates(), "libcublasLt.so.13", "libcublasLt.so.12"):
        try:
            ctypes.CDLL(name)
            return True
        except OSError:
            continue
    return False


def test_without_cublaslt_an_error_says_so():
    if jax.default_backend() != "cpu" or has_cublaslt():
        pytest.skip("there is a cublasLt")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cublasLt was not found.*install jax.cuda13"):
            ffi.cublaslt_version()


@pytest.mark.gpu
def test_the_version_of_cublaslt():
    major, minor, patch = map(int, ffi.cublaslt_version().split("."))
    assert (major, minor) >= (12, 9) and patch >= 0


@pytest.mark.gpu
def test_the_cublaslt_that_is_used_is_the_one_of_xla():
    jax.block_until_ready(jnp.ones((64, 64)) @ jnp.ones((64, 64)))
    ffi.cublaslt_version()
    with open("/proc/self/maps") as maps:
        loaded = set(re.findall(r"\S*libcublasLt\.so\S*", maps.read()))
    assert len(loaded) == 1


# --- What the handlers refuse ---------------------------------------------------------------------


def quantize_call(**changed):
    """Calls the target with arguments that fit, but for those that are changed."""
    given = {
        "x": np.ones((2, 3, 16), np.float32),
        "scale": np.zeros((0,), np.float32),
        "data": ((2, 3, 16), jnp.float8_e4m3fn),
        "new_scale": ((2, 3, 1), jnp.float32),
        "amax": ((2, 3, 1), jnp.float32),
        "scratch": ((0,), jnp.uint32),
        "block": (1, 0),
        "power_of_two": False,
        **changed,
    }
    ffi.register()
    names = ("data", "new_scale", "amax", "scratch")
    results = [jax.ShapeDtypeStruct(*given[name]) for name in names]
    rows, columns = given["block"]
    return jax.ffi.ffi_call("jax_fp8_quantize", results)(
        jnp.asarray(given["x"]),
        jnp.asarray(given["scale"]),
        block_rows=np.int64(rows),
        block_cols=np.int64(columns),
        power_of_two=given["power_of_two"],
    )


def product_call(**changed):
    given = {
        "x": np.ones((2, 3, 16), jnp.float8_e4m3fn),
        "x_scale": np.ones((2, 3, 1), np.float32),
        "w": np.ones((2, 16, 16), jnp.float8_e5m2),
        "w_scale": np.ones((1, 1, 1), np.float32),
        "bias": np.zeros((0,), np.float32),
        "inverse_out_scale": np.zeros((0,), np.float32),
        "d": ((2, 3, 16), jnp.bfloat16),
        "amax": ((0,), jnp.float32),
        "x_block": (1, 0),
        "w_block": (0, 0),
        "activation": "none",
        "implementation": "naive",
        **changed,
    }
    ffi.register()
    results = [
        jax.ShapeDtypeStruct(*given["d"]),
        jax.ShapeDtypeStruct(*given["amax"]),
        jax.ShapeDtypeStruct((0,), jnp.uint8),
    ]
    names = ("x", "x_scale", "w", "w_scale", "bias", "inverse_out_scale")
    operands = [jnp.asarray(given[name]) for name in names]
    return jax.ffi.ffi_call("jax_fp8_scaled_matmul", results)(
        *operands,
        arrays=ffi.describe(*operands, *results),
        x_block_rows=np.int64(given["x_block"][0]),
        x_block_cols=np.int64(given["x_block"][1]),
        w_block_rows=np.int64(given["w_block"][0]),
        w_block_cols=np.int64(given["w_block"][1]),
        activation=given["activation"],
        fast_accumulation=False,
        implementation=given["implementation"],
        capability=np.int64(0),
    )


def test_calls_that_fit_run(handlers):
    data, scale, amax, _ = quantize_call()
    assert float(scale[0, 0, 0]) == np.float32(1 / 448) and float(amax[0, 0, 0]) == 1
    assert float(product_call()[0][0, 0, 0]) == 16


F32, BF16, E4M3 = jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn
TENSOR = {"block": (0, 0), "new_scale": ((2, 1, 1), F32), "amax": ((2, 1, 1), F32)}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": np.ones((3, 16), np.float32)}, r"x must be \(batch, rows, .*got float32\[3,16\]"),
        ({"x": np.ones((2, 3, 16), np.int32)}, r"x must be .*got dtype \d+\[2,3,16\]"),
        ({"x": np.ones((2, 3, 16), E4M3)}, r"x must be .*got float8_e4m3fn\[2,3,16\]"),
        ({"data": ((2, 3, 16), BF16)}, r"the data must be .*got bfloat16\[2,3,16\]"),
        ({"data": ((2, 3, 8), E4M3)}, r"the data must be .*\[2,3,16\], got float8_e4m3fn\[2,3,8\]"),
        ({"block": (1, 32)}, r"unknown block \(1, 32\)"),
        ({"block": (128, 0)}, r"unknown block \(128, 0\)"),
        ({"block": (-1, 0)}, r"unknown block \(-1, 0\)"),
        ({"new_scale": ((2, 1, 1), F32)}, r"scale must be float32\[2,3,1\] .*got float32\[2,1,1\]"),
        ({"new_scale": ((2, 3, 1), BF16)}, r"the scale must be .*got bfloat16\[2,3,1\]"),
        ({"scale": np.ones((1,), np.float32)}, r"a static scale must have .*got float32\[1\]"),
        ({"scale": np.ones((2, 3, 1), BF16)}, r"a static scale must .*got bfloat16\[2,3,1\]"),
        (
            {"scale": np.ones((2, 3, 1), np.float32), "power_of_two": True},
            "power_of_two is for dynamic scales",
        ),
        ({"amax": ((0,), F32)}, r"the amax must have the shape .*got float32\[0\]"),
        ({"amax": ((2, 3, 1), jnp.int32)}, r"the amax must have .*got dtype \d+\[2,3,1\]"),
        (
            {**TENSOR, "scratch": ((1023,), jnp.uint32)},
            "scratch of 4096 bytes, got 4092",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_quantize_refuses(handlers, changed, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match="jax_fp8_quantize: .*" + message):
        jax.block_until_ready(quantize_call(**changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"x": np.ones((3, 16), E4M3)},
            r"x must be \(batch, rows, K\) .*got float8_e4m3fn\[3,16\]",
        ),
        ({"x": np.ones((2, 3, 16), np.float32)}, r"x must be .*got float32\[2,3,16\]"),
        ({"x": np.ones((2, 3, 16), BF16)}, r"x of 16 bits .* is 1; got block \(1, 0\) and float32"),
        (
            {"x": np.ones((2, 3, 16), BF16), "x_block": (0, 0)},
            r"got .*\(0, 0\) and float32\[2,3,1\]",
        ),
        ({"w": np.ones((2, 16, 16), BF16)}, r"w must be .*got bfloat16\[2,16,16\]"),
        (
            {"w": np.ones((16, 16), E4M3)},
            r"w must be \(batch, rows, K\) .*got float8_e4m3fn\[16,16\]",
        ),
        ({"w": np.ones((2, 16, 16), np.int8)}, r"w must be .*got dtype \d+\[2,16,16\]"),
        ({"x_block": (2, 0)}, r"unknown block \(2, 0\) of x"),
        ({"w_block": (0, 128)}, r"unknown block \(0, 128\) of w"),
        ({"x_scale": np.ones((2, 1, 1), np.float32)}, r"scale of x must be float32\[2,3,1\]"),
        ({"x_scale": np.ones((1, 3, 1), np.float32)}, r"scale of x must be float32\[2,3,1\]"),
        ({"x_scale": np.ones((2, 3, 1), BF16)}, r"scale of x must be .*got bfloat16\[2,3,1\]"),
        ({"w_scale": np.ones((3, 1, 1), np.float32)}, r"scale of w must be float32\[2,1,1\]"),
        ({"w_scale": np.ones((1,), np.float32)}, r"scale of w must be .*got float32\[1\]"),
        ({"w": np.ones((2, 16, 32), E4M3)}, r"\(B, M, K\) and w \(B, N, K\), got .*\[2,16,32\]"),
        ({"w": np.ones((1, 16, 16), E4M3)}, r"\(B, M, K\) and w \(B, N, K\), got .*\[1,16,16\]"),
        ({"d": ((2, 16, 3), BF16)}, r"the result must be \(B, M, N\) .*got bfloat16\[2,16,3\]"),
        ({"d": ((2, 3, 16), jnp.int32)}, r"the result must be .*got dtype \d+\[2,3,16\]"),
        ({"d": ((2, 3, 16), E4M3)}, r"an FP8 result, and no other, .*got float8_e4m3fn\[2,3,16\]"),
        ({"amax": ((1,), F32)}, r"an FP8 result, and no other, .*got bfloat16\[2,3,16\]"),
        ({"inverse_out_scale": np.ones(1, np.float32)}, r"an FP8 result, and no other"),
        ({"bias": np.ones(3, np.float32)}, r"the bias must be \(N,\) .*got float32\[3\]"),
        ({"bias": np.ones((1, 16), np.float32)}, r"the bias must be .*got float32\[1,16\]"),
        ({"bias": np.ones(16, E4M3)}, r"the bias must be .*got float8_e4m3fn\[16\]"),
        ({"activation": "silu"}, "activation must be none, relu or gelu, got silu"),
        ({"implementation": "magic"}, "implementation 'magic' cannot multiply x float8_e4m3fn"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_scaled_matmul_refuses(handlers, changed, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match="jax_fp8_scaled_matmul: .*" + message):
        jax.block_until_ready(product_call(**changed))


def test_after_a_refusal_the_next_call_runs(handlers):
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(product_call(activation="silu"))
    assert float(product_call()[0][0, 0, 0]) == 16


def test_results_have_the_type_of_the_operands(rng):
    """ScaledArrays of a jitted function, abstractly: what shard_map and scan look at."""
    x = jax.ShapeDtypeStruct((4, 32), jnp.float32)
    q, amax = jax.eval_shape(lambda x: jax_fp8.quantize(x, return_amax=True), x)
    assert (q.data.shape, q.data.dtype, q.scale.shape, amax.dtype) == ((4, 32), E4M3, (1, 1), F32)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(q))
