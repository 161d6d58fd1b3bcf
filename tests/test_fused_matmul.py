"""fused_matmul: its values against float64, what it takes and refuses, and what runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from around_cases import ALL, COMBINATIONS, EPS, expected, operands
from cases import on_gpu, scaled

import jax_fp8
from jax_fp8._src import ffi


@pytest.fixture
def implementation(quantizer):
    """Of fused_matmul: it has those of quantize."""
    return quantizer


def multiplies_first(implementation):
    """Whether x times the norm's weight is what is rounded: in the one kernel of the GPU."""
    return ref.on_gpu() and implementation in (None, "kernel")


def check(x, w, around, implementation, first=None):
    first = multiplies_first(implementation) if first is None else first
    got = jax_fp8.fused_matmul(x, w, eps=EPS, implementation=implementation, **around)
    assert got.dtype == x.dtype
    y, error = expected(x, w, first=first, **around)
    ref.assert_close(got, y, error)
    return got


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_every_combination(implementation, rng, parts, granularity):
    for m in (1, 3, 8):
        check(*operands(rng, m, 300, 528, parts, granularity), implementation)


@pytest.mark.parametrize("m", range(1, 9))
@pytest.mark.parametrize(
    "size", [(2, 16), (34, 144), (36, 1024), (6, 4096), *on_gpu((9000, 272), (1000, 5104))], ids=str
)
def test_every_end(implementation, rng, m, size):
    check(*operands(rng, m, *size, ALL), implementation)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "m, n, k", [(1, 6144, 4096), (1, 40, 24064), (4, 28672, 4096), (8, 4096, 5104)], ids=str
)
def test_the_sizes_of_models(rng, m, n, k):
    check(*operands(rng, m, n, k, ("norm", "swiglu")), "kernel")
    check(*operands(rng, m, n, k, ("residual",)), "kernel")


def test_axes_of_rows(implementation, rng):
    x, w, around = operands(rng, 6, 40, 64, ALL)
    flat = check(x, w, around, implementation)
    for shape in ((2, 3), (6, 1), (1, 2, 3)):
        residual = around["residual"].reshape(*shape, 20)
        got = jax_fp8.fused_matmul(
            x.reshape(*shape, 64),
            w,
            **{**around, "residual": residual},
            eps=EPS,
            implementation=implementation,
        )
        ref.assert_same_bits(got, flat.reshape(*shape, 20))
    around["residual"] = around["residual"][0]
    one = jax_fp8.fused_matmul(x[0], w, **around, eps=EPS, implementation=implementation)
    ref.assert_same_bits(one, flat[0])


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": ref.F16},
        {"w_dtype": ref.E5M2},
        {"granularity": (1, 128)},
        {"granularity": (128, 128)},
        {"m": 9},
        {"k": 104},
        {"m": 8, "k": 8192},
    ],
    ids=str,
)
def test_what_the_one_kernel_does_not_take(rng, changed):
    given = {"m": 3, "n": 40, "k": 256, "parts": ALL, **changed}
    x, w, around = operands(rng, **given)
    for implementation in ("xla", None):
        check(x, w, around, implementation, first=False)
    with pytest.raises(NotImplementedError, match="fused_matmul: implementation 'kernel' cannot"):
        jax_fp8.fused_matmul(x, w, **around, implementation="kernel")


def test_a_wide_norm_and_biases_of_every_type(implementation, rng):
    x, w, around = operands(rng, 3, 40, 256, ("norm",))
    for dtype in ref.WIDE:
        bias = jnp.asarray(rng.standard_normal(40), dtype)
        check(x, w, {"bias": bias}, implementation)
    around["norm"] = jnp.asarray(around["norm"], jnp.float32) * 1.001
    if implementation == "kernel":
        with pytest.raises(NotImplementedError, match="a bfloat16 norm, not float32"):
            jax_fp8.fused_matmul(x, w, **around, implementation="kernel")
    else:
        check(x, w, around, implementation, first=False)


@pytest.mark.parametrize("parts", [(), ("norm",), ("swiglu",), ALL], ids="+".join)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(implementation, rng, parts, value):
    x, w, around = operands(rng, 4, 40, 256, parts)
    # No weight is 0 where the value is.
    w = scaled(w.data.at[:, 7].set(1), w.scale, "row")
    clean = check(x.at[2].set(1), w, around, implementation)
    x = x.at[2, 7].set(value)
    after = np.asarray(jax_fp8.fused_matmul(x, w, **around, eps=EPS, implementation=implementation))
    bad = after[2].astype(np.float64)
    # The gate of -inf is 0, and 0 times an infinity NaN: nothing becomes finite.
    assert not np.isfinite(bad).any()
    if "norm" in parts:
        assert np.isnan(bad).all()
    ref.assert_same_bits(np.delete(after, 2, 0), np.delete(np.asarray(clean), 2, 0))


