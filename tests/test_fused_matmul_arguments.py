"""fused_matmul: the arguments that it refuses, and its handler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fp8
from jax_fp8._src import ffi


def arrays(m=2, n=8, k=32, dtype=jnp.bfloat16):
    w = jax_fp8.quantize(jnp.ones((n, k)), granularity="row")
    return {"x": jnp.ones((m, k), dtype), "w": w}


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"w": jnp.ones((8, 32))}, TypeError, "w must be a jax_fp8.ScaledArray"),
        ({"x": jnp.ones((2, 32))}, TypeError, r"x must be bfloat16 or float16, got float32\(2, 32"),
        ({"x": jnp.ones((2, 32), int)}, TypeError, "x must be float32, bfloat16 or float16, got"),
        ({"x": jnp.ones((2, 16), jnp.bfloat16)}, ValueError, r"got \(2, 16\) and \(8, 32\)"),
        ({"x": jnp.ones((), jnp.bfloat16)}, ValueError, r"got \(\) and \(8, 32\)"),
        ({"w": jax_fp8.quantize(jnp.ones((2, 8, 32)))}, ValueError, r"\(N, K\), got"),
        ({"norm": jnp.ones(8)}, ValueError, r"norm must be of shape \(32,\) .*got \(8,\)"),
        ({"norm": jnp.ones(32, int)}, TypeError, "norm must be float32, bfloat16 or float16"),
        ({"bias": jnp.ones(32)}, ValueError, r"bias must be of shape \(8,\) .*got \(32,\)"),
        ({"residual": jnp.ones((2, 4), jnp.bfloat16)}, ValueError, r"bfloat16\(2, 8\), got"),
        ({"residual": jnp.ones((2, 8))}, TypeError, r"bfloat16\(2, 8\), got float32\(2, 8\)"),
        ({"activation": "gelu"}, ValueError, "unknown activation 'gelu'; accepted are"),
        ({"recipe": "tensorwise"}, ValueError, "unknown recipe 'tensorwise'; accepted are"),
        ({"recipe": "static"}, ValueError, "a scale goes with .* got 'static' and no scale"),
        ({"scale": 1.0}, ValueError, "a scale goes with .* got 'weight_only' and a scale"),
        ({"recipe": "static", "scale": jnp.ones(2)}, ValueError, r"scale of shape \(2,\)"),
        ({"recipe": "static", "scale": 1}, TypeError, "scale must be float32, got int32"),
        ({**arrays(n=7), "activation": "swiglu"}, ValueError, r"for swiglu, got \(7, 32\)"),
        ({"implementation": "gemv"}, ValueError, "unknown implementation 'gemv'; accepted"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1"),
        ({"eps": jnp.ones(())}, TypeError, "eps must be a number"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=f"^fused_matmul: .*{message}"):
        jax_fp8.fused_matmul(**{**arrays(), **changed})


GIVEN = {
    "x": np.ones((2, 32), jnp.bfloat16),
    "x_scale": np.ones((1, 1), np.float32),
    "w": np.ones((8, 32), jnp.float8_e4m3fn),
    "w_scale": np.ones((8, 1), np.float32),
    "bias": np.zeros((0,), np.float32),
    "norm": np.zeros((0,), np.float32),
    "residual": np.zeros((0,), np.float32),
    "given": np.zeros((0,), np.float32),
    "d": ((2, 8), jnp.bfloat16),
    "multiplied": ((2, 32), jnp.bfloat16),
    "scales": ((0, 1), jnp.float32),
    "sums": ((2, 8), jnp.float32),
    "eps": [0.0],
    "swiglu": [0],
    "added": [-1],
    "workspace": 0,
}
LINK = ("w", "w_scale", "bias", "norm", "residual", "given")


def call(links=1, **changed):
    """Calls the target with arguments that fit, but for those that are changed."""
    given = {**GIVEN, **changed}
    ffi.register()
    names = ("d", "multiplied", "scales", "sums")
    results = [jax.ShapeDtypeStruct(*given[name]) for name in names] * links
    results.append(jax.ShapeDtypeStruct((given["workspace"],), jnp.uint8))
    return jax.ffi.ffi_call("jax_fp8_fused_matmul", results)(
        *(jnp.asarray(given[name]) for name in ("x", "x_scale", *LINK * links)),
        eps=np.array(given["eps"], np.float32),
        swiglu=np.array(given["swiglu"], np.int64),
        added=np.array(given["added"], np.int64),
        implementation="",
        capability=np.int64(0),
    )[-5]


QUANTIZED = {"multiplied": ((2, 32), jnp.float8_e4m3fn), "scales": ((2, 1), jnp.float32)}
STATIC = {**QUANTIZED, "given": np.full((1, 1), 0.5, np.float32)}
#: Sums in bfloat16, and none where nothing is done to them.
MANY = {"sums": ((0, 8), jnp.bfloat16), "workspace": 32 << 20}
MANY_OF_SQUARE = {"sums": ((0, 32), jnp.bfloat16), "workspace": 32 << 20}


#: Two links, of which the second multiplies the result of the first.
SQUARE = {
    "w": np.ones((32, 32), jnp.float8_e4m3fn),
    "w_scale": np.ones((32, 1), np.float32),
    "d": ((2, 32), jnp.bfloat16),
    "sums": ((2, 32), jnp.float32),
    "eps": [0.0, 0.0],
    "swiglu": [0, 0],
    "added": [-1, -1],
    "links": 2,
}
RESIDUAL = {"residual": np.ones((2, 32), jnp.bfloat16)}


@pytest.mark.parametrize(
    "changed", [{}, QUANTIZED, STATIC], ids=["weight_only", "rowwise", "static"]
)
def test_a_call_that_fits(handlers, changed):
    assert call(**changed).tolist() == [[32.0] * 8] * 2
    assert call(**changed, **SQUARE).tolist() == [[1024.0] * 32] * 2
    assert call(**changed, **{**SQUARE, "added": [-1, 0]}).tolist() == [[1056.0] * 32] * 2
    if changed:
        assert call(**changed, **MANY).tolist() == [[32.0] * 8] * 2
        assert call(**{**changed, **SQUARE, **MANY_OF_SQUARE}).tolist() == [[1024.0] * 32] * 2


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": np.ones((2, 1, 32), jnp.bfloat16)}, r"x must be \(M, K\) .*bfloat16\[2,1,32\]"),
        ({"x": np.ones((2, 16), jnp.bfloat16)}, r"x must be .*bfloat16\[2,16\] and float8"),
        ({"x": np.ones((2, 32), np.float32)}, r"x must be .*got float32\[2,32\]"),
        ({"w": np.ones((8, 32), jnp.float8_e5m2)}, r"w \(N, K\) of float8_e4m3fn, got .*e5m2"),
        ({"x_scale": np.ones((2, 1), np.float32)}, r"the scale of x, which is 1.*float32\[2,1\]"),
        ({"w_scale": np.ones((2, 1), np.float32)}, r"float32\[8,1\]; got .* and float32\[2,1\]"),
        ({"bias": np.ones(2, np.float32)}, r"the bias must be \(N,\) .*got float32\[2\]"),
        ({"bias": np.ones(8, np.int32)}, r"the bias must be \(N,\) of float32, bfloat16"),
        ({"norm": np.ones(32, np.float32)}, r"weight must be bfloat16\[32\], got float32\[32\]"),
        ({"residual": np.ones((2, 4), jnp.bfloat16)}, r"must be bfloat16\[2,8\], got .*\[2,4\]"),
        ({"swiglu": [1]}, r"result and residual must be bfloat16\[2,4\]"),
        ({"d": ((2, 8), jnp.float32)}, r"must be bfloat16\[2,8\], got float32\[2,8\]"),
        ({"multiplied": ((2, 8), jnp.bfloat16)}, "scratch must be bfloat16 for x, or float8"),
        ({**QUANTIZED, "scales": ((1, 1), jnp.float32)}, r"with float32 scales .*float32\[1,1\]"),
        ({"scales": ((2, 1), jnp.float32)}, r"scratch must be bfloat16 .*float32\[2,1\]"),
        ({"sums": ((2, 4), jnp.float32)}, "scratch must be bfloat16 for x, or float8"),
        ({"eps": [-1.0]}, "eps must be finite and not negative, got -1"),
        ({"eps": [np.nan]}, "eps must be finite and not negative"),
        ({"sums": ((0, 8), jnp.float32)}, "scratch must be bfloat16 for x, or float8"),
        ({**QUANTIZED, "sums": ((2, 8), jnp.bfloat16)}, r"scratch must .*bfloat16\[2,8\]"),
        ({**QUANTIZED, **MANY, "swiglu": [1], "d": ((2, 4), jnp.bfloat16)}, "scratch must be"),
        ({"given": STATIC["given"]}, r"a static scale must be .* x quantized, got float32\[1,1\]"),
        ({**QUANTIZED, "given": np.ones(2, np.float32)}, r"a static scale .*got float32\[2\]"),
        ({"eps": [0.0, 0.0]}, "6 arguments, 4 results .* got 6, 5 and 2, 1, 1"),
        ({"swiglu": [0, 0]}, "got 6, 5 and 1, 2, 1"),
        ({"swiglu": [2]}, "swiglu must be 0 or 1, got 2 for link 0"),
        ({"added": [-2]}, "link 0 adds the result of link -2"),
        ({"added": [-1, -1]}, "got 6, 5 and 1, 1, 2"),
        ({"links": 2}, "got 12, 9 and 1, 1, 1"),
        ({"added": [0]}, r"link 0 adds the result of link 0, which must be before it"),
        ({**SQUARE, "added": [-1, 1]}, "link 1 adds the result of link 1"),
        ({**SQUARE, **RESIDUAL, "added": [-1, 0]}, r"link 0, .* before it, and bfloat16\[2,32\]"),
        ({**SQUARE, "d": ((2, 8), jnp.bfloat16)}, r"must be bfloat16\[2,32\], got bfloat16\[2,8"),
    ],
)
def test_the_handler_checks_what_it_gets(handlers, changed, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match="jax_fp8_fused_matmul: .*" + message):
        jax.block_until_ready(call(**changed))


def test_the_handler_refuses_an_odd_swiglu(handlers):
    changed = {
        "w": np.ones((7, 32), jnp.float8_e4m3fn),
        "w_scale": np.ones((1, 1), np.float32),
        "swiglu": [1],
    }
    with pytest.raises(jax.errors.JaxRuntimeError, match="swiglu takes an even N, got w .*7,32"):
        jax.block_until_ready(call(**changed))
