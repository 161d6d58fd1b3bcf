"""jax.vmap of scaled_matmul, which means a loop: which operands have an entry each, and where."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import (
    codes,
    integers,
    must_refuse,
    operand,
    pair_id,
    scaled,
)
from jax.lax import Precision

import jax_fp8

pytestmark = pytest.mark.ends
SIZE = 3
F32 = {"preferred_element_type": jnp.float32}
#: Which of x's data, x's scale, w's data and w's scale have an entry each.
PATTERNS = [p for p in itertools.product((True, False), repeat=4) if any(p)]


def one_of(arrays, batched, i):
    """The operands of entry ``i``; what is not batched is the first for all."""
    return [a[i] if b else a[0] for a, b in zip(arrays, batched, strict=True)]


def vmapped(function, arrays, batched):
    given = [a if b else a[0] for a, b in zip(arrays, batched, strict=True)]
    return jax.vmap(function, [0 if b else None for b in batched])(*given)


def loop(function, arrays, batched, size=SIZE):
    found = [function(*one_of(arrays, batched, i)) for i in range(size)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def entries(implementation, rng, shape, granularity="tensor"):
    """Data and scales of entries: any codes, or what is exact in whatever order it is added."""
    make = codes if implementation == "naive" else integers
    made = [make(rng, shape, granularity=granularity) for _ in range(SIZE)]
    return [jnp.stack([m.data for m in made]), jnp.stack([m.scale for m in made])]


def refused(implementation, operands, granularities):
    """Whether this device has no such product, be it of one entry or of all."""
    x, w = (
        scaled(*one_of(operands[i : i + 2], (True, True), 0), granularity)
        for i, granularity in zip((0, 2), granularities, strict=True)
    )
    return must_refuse(implementation, x, w)


def product(granularities, implementation, **options):
    """scaled_matmul of data and scales, with what the handlers round fixed."""
    options = {**F32, "implementation": implementation, **options}

    def multiply(x, x_scale, w, w_scale, bias=None, output_scale=None):
        return jax_fp8.scaled_matmul(
            jax_fp8.ScaledArray(x, x_scale, granularities[0]),
            jax_fp8.ScaledArray(w, w_scale, granularities[1]),
            bias=bias,
            output_scale=output_scale,
            **options,
        )

    return multiply


def assert_same(implementation, got, want):
    """The bits of a loop; elsewhere than in the naive loop a zero may have either sign."""
    if implementation == "naive":
        ref.assert_same_trees(got, want)
        return
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


# --- Which operands -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x_granularity, w_granularity, batch",
    [
        ("tensor", "tensor", ()),
        ("tensor", "tensor", (2,)),
        ("tensor", (128, 128), ()),
        ("row", "tensor", ()),
        ("row", "row", (2,)),
        ((1, 128), (128, 128), (2,)),
        ((128, 128), "row", ()),
        ((128, 128), (128, 128), (2,)),
    ],
    ids=pair_id,
)
def test_every_pattern_is_a_loop(implementation, rng, x_granularity, w_granularity, batch):
    granularities = x_granularity, w_granularity
    operands = [
        *entries(implementation, rng, (*batch, 3, 144), x_granularity),
        *entries(implementation, rng, (*batch, 8, 144), w_granularity),
    ]
    if refused(implementation, operands, granularities):
        return
    multiply = jax.jit(product(granularities, implementation))
    got = jax.jit(lambda *operands: [vmapped(multiply, operands, p) for p in PATTERNS])(*operands)
    for one, pattern in zip(got, PATTERNS, strict=True):
        assert_same(implementation, one, loop(multiply, operands, pattern))


@pytest.mark.parametrize("w_granularity", ["row", (128, 128)], ids=pair_id)
def test_blocks_that_end_with_their_entry(implementation, rng, w_granularity):
    granularities = (128, 128), w_granularity
    operands = [
        *entries(implementation, rng, (128, 144), (128, 128)),
        *entries(implementation, rng, (8, 144), w_granularity),
    ]
    if refused(implementation, operands, granularities):
        return
    multiply = jax.jit(product(granularities, implementation))
    batched = (True, True, False, False)
    assert_same(
        implementation,
        jax.jit(functools.partial(vmapped, multiply, batched=batched))(operands),
        loop(multiply, operands, batched),
    )


@pytest.mark.parametrize(
    "x_scales, w_scales", [((2, 1, 1), (1, 1, 1)), ((2, 3, 1), (2, 1, 1)), ((1, 3, 1), (2, 8, 1))]
)
@pytest.mark.parametrize("batched", [(True, False), (False, True), (True, True)], ids=pair_id)
def test_stacked_tensor_scales(implementation, rng, x_scales, w_scales, batched):
    data = [entries(implementation, rng, (2, rows, 48))[0] for rows in (3, 8)]
    scales = [
        jnp.asarray(2.0 ** rng.integers(-3, 4, (SIZE, *s)), jnp.float32)
        for s in (x_scales, w_scales)
    ]
    operands = [data[0], scales[0], data[1], scales[1]]
    pattern = [b for b in batched for _ in range(2)]
    multiply = jax.jit(product(("tensor", "tensor"), implementation))
    got = jax.jit(functools.partial(vmapped, multiply, batched=pattern))(operands)
    assert_same(implementation, got, loop(multiply, operands, pattern))


# --- Bias, activation, output ---------------------------------------------------------------------

#: Which of x, w, the bias and the output scale.
EPILOGUES = [p for p in itertools.product((True, False), repeat=4) if any(p)]


@pytest.mark.parametrize(
    "out, bias_dtype, batch",
    [
        (ref.BF16, ref.BF16, ()),
        (ref.BF16, ref.F32, (2,)),
        (ref.E4M3, ref.F32, ()),
        (ref.E4M3, None, (2,)),
    ],
    ids=pair_id,
)
def test_every_epilogue_is_a_loop(implementation, rng, out, bias_dtype, batch):
    is_fp8 = out in ref.FP8
    operands = [
        *entries(implementation, rng, (*batch, 3, 48)),
        *entries(implementation, rng, (*batch, 16, 48)),
        jnp.asarray(rng.integers(-9, 10, (SIZE, 16)), bias_dtype or jnp.float32),
        jnp.asarray(2.0 ** rng.integers(-2, 3, SIZE), jnp.float32),
    ]
    function = product(
        ("tensor", "tensor"),
        implementation,
        preferred_element_type=out,
        return_amax=is_fp8,
        activation="gelu" if implementation == "naive" else "relu",
    )

    @jax.jit
    def multiply(*operands):
        *operands, bias, scale = operands
        return function(*operands, bias if bias_dtype else None, scale if is_fp8 else None)

    patterns = [
        (x, x, w, w, bias, scale)
        for x, w, bias, scale in EPILOGUES
        if x or w or (bias and bias_dtype) or (scale and is_fp8)
    ]
    got = jax.jit(lambda *operands: [vmapped(multiply, operands, p) for p in patterns])(*operands)
    for one, pattern in zip(got, patterns, strict=True):
        assert_same(implementation, one, loop(multiply, operands, pattern))


@pytest.mark.parametrize("shared", [True, False], ids=["one w", "w each"])
@pytest.mark.parametrize("activation", [None, "gelu"], ids=str)
def test_random_values_are_within_the_bounds_of_a_loop(implementation, rng, activation, shared):
    x = operand(rng, (SIZE, 5, 272), granularity="row", kind="heavy")
    w = operand(rng, (SIZE, 16, 272), granularity="row", kind="heavy")
    bias = jnp.asarray(2 * rng.standard_normal((SIZE, 16)), jnp.float32)
    if shared:
        w = jax.tree.map(lambda leaf: leaf[0], w)

    def multiply(x, w, bias):
        return jax_fp8.scaled_matmul(
            *(x, w),
            bias=bias,
            activation=activation,
            precision=Precision.HIGHEST,
            implementation=implementation,
            **F32,
        )

    got = jax.jit(jax.vmap(multiply, (0, None if shared else 0, 0)))(x, w, bias)
    for i in range(SIZE):
        x_i, bias_i = scaled(x.data[i], x.scale[i], "row"), bias[i]
        w_i = w if shared else scaled(w.data[i], w.scale[i], "row")
        expected, magnitudes = ref.product(x_i, w_i, bias_i, activation)
        if implementation in ("naive", "xla"):  # Sums of float32, in whatever order.
            error = ref.sum_error(magnitudes, 272)
        else:
            error = ref.random_error(magnitudes, 272, fast=False)
        error = ref.epilogue_error(ref.product(x_i, w_i, bias_i)[0], error, activation, bias_i)
        ref.assert_close(got[i], expected, error)


# --- Which axes -----------------------------------------------------------------------------------


def test_nested_and_any_axes(implementation, rng):
    """x differs in both entries, w in the outer one and the bias in the inner one."""
    make = codes if implementation == "naive" else integers
    x, w = make(rng, (2, SIZE, 5, 48), granularity="row"), make(rng, (2, 8, 48), granularity="row")
    bias = jnp.asarray(rng.integers(-9, 10, (SIZE, 8)), jnp.float32)

    @jax.jit
    def multiply(x, w, bias):
        return jax_fp8.scaled_matmul(x, w, bias=bias, implementation=implementation, **F32)

    def at(tree, *index):
        return jax.tree.map(lambda leaf: leaf[index], tree)

    want = jnp.stack(
        [
            jnp.stack([multiply(at(x, i, j), at(w, i), bias[j]) for j in range(SIZE)])
            for i in range(2)
        ]
    )
    nested = jax.vmap(jax.vmap(multiply, (0, None, 0)), (0, 0, None))
    assert_same(implementation, jax.jit(nested)(x, w, bias), want)
    assert_same(implementation, nested(x, w, bias), want)
    # The same with the axes elsewhere: x as (SIZE, 5, 2, 48), scales likewise.
    turned = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 2), x)
    last = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), w)
    inner = jax.vmap(multiply, (0, None, -1), out_axes=-1)
    outer = jax.jit(jax.vmap(inner, (2, 1, None), out_axes=1))
    got = jnp.moveaxis(outer(turned, last, bias.T), (1, -1), (0, 1))
    assert_same(implementation, got, want)


def test_other_transformations_around_it(implementation, rng):
    make = codes if implementation == "naive" else integers
    x, w = make(rng, (SIZE, 5, 48), granularity="row"), make(rng, (8, 48))

    def multiply(x, w):
        return jax_fp8.scaled_matmul(x, w, implementation=implementation, **F32)

    over_x = jax.vmap(multiply, (0, None))
    want = jnp.stack([multiply(jax.tree.map(lambda leaf, i=i: leaf[i], x), w) for i in range(SIZE)])
    wrapped = {
        "jit inside": jax.vmap(jax.jit(multiply), (0, None)),
        "checkpoint inside": jax.vmap(jax.checkpoint(multiply), (0, None)),
        "checkpoint outside": jax.jit(jax.checkpoint(over_x)),
        "scan inside": jax.vmap(
            lambda x, w: jax.lax.scan(lambda _, row: (0, multiply(row, w)), 0, x)[1], (0, None)
        ),
        "scan outside": lambda x, w: jax.lax.scan(
            lambda _, part: (0, over_x(part, w)), 0, jax.tree.map(lambda leaf: leaf[None], x)
        )[1][0],
    }
    for name, function in wrapped.items():
        one_row = jax.tree.map(lambda leaf: leaf[:, :, None], x)
        got = function(one_row, w)[:, :, 0] if name == "scan inside" else function(x, w)
        assert_same(implementation, got, want)


@pytest.mark.parametrize("shared", [True, False], ids=["one w", "w each"])
def test_vmap_of_nothing(implementation, rng, shared):
    x, w = (jax.tree.map(lambda leaf: leaf[:0], integers(rng, (1, n, 16))) for n in (3, 16))
    if shared:
        w = integers(rng, (16, 16))

    def multiply(x, w, scale):
        return jax_fp8.scaled_matmul(
            *(x, w),
            implementation=implementation,
            preferred_element_type=ref.E4M3,
            output_scale=scale,
        )

    axes = (0, None if shared else 0, 0)
    got = jax.vmap(multiply, axes)(x, w, jnp.ones((0,)))
    assert (got.shape, got.scale.shape) == ((0, 3, 16), (0, 1, 1))