def test_a_sum_of_squares_that_overflows_is_nan(implementation, rng):
    x, w, around = operands(rng, 2, 40, 256, ("norm",))
    x = x.at[1].set(1e20)
    got = np.asarray(jax_fp8.fused_matmul(x, w, **around, implementation=implementation))
    assert np.isfinite(got[0].astype(np.float32)).all() and np.isnan(got[1]).all()


def test_a_nan_of_the_other_operands(implementation, rng):
    x, w, around = operands(rng, 3, 40, 256, ALL)
    for name, index, (rows, columns) in (
        ("residual", (1, 5), ([1], [5])),
        ("bias", 24, (range(3), [4])),
        ("norm", 9, (range(3), range(20))),
    ):
        changed = {**around, name: around[name].at[index].set(jnp.nan)}
        got = jax_fp8.fused_matmul(x, w, **changed, implementation=implementation)
        want = np.zeros((3, 20), bool)
        want[np.ix_(rows, columns)] = True
        np.testing.assert_array_equal(np.isnan(np.asarray(got)), want, err_msg=name)


def test_it_is_deterministic_under_jit_and_alone(implementation, rng):
    x, w, around = operands(rng, 8, 300, 1040, ALL)

    def run(x, w, around):
        return jax_fp8.fused_matmul(
            x, w, **around, activation="swiglu", eps=EPS, implementation=implementation
        )

    around.pop("activation")
    first = run(x, w, around)
    for _ in range(3):
        ref.assert_same_bits(jax.jit(run)(x, w, around), first)


def test_no_rows_and_no_columns(implementation, rng):
    x, w, around = operands(rng, 2, 40, 64, ("norm",))
    assert jax_fp8.fused_matmul(x[:0], w, **around, implementation=implementation).shape == (0, 40)
    none = scaled(w.data[:0], w.scale[:0], "row")
    assert jax_fp8.fused_matmul(x, none, implementation=implementation).shape == (2, 0)


# --- Transformations ------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", ["x", "residual", "x residual", "w", "norm bias", "all"])
def test_vmap_is_a_loop(implementation, rng, batched):
    names = ("x", "w", "norm", "bias", "residual") if batched == "all" else batched.split()
    made = [operands(rng, 2, 40, 64, ALL) for _ in range(3)]
    entries = [{"x": x, "w": w, **around} for x, w, around in made]
    for entry in entries:
        entry.pop("activation")

    def run(given):
        return jax_fp8.fused_matmul(
            **given, activation="swiglu", eps=EPS, implementation=implementation
        )

    def choose(entry, name):
        return (entry if name in names else entries[0])[name]

    loop = jnp.stack([run({name: choose(e, name) for name in e}) for e in entries])
    stacked = {
        name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(e[name] for e in entries))
        if name in names
        else entries[0][name]
        for name in entries[0]
    }
    axes = ({name: 0 if name in names else None for name in stacked},)
    got = jax.vmap(run, axes)(stacked)
    if implementation == "xla":  # XLA adds up in another order.
        got, loop = got.astype(jnp.float32), loop.astype(jnp.float32)
        np.testing.assert_allclose(got, loop, rtol=2.0**-7, atol=2.0**-7)
    else:
        ref.assert_same_bits(got, loop)


def test_vmap_of_more_rows_than_the_kernel_takes(implementation, rng):
    x, w, around = operands(rng, 2, 40, 64, ("norm", "bias"))
    many = jnp.stack([x + i for i in range(5)])

    def run(x):
        return jax_fp8.fused_matmul(x, w, **around, eps=EPS, implementation=implementation)

    got = jax.vmap(run)(many)
    for x, one in zip(many, got, strict=True):
        first = multiplies_first(implementation) and implementation == "kernel"
        ref.assert_close(one, *expected(x, w, **around, first=first))


def test_it_cannot_be_differentiated(implementation, rng):
    x, w, _ = operands(rng, 2, 40, 64, ())

    def loss(x):
        return jax_fp8.fused_matmul(x, w, implementation=implementation).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="fused_matmul: it cannot be differentiated"):
        jax.grad(loss)(x)


# --- What it refuses ------------------------------------------------------------------------------


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
    "d": ((2, 8), jnp.bfloat16),
    "normalized": ((2, 32), jnp.bfloat16),
    "sums": ((2, 8), jnp.float32),
    "eps": 0.0,
    "activation": "none",
}


