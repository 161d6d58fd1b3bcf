import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import operand, scaled

import jax_fp8
from jax_fp8._src import scaled_array as sa


def checked(x):
    return sa.check_scaled_array("operation", "x", x)


def test_properties(rng):
    x = operand(rng, (2, 3, 5), ref.E5M2, "row")
    assert (x.shape, x.ndim, x.dtype, x.granularity) == ((2, 3, 5), 3, ref.E5M2, "row")
    assert x.scale.shape == (2, 3, 1)


def test_cannot_be_changed(rng):
    with pytest.raises(dataclasses.FrozenInstanceError):
        operand(rng, (2, 3)).scale = jnp.ones((1, 1))


def test_granularity_is_static_and_the_arrays_are_leaves(rng):
    x = operand(rng, (4, 130), granularity=(1, 128))
    leaves, tree = jax.tree.flatten(x)
    assert [leaf.shape for leaf in leaves] == [(4, 130), (4, 2)]
    again = jax.tree.unflatten(tree, leaves)
    assert again.granularity == (1, 128)
    assert tree != jax.tree.structure(dataclasses.replace(x, granularity="row"))


def test_fields_are_not_checked_at_construction():
    shapes = jax.tree.map(lambda leaf: leaf.shape, scaled(jnp.ones((2, 3)), jnp.ones((7,))))
    assert (shapes.data, shapes.scale) == ((2, 3), (7,))
    assert jax_fp8.ScaledArray(None, object(), "nonsense").granularity == "nonsense"


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=str)
def test_passes_through_jit_vmap_and_scan(rng, granularity):
    stacked = [operand(rng, (130, 200), granularity=granularity) for _ in range(3)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)
    want = np.stack([np.asarray(jax_fp8.dequantize(x)) for x in stacked])
    _, scanned = jax.lax.scan(lambda _, x: (None, jax_fp8.dequantize(x)), None, together)
    for got in (
        jax.vmap(jax_fp8.dequantize)(together),
        scanned,
        jnp.stack([jax.jit(jax_fp8.dequantize)(x) for x in stacked]),
    ):
        ref.assert_same_bits(got, want)


@pytest.mark.parametrize(
    "shape, granularity, want",
    [
        ((), "tensor", ()),
        ((5,), "tensor", (1,)),
        ((2, 3, 5), "tensor", (1, 1, 1)),
        ((5,), "row", (1,)),
        ((2, 3, 5), "row", (2, 3, 1)),
        ((0, 5), "row", (0, 1)),
        ((128,), (1, 128), (1,)),
        ((3, 129), (1, 128), (3, 2)),
        ((3, 0), (1, 128), (3, 0)),
        ((127, 128), (128, 128), (1, 1)),
        ((2, 129, 257), (128, 128), (2, 2, 3)),
    ],
)
def test_scale_shape(shape, granularity, want):
    assert sa.scale_shape(shape, granularity) == want


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=str)
def test_expand_scale_gives_each_element_its_own(rng, granularity):
    shape = (2, 131, 257)
    scale = rng.random(ref.scale_shape(shape, granularity), np.float32)
    got = sa.expand_scale(jnp.asarray(scale), shape, granularity)
    ref.assert_same_bits(got, ref.expand(scale, shape, granularity))


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=str)
def test_accepts_every_granularity(rng, granularity):
    x = operand(rng, (2, 130, 129), granularity=granularity)
    assert checked(x) is x


@pytest.mark.parametrize("leading", [(4, 1, 1), (4, 5, 1), (1, 5, 1), (1, 1, 1)])
def test_accepts_stacked_tensor_scales(rng, leading):
    x = scaled(ref.random_codes(rng, (4, 5, 6), ref.E4M3), np.ones(leading, np.float32))
    assert checked(x) is x


def test_a_list_is_a_granularity_too():
    assert sa.check_granularity("operation", [128, 128]) == (128, 128)


def test_other_granularities_raise():
    with pytest.raises(ValueError, match=r"operation: unknown granularity 'column'; .*'tensor'"):
        sa.check_granularity("operation", "column")
    with pytest.raises(ValueError, match=r"unknown granularity \(1, 32\); .*\(1, 128\)"):
        sa.check_granularity("operation", (1, 32))


def test_other_dtypes_raise():
    with pytest.raises(TypeError, match="operation: x.data must be float8_e4m3fn or .*, got int8"):
        checked(scaled(jnp.ones((2, 3), jnp.int8), jnp.ones((1, 1))))
    with pytest.raises(TypeError, match="got float8_e4m3fnuz .*MX block formats"):
        checked(scaled(jnp.ones((2, 3), jnp.float8_e4m3fnuz), jnp.ones((1, 1))))


def test_a_plain_array_raises():
    with pytest.raises(
        TypeError, match=r"x must be a jax_fp8.ScaledArray, got an array float64\[2, 3\]; make"
    ):
        checked(np.ones((2, 3)))
    with pytest.raises(TypeError, match="x must be a jax_fp8.ScaledArray, got a list; make"):
        checked([1.0])


def test_a_scale_of_another_dtype_raises():
    data = jnp.ones((2, 3), jnp.float8_e4m3fn)
    with pytest.raises(TypeError, match="operation: x.scale must be float32, got bfloat16"):
        checked(scaled(data, jnp.ones((1, 1), jnp.bfloat16)))


def test_an_unknown_granularity_of_an_operand_names_it():
    data = jnp.ones((2, 3), jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match="operation: x: unknown granularity 'rows'"):
        checked(scaled(data, jnp.ones((1, 1)), "rows"))


@pytest.mark.parametrize(
    "shape, granularity, needed", [((), "row", 1), ((), (1, 128), 1), ((5,), (128, 128), 2)]
)
def test_a_rank_without_such_rows_raises(shape, granularity, needed):
    with pytest.raises(ValueError, match=f"needs x of rank >= {needed}, got rank {len(shape)}"):
        checked(scaled(jnp.ones(shape, jnp.float8_e4m3fn), jnp.ones(shape), granularity))


@pytest.mark.parametrize(
    "granularity, shape",
    [
        ("tensor", ()),
        ("tensor", (3, 1)),
        ("tensor", (2, 200, 200)),
        ("tensor", (2, 1, 200)),
        ("row", (2, 1, 1)),
        ("row", (200, 1)),
        ((1, 128), (2, 200, 1)),
        ((1, 128), (2, 200, 200)),
        ((128, 128), (2, 2, 1)),
        ((128, 128), (2, 2)),
        ((128, 128), (1, 2, 2)),
    ],
    ids=str,
)
def test_a_scale_that_does_not_fit_raises(granularity, shape):
    x = scaled(jnp.ones((2, 200, 200), jnp.float8_e4m3fn), jnp.ones(shape), granularity)
    with pytest.raises(ValueError, match=r"does not fit x.data of shape \(2, 200, 200\) with"):
        checked(x)
