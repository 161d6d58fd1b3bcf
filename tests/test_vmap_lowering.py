"""Every operation under jax.vmap of none, one and several entries, lowered for GPUs from a CPU.

What the handlers are given, and where they differ in shape from what runs on a CPU, is seen only
there. Nothing is compiled and nothing runs.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
import references as ref
import training
from cases import pair_id

import jax_fp8

pytestmark = pytest.mark.ends

sizes = pytest.mark.parametrize("size", [0, 1, 3])
granularities = pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
FLAX = (((1,), (0,)), ((), ()))


def wide(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def fp8(*shape, granularity="tensor"):
    quantize = functools.partial(jax_fp8.quantize, granularity=granularity)
    return jax.eval_shape(quantize, wide(*shape))


def of_entries(tree, size):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), tree)


def check(target, size, function, *operands, shared=()):
    """Lowers the vmap of a function of one entry; operands with these indices all entries share."""
    axes = [None if i in shared else 0 for i in range(len(operands))]
    given = [
        operand if axis is None else of_entries(operand, size)
        for axis, operand in zip(axes, operands, strict=True)
    ]
    traced = jax.jit(jax.vmap(function, axes, axis_size=size)).trace(*given)
    want = of_entries(jax.eval_shape(function, *operands), size)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), traced.out_info) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), want
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"@jax_fp8_{target}" in text


# --- Quantization ---------------------------------------------------------------------------------


@sizes
@granularities
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_quantize(size, granularity, static):
    scale = fp8(130, 200, granularity=granularity).scale

    def quantize(x, scale):
        scale = scale if static else None
        return jax_fp8.quantize(x, granularity=granularity, scale=scale, return_amax=True)

    check("quantize", size, quantize, wide(130, 200), scale)
    check("quantize", size, quantize, wide(130, 200), scale, shared=(0 if static else 1,))


@sizes
@granularities
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_cast_transpose(size, granularity, stochastic):
    def cast(x, key):
        return jax_fp8.cast_transpose(
            x,
            granularity=granularity,
            key=key if stochastic else None,
            return_amax=granularity == "tensor",
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    check("cast_transpose", size, cast, wide(2, 130, 200), key)
    check("cast_transpose", size, cast, wide(2, 130, 200), key, shared=(1,))


PRODUCERS = {
    "rms_norm": lambda x, r, w, **options: jax_fp8.rms_norm_quantize(x, w, **options),
    "rms_norm and residual": lambda x, r, w, **options: jax_fp8.rms_norm_quantize(
        x, w, residual=r, **options
    ),
    "layer_norm": lambda x, r, w, **options: jax_fp8.layer_norm_quantize(x, w, w, **options),
    "layer_norm and residual": lambda x, r, w, **options: jax_fp8.layer_norm_quantize(
        x, w, w, residual=r, **options
    ),
    "swiglu": lambda x, r, w, **options: jax_fp8.swiglu_quantize(x, **options),
    "gelu": lambda x, r, w, **options: jax_fp8.gelu_quantize(x, **options),
}


@sizes
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "row"}, {"granularity": (1, 128)}, {"scale": 0.5}],
    ids=["tensor", "row", "block", "static"],
)
def test_fused_producers(size, producer, options):
    function = functools.partial(PRODUCERS[producer], **options)
    operands = wide(2, 5, 200), wide(2, 5, 200), wide(200)
    for shared in ((), (2,), (1,)):
        check("fused_quantize", size, function, *operands, shared=shared)


# --- Products -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, shared", [(0, (1, 2)), (1, (1, 2)), (3, (1, 2)), (3, ()), (3, (0,))]
)
def test_fused_matmul(size, shared):
    def multiply(x, w, norm, residual):
        return jax_fp8.fused_matmul(x, w, norm=norm, activation="swiglu", residual=residual)

    bf16 = jnp.bfloat16
    operands = wide(2, 48, dtype=bf16), fp8(10, 48, granularity="row"), wide(48, dtype=bf16)
    check("fused_matmul", size, multiply, *operands, wide(2, 5, dtype=bf16), shared=shared)


weights = pytest.mark.parametrize("shared", [(), (1,), (0,)], ids=["both", "x alone", "w alone"])


@sizes
@weights
@pytest.mark.parametrize(
    "x_granularity, w_granularity, batch",
    [
        ("tensor", "tensor", ()),
        ("tensor", "tensor", (2,)),
        ("row", "row", ()),
        ("row", "tensor", (2,)),
        ((1, 128), (128, 128), ()),
        ((1, 128), (128, 128), (2,)),
        ((128, 128), (1, 128), ()),
    ],
    ids=pair_id,
)
def test_scaled_matmul(size, shared, x_granularity, w_granularity, batch):
    operands = (
        fp8(*batch, 5, 200, granularity=x_granularity),
        fp8(*batch, 24, 200, granularity=w_granularity),
        wide(24),
        wide(),
    )

    def epilogue(x, w, bias, scale):
        return jax_fp8.scaled_matmul(
            *(x, w),
            bias=bias,
            activation="gelu",
            output_scale=scale,
            preferred_element_type=jnp.float8_e4m3fn,
            return_amax=True,
        )

    check("scaled_matmul", size, jax_fp8.scaled_matmul, *operands[:2], shared=shared)
    check("scaled_matmul", size, epilogue, *operands, shared=(*shared, 2, 3))
    check("scaled_matmul", size, epilogue, *operands, shared=shared)


@sizes
@weights
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "weight_only"])
def test_matmul(size, shared, recipe):
    operand = jax_fp8.named_recipe(recipe).weight
    dtype = jnp.bfloat16 if recipe == "weight_only" else jnp.float32

    def multiply(x, w, bias, dy):
        def call(x, bias):
            return jax_fp8.matmul(x, w, recipe=recipe, bias=bias)

        y, pull = jax.vjp(call, x, bias)
        return y, *pull(dy)

    w = fp8(24, 200, granularity=operand.granularity)
    x, dy = wide(5, 200, dtype=dtype), wide(5, 24, dtype=dtype)
    check("scaled_matmul", size, multiply, x, w, wide(24, dtype=dtype), dy, shared=shared)


@sizes
@weights
@pytest.mark.parametrize("recipe", training.FP8_RECIPES)
def test_dot_general_and_its_gradients(size, shared, recipe):
    dtype = jnp.bfloat16 if recipe == "weight_only" else jnp.float32
    x, w, dy = wide(5, 200, dtype=dtype), wide(200, 24), wide(5, 24)
    state = jax.eval_shape(lambda x, w: training.state_for(recipe, x, w), x, w)

    def step(x, w, dy, state):
        def call(x, w):
            found = jax_fp8.dot_general(x, w, FLAX, recipe=recipe, state=state)
            return (found, None) if state is None else found

        y, pull, state = jax.vjp(call, x, w, has_aux=True)
        return y, *pull(dy), state

    check("scaled_matmul", size, step, x, w, dy, state, shared=(*shared, 3))
    check("scaled_matmul", size, step, x, w, dy, state, shared=shared)


@sizes
@weights
def test_einsum(size, shared):
    def multiply(x, w):
        return jax_fp8.einsum("bsd,dhe->bhse", x, w, recipe="rowwise")

    check("scaled_matmul", size, multiply, wide(2, 5, 48), wide(48, 4, 6), shared=shared)