def call(**changed):
    """Calls the target with arguments that fit, but for those that are changed."""
    given = {**GIVEN, **changed}
    ffi.register()
    results = [jax.ShapeDtypeStruct(*given[name]) for name in ("d", "normalized", "sums")]
    names = ("x", "x_scale", "w", "w_scale", "bias", "norm", "residual")
    return jax.ffi.ffi_call("jax_fp8_fused_matmul", results)(
        *(jnp.asarray(given[name]) for name in names),
        eps=np.float32(given["eps"]),
        activation=given["activation"],
        implementation="",
        capability=np.int64(0),
    )[0]


def test_a_call_that_fits(handlers):
    assert call().tolist() == [[32.0] * 8] * 2


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
        ({"activation": "swiglu"}, r"result and residual must be bfloat16\[2,4\]"),
        ({"d": ((2, 8), jnp.float32)}, r"must be bfloat16\[2,8\], got float32\[2,8\]"),
        ({"normalized": ((2, 8), jnp.bfloat16)}, "scratch must be bfloat16 for x and float32"),
        ({"sums": ((2, 4), jnp.float32)}, "scratch must be bfloat16 for x and float32"),
        ({"activation": "relu"}, "activation must be none or swiglu, got relu"),
        ({"eps": -1.0}, "eps must be finite and not negative, got -1"),
        ({"eps": np.nan}, "eps must be finite and not negative"),
    ],
)
def test_the_handler_checks_what_it_gets(handlers, changed, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match="jax_fp8_fused_matmul: .*" + message):
        jax.block_until_ready(call(**changed))


def test_the_handler_refuses_an_odd_swiglu(handlers):
    changed = {
        "w": np.ones((7, 32), jnp.float8_e4m3fn),
        "w_scale": np.ones((1, 1), np.float32),
        "activation": "swiglu",
    }
    with pytest.raises(jax.errors.JaxRuntimeError, match="swiglu takes an even N, got w .*7,32"):
        jax.block_until_ready(call(**changed))


# --- What runs ------------------------------------------------------------------------------------


def ran(*args, **options):
    jax_fp8.clear_plans()
    jax.block_until_ready(jax_fp8.fused_matmul(*args, **options))
    return {p["operation"]: p for p in jax_fp8.plans() if p["when"] == "run"}


@pytest.mark.gpu
def test_one_kernel_is_the_default(rng):
    x, w, around = operands(rng, 8, 40, 64, ALL)
    found = ran(x, w, **around)
    assert set(found) == {"fused_matmul"}
    assert found["fused_matmul"]["implementation"] == "gemv"
    assert found["fused_matmul"]["parts"] == "norm, product, bias, swiglu, residual"
    assert set(ran(*operands(rng, 9, 40, 64, ())[:2])) == {"scaled_matmul"}


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [75, 80, 89, 100, 120])
def test_other_gpus_take_steps(rng, forced_capability, capability):
    x, w, around = operands(rng, 5, 40, 272, ALL)
    forced_capability(capability)
    assert ran(x, w, **around)["fused_matmul"]["implementation"] == "steps"
    check(x, w, around, None, first=False)
    if capability == 100:  # It would run, but was never timed there.
        return
    with pytest.raises(jax.errors.JaxRuntimeError, match="implementation 'kernel' cannot .*9.0"):
        jax.block_until_ready(jax_fp8.fused_matmul(x, w, implementation="kernel"))


@pytest.mark.gpu
@pytest.mark.parametrize("of", ["w", "norm"])
@pytest.mark.parametrize("offset", [1, 8, 16])
def test_parts_of_larger_buffers(rng, offset, of):
    """What does not start at a multiple of 16 bytes goes in steps, unless XLA copies it."""
    x, w, around = operands(rng, 2, 40, 272, ALL)
    part = w.data if of == "w" else around["norm"]
    flat = jnp.concatenate([jnp.zeros(offset, part.dtype), part.reshape(-1)])

    @jax.jit
    def run(flat):
        found = flat[offset:].reshape(part.shape)
        changed = {} if of == "w" else {"norm": found}
        multiplied = scaled(found, w.scale, "row") if of == "w" else w
        return jax_fp8.fused_matmul(x, multiplied, **{**around, **changed}, eps=EPS)

    jax_fp8.clear_plans()
    got = np.asarray(run(flat))
    found = {p["implementation"] for p in jax_fp8.plans() if p["operation"] == "fused_matmul"}
    assert found in ({"gemv"}, {"steps"})
    assert found == {"gemv"} or offset * part.dtype.itemsize % 16
    y, error = expected(x, w, first=found == {"gemv"}, **around)
    ref.assert_close(got, y, error)
