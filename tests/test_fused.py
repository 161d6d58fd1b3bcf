"""The fused producers as functions: what they take, refuse and return, and vmap."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import pair_id, sample

import jax_fp8
from jax_fp8._src import ffi

GRANULARITIES = ("tensor", "row", (1, 128))
granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=pair_id)

#: As functions of x, weight and bias, of which they take what they need.
FUNCTIONS = {
    "rms_norm": lambda x, w, b, **options: jax_fp8.rms_norm_quantize(x, w, **options),
    "layer_norm": lambda x, w, b, **options: jax_fp8.layer_norm_quantize(x, w, b, **options),
    "swiglu": lambda x, w, b, **options: jax_fp8.swiglu_quantize(x, **options),
    "gelu": lambda x, w, b, **options: jax_fp8.gelu_quantize(x, **options),
}
producers = pytest.mark.parametrize("producer", FUNCTIONS)
norms = pytest.mark.parametrize("producer", ["rms_norm", "layer_norm"])


def operands(rng, shape, wide=ref.F32):
    return (
        jnp.asarray(sample(rng, "heavy", shape).astype(wide)),
        *(jnp.asarray(sample(rng, "normal", shape[-1:])) for _ in range(2)),
    )


def shape_of(producer, shape):
    return (*shape[:-1], shape[-1] // 2) if producer == "swiglu" else shape


@producers
@granularities
def test_returns_a_scaled_array(fuser, rng, producer, granularity):
    data = operands(rng, (2, 3, 300), ref.BF16)
    options = {
        "dtype": jnp.float8_e5m2,
        "granularity": list(granularity) if isinstance(granularity, tuple) else granularity,
        "implementation": fuser,
    }
    got = FUNCTIONS[producer](*data, **options)
    shape = shape_of(producer, (2, 3, 300))
    assert isinstance(got, jax_fp8.ScaledArray)
    assert (got.dtype, got.shape, got.granularity) == (ref.E5M2, shape, granularity)
    assert got.scale.shape == ref.scale_shape(shape, granularity)
    traced = jax.eval_shape(lambda *data: FUNCTIONS[producer](*data, **options), *data)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), traced) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), got
    )


@producers
def test_the_default_is_e4m3_for_each_tensor(rng, producer):
    got = FUNCTIONS[producer](*operands(rng, (3, 16)))
    assert (got.dtype, got.granularity, got.scale.shape) == (ref.E4M3, "tensor", (1, 1))


@norms
def test_a_residual_gives_the_sum_too(fuser, rng, producer):
    data = operands(rng, (3, 16), ref.BF16)
    got, total = FUNCTIONS[producer](*data, residual=data[0], implementation=fuser)
    assert got.shape == (3, 16)
    ref.assert_same_bits(total, 2 * data[0])


@producers
def test_the_product_takes_it(fuser, rng, producer):
    got = FUNCTIONS[producer](*operands(rng, (3, 64)), granularity="row", implementation=fuser)
    w = jax_fp8.quantize(sample(rng, "normal", (16, got.shape[-1])), granularity="row")
    assert jax_fp8.scaled_matmul(got, w).shape == (3, 16)


@producers
@granularities
def test_jit_gives_the_same_bits(handlers, rng, producer, granularity):
    # Of the handler alone: XLA may add in another order in another program.
    data = operands(rng, (5, 264), ref.BF16)

    def call(*data):
        return FUNCTIONS[producer](*data, granularity=granularity, implementation="kernel")

    ref.assert_same_trees(jax.jit(call)(*data), call(*data))
    ref.assert_same_trees(jax.jit(jax.checkpoint(call))(*data), call(*data))


@producers
@granularities
def test_zero_size(fuser, producer, granularity):
    for shape, static in itertools.product([(0, 128), (3, 0), (2, 0, 6), (0,)], [False, True]):
        want = ref.scale_shape(shape_of(producer, shape), granularity)
        x, w = jnp.zeros(shape), jnp.ones(shape[-1:])
        options = {"granularity": granularity, "implementation": fuser}
        scale = np.full(want, 0.5) if static else None
        got = FUNCTIONS[producer](x, w, w, scale=scale, **options)
        assert got.shape == shape_of(producer, shape)
        ref.assert_same_bits(got.scale, np.full(want, 0.5 if static else 1.0, np.float32))
        if producer.endswith("norm"):
            got, total = FUNCTIONS[producer](x, w, w, residual=x, scale=scale, **options)
            assert got.shape == total.shape == shape
            ref.assert_same_bits(got.scale, np.full(want, 0.5 if static else 1.0, np.float32))


# --- The journal ----------------------------------------------------------------------------------


@producers
def test_plans_tell_what_ran(handlers, rng, producer):
    jax_fp8.clear_plans()
    data = operands(rng, (2, 3, 32), ref.F16)
    for scale in (None, 1.0):
        got = FUNCTIONS[producer](*data, scale=scale, implementation="kernel")
        jax.block_until_ready(got)
    plans = {plan["scaling"]: plan for plan in jax_fp8.plans()}
    assert plans["dynamic"] == {
        "operation": f"{producer}_quantize",
        "implementation": "kernel",
        "platform": {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()],
        "when": "run",
        "count": 1,
        "shape": [1, 6, got.shape[-1]],
        "dtypes": ["float16", "float8_e4m3fn"],
        "granularity": "tensor",
        "scaling": "dynamic",
    }
    assert plans["static"] == {**plans["dynamic"], "scaling": "static"}
    jax_fp8.clear_plans()
    FUNCTIONS[producer](*data, implementation="xla")
    (plan,) = jax_fp8.plans()
    assert (plan["operation"], plan["when"]) == (f"{producer}_quantize", "traced")
    jax_fp8.clear_plans()


# --- vmap -----------------------------------------------------------------------------------------


@producers
@granularities
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_vmap_is_a_loop(handlers, rng, producer, granularity, static):
    x, weight, bias = operands(rng, (2, 3, 5, 140))
    weights = jnp.stack([weight, bias, weight * bias])
    shape = shape_of(producer, (5, 140))
    scale = np.exp(rng.standard_normal((2, 3, *ref.scale_shape(shape, granularity))) - 3)
    residual = {"residual": x[0, 0]} if producer.endswith("norm") else {}

    def call(x, weight, bias, scale):
        return FUNCTIONS[producer](
            x,
            weight,
            bias,
            granularity=granularity,
            scale=scale.astype(jnp.float32) if static else None,
            implementation="kernel",
            **residual,
        )

    inner = jax.vmap(call, in_axes=(0, None, None, 0))  # One weight for all of a batch,
    both = jax.vmap(inner, in_axes=(0, None, None, 0))(x, weight, bias, scale)
    other = jax.vmap(call, in_axes=(0, 0, None, -1))  # and one for each entry.
    each = jax.vmap(other, in_axes=(0, None, None, 0), out_axes=1)(
        x, weights, bias, np.moveaxis(scale, 1, -1)
    )
    for i, j in np.ndindex(2, 3):
        want = call(x[i, j], weight, bias, scale[i, j])
        ref.assert_same_trees(jax.tree.map(lambda leaf, at=(i, j): leaf[at], both), want)
        want = call(x[i, j], weights[j], bias, scale[i, j])
        ref.assert_same_trees(jax.tree.map(lambda leaf, at=(j, i): leaf[at], each), want)


@norms
def test_vmap_over_the_weights_alone(fuser, rng, producer):
    x, *_ = operands(rng, (4, 40))
    weights = jnp.asarray(sample(rng, "normal", (3, 40)))

    def call(weight):
        return FUNCTIONS[producer](x, weight, weight, granularity="row", implementation=fuser)

    got = jax.vmap(call)(weights)
    assert got.shape == (3, 4, 40) and got.scale.shape == (3, 4, 1)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], got)
        vectors = [weights[i]] * (2 if producer == "layer_norm" else 1)
        y, error = ref.fused(producer, x, *vectors, eps=1e-6, implementation=fuser)
        ref.assert_quantized(one, y, error)


def test_vmap_of_nothing(fuser):
    got = jax.vmap(lambda x: jax_fp8.gelu_quantize(x, implementation=fuser))(jnp.zeros((0, 3, 16)))
    assert (got.shape, got.scale.shape) == ((0, 3, 16), (0, 1, 1))


# --- Errors ---------------------------------------------------------------------------------------

ONE = jnp.ones(4)
X = jnp.ones((3, 4))
SAME = r"residual must have shape and dtype of x, float32\(3, 4\), got "


def check_error(producer, error, message, x=X, w=ONE, **options):
    with pytest.raises(error, match=f"{producer}_quantize: {message}"):
        FUNCTIONS[producer](x, w, ONE, **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"x": X.astype(int)}, TypeError, r"(x|gate_up) must be float32, .*got int32\(3, 4\)"),
        ({"x": jnp.float32(1)}, ValueError, "(x|gate_up) must have an axis of features, got rank"),
        ({"dtype": jnp.int8}, TypeError, "dtype must be float8_e4m3fn or float8_e5m2, got int8"),
        ({"granularity": "column"}, ValueError, "unknown granularity 'column'; accepted are"),
        ({"granularity": (128, 128)}, NotImplementedError, "granularity .* is for weights; acc"),
        ({"implementation": "naive"}, ValueError, "unknown implementation 'naive'; accepted are"),
        ({"scale": 1}, TypeError, "scale must be float32, got int32"),
        (
            {"scale": jnp.ones((4, 1)), "granularity": "row"},
            ValueError,
            r"scale of shape \(4, 1\) does not fit x of shape \(3, [24]\)",
        ),
    ],
    ids=str,
)
@producers
def test_bad_arguments(producer, options, error, message):
    check_error(producer, error, message, **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"w": jnp.ones(5)}, ValueError, r"weight must be of shape \(4,\) for x .*, got \(5,\)"),
        ({"w": ONE.astype(int)}, TypeError, r"weight must be float32, .*got int32\(4,\)"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps must be finite and not negative, got nan"),
        ({"eps": 1e39}, ValueError, "eps must be finite and not negative"),
        ({"eps": jnp.float32(1)}, TypeError, "eps must be a number of Python or numpy, got"),
        ({"residual": jnp.ones((2, 4))}, ValueError, SAME + r"float32\(2, 4\)"),
        ({"residual": X.astype(jnp.bfloat16)}, TypeError, SAME + r"bfloat16\(3, 4\)"),
        ({"residual": X.astype(int)}, TypeError, "residual must be float32, bfloat16 or float16"),
    ],
    ids=str,
)
@norms
def test_bad_arguments_of_norms(producer, options, error, message):
    check_error(producer, error, message, **options)


def test_a_bias_that_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"layer_norm_quantize: bias must be of shape \(4,\)"):
        jax_fp8.layer_norm_quantize(X, ONE, jnp.ones((1, 4)))


def test_gates_without_as_many_values_raise():
    with pytest.raises(ValueError, match=r"swiglu_quantize: the last axis .* got \(3, 5\)"):
        jax_fp8.swiglu_quantize(jnp.ones((3, 5)))


@producers
def test_differentiation_raises(fuser, producer):
    def total(x):
        return jax_fp8.dequantize(FUNCTIONS[producer](x, ONE, ONE, implementation=fuser)).sum()

    with pytest.raises(NotImplementedError, match=f"{producer}_quantize: .*jax.lax.stop_gradient"):
        jax.grad(total)(X)
    stopped = jax.grad(lambda x: total(jax.lax.stop_gradient(x)) + x.sum())(X)
    ref.assert_same_bits(stopped, np.ones((3, 4), np.float32))


# --- What the handler refuses by itself -----------------------------------------------------------

GOOD = {
    "producer": "rms_norm",
    "eps": 1e-6,
    "dtype": jnp.float8_e4m3fn,
    "block": (1, 0),
    "shape": (2, 3, 8),
    "scale_shape": (2, 3, 1),
}


def call_handler(x=(2, 3, 8), residual=None, weight=(1, 8), bias=None, given=None, **changed):
    def make(shape):
        return None if shape is None else jnp.ones(shape)

    made = tuple(map(make, (x, residual, weight, bias, given)))
    return jax.block_until_ready(ffi.fused_quantize(made, **{**GOOD, **changed}))


def test_the_handler_takes_what_the_tests_below_change(handlers):
    data, scale, _ = call_handler()
    assert (data.shape, scale.shape) == ((2, 3, 8), (2, 3, 1))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"producer": "relu"}, "unknown producer 'relu'"),
        ({"x": (3, 8)}, "x must be .batch, rows, columns."),
        ({"shape": (2, 3, 4)}, "the data of rms_norm must be .* with the shape of x"),
        ({"producer": "swiglu"}, "the data of swiglu must be .* with half the columns of x"),
        ({"dtype": jnp.float32}, "the data of rms_norm must be float8_e4m3fn or float8_e5m2"),
        ({"block": (128, 128)}, "unknown block .128, 128."),
        ({"scale_shape": (1, 1, 1)}, r"the scale must be float32\[2,3,1\]"),
        ({"given": (2, 1, 1)}, "a static scale must have the shape of the scale"),
        ({"residual": (2, 3, 7)}, "a residual is for norms and must have type and shape of x"),
        ({"weight": None}, "the weight must be .1 or 2, 8."),
        ({"weight": (3, 8)}, "the weight must be .1 or 2, 8."),
        ({"bias": (1, 8)}, "rms_norm takes no bias"),
        ({"producer": "layer_norm"}, "the bias must be .1 or 2, 8."),
        ({"producer": "layer_norm", "bias": (2, 8)}, "the bias must be .* as the weight"),
        ({"producer": "gelu"}, "gelu takes no weight"),
        ({"eps": -1.0}, "eps must be finite and not negative"),
    ],
    ids=str,
)
def test_the_handler_checks_by_itself(handlers, changed, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match="jax_fp8_fused_quantize: " + message):
        call_handler(**changed)
