"""cast_transpose as a function: what it takes, refuses and returns, and vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import pair_id, sample

import jax_fp8
from jax_fp8._src import ffi

granularities = pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)


def test_returns_both_layouts(quantizer, rng):
    x = sample(rng, "normal", (2, 3, 130))
    options = {"dtype": jnp.float8_e5m2, "granularity": [1, 128], "implementation": quantizer}
    straight, transposed = jax_fp8.cast_transpose(x, **options)
    assert (straight.dtype, straight.shape, straight.granularity) == (ref.E5M2, x.shape, (1, 128))
    assert (transposed.dtype, transposed.shape) == (ref.E5M2, (2, 130, 3))
    assert (straight.scale.shape, transposed.scale.shape) == ((2, 3, 2), (2, 130, 1))
    ref.assert_same_trees(straight, jax_fp8.quantize(x, **options))
    ref.assert_same_trees(transposed, jax_fp8.quantize(np.swapaxes(x, 1, 2), **options))


def test_the_default_is_e4m3_for_each_tensor(rng):
    straight, transposed = jax_fp8.cast_transpose(sample(rng, "normal", (3, 16)))
    assert (straight.dtype, straight.granularity, straight.scale.shape) == (
        ref.E4M3,
        "tensor",
        (1, 1),
    )
    ref.assert_same_bits(transposed.data, np.asarray(straight.data).T)


@granularities
def test_the_same_bits_in_every_wrapper(quantizer, rng, granularity):
    x = jnp.asarray(sample(rng, "heavy", (5, 300, 264)), jnp.bfloat16)

    def cast(x, key):
        return jax_fp8.cast_transpose(x, granularity=granularity, key=key, implementation=quantizer)

    key = jax.random.key(7) if isinstance(granularity, str) else None
    want = cast(x, key)
    for wrapped in (cast, jax.jit(jax.checkpoint(cast))):
        ref.assert_same_trees(wrapped(x, key), want)


# --- vmap -----------------------------------------------------------------------------------------


@granularities
@pytest.mark.parametrize("mode", ["dynamic", "static", "stochastic"])
def test_vmap_is_a_loop(quantizer, rng, granularity, mode):
    if mode == "static" and granularity != "tensor":
        return
    x = sample(rng, "heavy", (2, 3, 2, 130, 12))
    scale = np.exp(rng.standard_normal((2, 3))).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), (2, 3))

    def cast(x, scale, key):
        return jax_fp8.cast_transpose(
            x,
            granularity=granularity,
            scale=scale if mode == "static" else None,
            key=key if mode == "stochastic" else None,
            return_amax=granularity == "tensor",
            implementation=quantizer,
        )

    nested = jax.vmap(jax.vmap(cast))(x, scale, keys)
    for index in np.ndindex(2, 3):
        want = cast(x[index], scale[index], keys[index])
        ref.assert_same_trees(jax.tree.map(lambda leaf, i=index: leaf[i], nested), want)


def test_vmap_over_x_alone_and_over_all_but_x(quantizer, rng):
    x = sample(rng, "heavy", (3, 20, 36))
    keys = jax.random.split(jax.random.key(3), 3)
    scales = np.float32([0.5, 0.25, 2.0])

    def cast(x, scale, key):
        return jax_fp8.cast_transpose(x, scale=scale, key=key, implementation=quantizer)

    over_x = jax.vmap(cast, in_axes=(0, None, None))(x, scales[0], keys[0])
    over_others = jax.vmap(cast, in_axes=(None, 0, 0))(x[0], scales, keys)
    for i in range(3):
        one, other = (jax.tree.map(lambda leaf, i=i: leaf[i], t) for t in (over_x, over_others))
        ref.assert_same_trees(one, cast(x[i], scales[0], keys[0]))
        ref.assert_same_trees(other, cast(x[0], scales[i], keys[i]))


def test_vmap_of_nothing(quantizer):
    cast = jax.vmap(lambda x: jax_fp8.cast_transpose(x, implementation=quantizer))
    straight, transposed = cast(jnp.zeros((0, 3, 16)))
    assert (straight.shape, straight.scale.shape) == ((0, 3, 16), (0, 1, 1))
    assert (transposed.shape, transposed.scale.shape) == ((0, 16, 3), (0, 1, 1))


# --- The journal ----------------------------------------------------------------------------------


def test_the_journal_says_what_ran(handlers, rng):
    jax_fp8.clear_plans()
    x = jnp.asarray(sample(rng, "normal", (2, 3, 40)), jnp.bfloat16)
    options = {"granularity": "row", "key": jax.random.key(0), "straight": False}
    jax.block_until_ready(jax_fp8.cast_transpose(x, implementation="kernel", **options))
    (plan,) = jax_fp8.plans()
    assert plan["platform"] in ("cpu", "cuda")
    del plan["platform"]
    assert plan == {
        "operation": "cast_transpose",
        "implementation": "kernel",
        "when": "run",
        "count": 1,
        "shape": [2, 3, 40],
        "dtypes": ["bfloat16", "float8_e4m3fn"],
        "granularity": "row",
        "scaling": "dynamic",
        "layouts": ["transposed"],
        "rounding": "stochastic",
    }


def test_the_journal_says_what_xla_was_left(rng):
    jax_fp8.clear_plans()
    jax_fp8.cast_transpose(sample(rng, "normal", (5, 41)), implementation="xla")
    (plan,) = jax_fp8.plans()
    assert (plan["operation"], plan["when"]) == ("cast_transpose", "traced")
    assert plan["layouts"] == ("straight", "transposed")


# --- Errors ---------------------------------------------------------------------------------------

KEY = np.zeros(2, np.uint32)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dtype": jnp.bfloat16}, TypeError, "dtype must be float8_e4m3fn or .*got bfloat16"),
        ({"granularity": "channel"}, ValueError, "unknown granularity 'channel'; accepted are"),
        ({"implementation": "naive"}, ValueError, "unknown implementation 'naive'; accepted"),
        ({"straight": False, "transposed": False}, ValueError, "at least one of straight and"),
        (
            {"granularity": "row", "scale": 1.0},
            ValueError,
            "a static scale is for granularity 'tensor', got 'row'",
        ),
        (
            {"granularity": (1, 128), "return_amax": True},
            ValueError,
            r"an amax is for granularity 'tensor', got \(1, 128\)",
        ),
        ({"scale": 1.0, "power_of_two": True}, ValueError, "power_of_two is for dynamic scales"),
        ({"scale": 1}, TypeError, "scale must be float32, got int32"),
        ({"scale": np.ones((2, 1))}, ValueError, r"scale of shape \(2, 1\) does not fit"),
        ({"key": 3}, TypeError, "key must be a jax.random.key of impl 'threefry2x32', .*got a int"),
        ({"key": KEY.astype(np.int32)}, TypeError, r"key must be .*got int32\(2,\)"),
        ({"key": np.zeros(4, np.uint32)}, TypeError, r"key must be .*got uint32\(4,\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match="cast_transpose: " + message):
        jax_fp8.cast_transpose(jnp.ones((2, 3)), **options)


def test_bad_keys_of_jax():
    for key in (jax.random.key(0, impl="rbg"), jax.random.split(jax.random.key(0), 2)):
        with pytest.raises(TypeError, match=r"cast_transpose: key must be .*got key<"):
            jax_fp8.cast_transpose(jnp.ones((2, 3)), key=key)


def test_bad_x():
    with pytest.raises(TypeError, match=r"cast_transpose: x must be float32, .*got int32\(2, 3\)"):
        jax_fp8.cast_transpose(jnp.ones((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="cast_transpose: x must have rows and columns, got rank"):
        jax_fp8.cast_transpose(jnp.ones(5))


def test_differentiation_raises(quantizer):
    def total(x):
        straight, _ = jax_fp8.cast_transpose(x, implementation=quantizer)
        return jax_fp8.dequantize(straight).sum()

    with pytest.raises(NotImplementedError, match="cast_transpose: .*jax.lax.stop_gradient"):
        jax.grad(total)(jnp.ones((2, 3)))


# --- What the handler refuses ---------------------------------------------------------------------

F32, BF16, E4M3, E5M2 = jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2
RESULTS = ("straight", "transposed", "straight_scale", "transposed_scale", "amax", "scratch")


def call(**changed):
    """Calls the target with arguments that fit, but for those that are changed."""
    given = {
        "x": np.ones((2, 3, 16), np.float32),
        "scale": np.zeros((0,), np.float32),
        "keys": np.zeros((0,), np.uint32),
        "straight": ((2, 3, 16), E4M3),
        "transposed": ((2, 16, 3), E4M3),
        "straight_scale": ((2, 3, 1), F32),
        "transposed_scale": ((2, 16, 1), F32),
        "amax": ((0,), F32),
        "scratch": ((38,), jnp.uint32),
        "entries": 1,
        "block": (1, 0),
        "power_of_two": False,
        **changed,
    }
    ffi.register()
    results = [jax.ShapeDtypeStruct(*given[name]) for name in RESULTS]
    return jax.ffi.ffi_call("jax_fp8_cast_transpose", results)(
        *(jnp.asarray(given[name]) for name in ("x", "scale", "keys")),
        entries=np.int64(given["entries"]),
        block_rows=np.int64(given["block"][0]),
        block_cols=np.int64(given["block"][1]),
        power_of_two=given["power_of_two"],
    )


NONE = ((0,), F32)
TENSOR = {
    "block": (0, 0),
    "straight_scale": ((1, 1, 1), F32),
    "transposed_scale": ((1, 1, 1), F32),
    "amax": ((1, 1, 1), F32),
    "scratch": ((1024,), jnp.uint32),
}
STATIC = {**TENSOR, "scale": np.ones((1, 1, 1), np.float32)}
#: Of the 6 rows, and then of the 32 columns.
AMAXES = np.arange(1, 39, dtype=np.float32)
KNOWN = {"scale": AMAXES, "scratch": ((0,), jnp.uint32)}


def test_calls_that_fit_run(handlers):
    straight, transposed, straight_scale, transposed_scale, *_ = call()
    for array in (straight_scale, transposed_scale):
        assert (np.asarray(array) == np.float32(1 / 448)).all()
    for array in (straight, transposed):
        assert (np.asarray(array).astype(np.float32) == 448).all()
    assert float(call(**TENSOR)[4][0, 0, 0]) == 1
    assert float(call(**STATIC)[0][0, 0, 0]) == 1


def test_amaxes_that_are_known(handlers):
    straight, transposed, straight_scale, transposed_scale, *_ = call(**KNOWN)
    want = AMAXES / np.float32(448)
    for data, scale, part in (
        (straight, straight_scale, want[:6]),
        (transposed, transposed_scale, want[6:]),
    ):
        assert np.array_equal(np.asarray(scale).ravel(), part)
        codes = (1 / part).astype(E4M3).astype(np.float32).reshape(scale.shape)
        assert (np.asarray(data).astype(np.float32) == codes).all()


@pytest.mark.parametrize("dtype", ref.WIDE, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 16), (3, 300, 520), (2, 129, 33), (2, 0, 5)])
def test_line_amaxes(handlers, rng, shape, dtype):
    """Of rows and of columns, where NaN is the largest, and infinity next."""
    x = rng.standard_normal(shape).astype(dtype)
    if x.size > 1:
        x[0, 0, 1], x[-1, -1, -1] = np.nan, -np.inf
    found = np.asarray(ffi.line_amaxes(jnp.asarray(x)))
    bits = np.abs(x.astype(np.float32)).view(np.uint32)
    want = [bits.max(axis=axis, initial=0).ravel() for axis in (2, 1)]
    assert np.array_equal(found.view(np.uint32) & 0x7FC00000, np.concatenate(want) & 0x7FC00000)
    finite = np.isfinite(found)
    assert np.array_equal(found[finite], np.concatenate(want).view(np.float32)[finite])


def test_line_amaxes_refuses(handlers):
    for x in (np.ones((3, 4), np.float32), np.ones((1, 3, 4), E4M3)):
        result = jax.ShapeDtypeStruct((7,), jnp.float32)
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"jax_fp8_line_amaxes: x must be"):
            jax.block_until_ready(jax.ffi.ffi_call("jax_fp8_line_amaxes", result)(jnp.asarray(x)))
    result = jax.ShapeDtypeStruct((6,), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"float32\[7\], got float32\[6\]"):
        jax.block_until_ready(
            jax.ffi.ffi_call("jax_fp8_line_amaxes", result)(jnp.ones((1, 3, 4), jnp.float32))
        )


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": np.ones((3, 16), np.float32)}, r"x must be \(batch, rows, .*got float32\[3,16\]"),
        ({"x": np.ones((2, 3, 16), E4M3)}, r"x must be .*got float8_e4m3fn\[2,3,16\]"),
        ({"straight": ((2, 3, 8), E4M3)}, r"straight data .*\[2,3,16\], got .*\[2,3,8\]"),
        ({"transposed": ((2, 3, 16), E4M3)}, r"transposed data .*\[2,16,3\], got .*\[2,3,16\]"),
        ({"transposed": ((2, 16, 3), E5M2)}, r"transposed data must .*got float8_e5m2\[2,16,3\]"),
        ({"straight": ((2, 3, 16), BF16)}, r"straight data must be .*got bfloat16"),
        (
            {"straight": ((0,), E4M3), "transposed": ((0,), E4M3)}
            | {"straight_scale": NONE, "transposed_scale": NONE},
            "no layout is asked for",
        ),
        ({"straight_scale": NONE}, r"straight scale must be float32\[2,3,1\].*got float32\[0\]"),
        ({"transposed_scale": ((2, 3, 1), F32)}, r"transposed scale must be float32\[2,16,1\]"),
        ({"block": (128, 0)}, r"unknown block \(128, 0\)"),
        ({"entries": 3}, r"the batch of x float32\[2,3,16\] has no 3 equal parts"),
        ({"scale": np.ones((1, 1, 1), np.float32)}, r"a static scale must be .*block \(1, 0\)"),
        ({**KNOWN, "scale": AMAXES[1:]}, r"amaxes .* float32\[38\], with row .*got float32\[37\]"),
        ({**KNOWN, "block": (1, 128)}, r"straight scale must|with row scales, got float32\[38\]"),
        ({**STATIC, "power_of_two": True}, "a static scale must be .*not be a power of two"),
        ({**STATIC, "scale": np.ones((2,), np.float32)}, r"static scale .*got float32\[2\]"),
        ({**TENSOR, "amax": NONE}, r"the amax must be float32\[1,1,1\] .*got float32\[0\]"),
        ({"amax": ((1, 1, 1), F32)}, r"the amax must be .*got float32\[1,1,1\]"),
        ({"keys": np.zeros((2, 2), np.uint32)}, r"the keys must be uint32\[1,2\]"),
        ({"keys": np.zeros((1, 2), np.int32)}, r"the keys must be uint32\[1,2\]"),
        ({"scratch": ((37,), jnp.uint32)}, "scratch of 152 bytes, got 148"),
        ({**TENSOR, "scratch": ((1023,), jnp.uint32)}, "scratch of 4096 bytes, got 4092"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_handler_refuses(handlers, changed, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match="jax_fp8_cast_transpose: .*" + message):
        jax.block_until_ready(call(**changed))
