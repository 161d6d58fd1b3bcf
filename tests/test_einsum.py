"""einsum: which product it is, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import training
from cases import pair_id, sample
from conftest import on_platforms, value_on_this_platform

import jax_fp8

POWERS = jax_fp8.named_recipe("tensorwise", power_of_two=True)


@pytest.fixture(params=on_platforms(("xla",), (None, "decode")))
def products(request):
    """Implementations that have all three products of every recipe."""
    return value_on_this_platform(request)


SPECS = [
    "bsd,df->bsf",
    "...d,df->...f",
    "bsd,hdk->bshk",
    "bshk,hkd->bsd",
    "bd,bdf->bf",
    "ab,cb->ca",
    "abx,bc->ac",
    "ab,bc",
    "i,j->ij",
    "xbqd,bxdk->xqbk",
    "bsd,df->fbs",
    "ab,ba->b",
    "ab,ba->",
    "ab,bcx->ac",
    "abx,bch->ca",
    "axd,afdh->fa",
]


@pytest.mark.parametrize("spec", SPECS)
def test_einsum_is_that_of_numpy(products, rng, spec):
    """On integers that every operand of the product and of its gradients holds exactly."""

    def draw(shape):
        x = np.array(rng.integers(-2, 3, shape), np.float32)
        x.flat[0] = 4.0  # So that no scale rounds anything.
        return x

    sizes = dict(zip("abcdfhijkqsx", (3, 4, 5, 16, 6, 2, 7, 3, 8, 5, 9, 2), strict=True))
    inputs = spec.replace("...", "bs").split("->")[0].split(",")
    x, w = (draw([sizes[c] for c in part]) for part in inputs)
    options = {"recipe": POWERS, "implementation": products}
    y, pull = jax.vjp(lambda x, w: jax_fp8.einsum(spec, x, w, **options), x, w)
    np.testing.assert_array_equal(y, np.einsum(spec, x, w))  # Zeros may differ in sign.
    dy = draw(y.shape)
    _, exact_pull = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x, w)
    for got, want in zip(pull(dy), exact_pull(dy), strict=True):
        np.testing.assert_array_equal(got, want)


def test_einsum_has_gradients_and_state(rng):
    x, w = (jnp.asarray(sample(rng, "normal", s)) for s in ((2, 5, 32), (32, 4, 8)))
    state = jax_fp8.init_scaling("delayed", activation=x, weight=w)

    def loss(x, w):
        y, new = jax_fp8.einsum("bsd,dhk->bshk", x, w, recipe="delayed", state=state)
        return jnp.sum(y**2), new

    (dx, dw), new = jax.grad(loss, (0, 1), has_aux=True)(x, w)
    want = jax.grad(lambda x, w: jnp.sum(jnp.einsum("bsd,dhk->bshk", x, w) ** 2), (0, 1))(x, w)
    assert training.cosine(dx, want[0]) > 0.997 and training.cosine(dw, want[1]) > 0.997
    assert new.weight.shape == (16,)


@pytest.mark.parametrize(
    "spec, x_shape, w_shape",
    [
        ("...ab,...bc->...ac", (5, 6, 32), (1, 32, 4)),
        ("eab,ebc->eac", (1, 6, 32), (5, 32, 4)),
        ("eab,ebc->ac", (5, 6, 32), (1, 32, 4)),
        ("ab,bc->ac", (3, 1), (16, 4)),
        ("ab,bc->ac", (1, 16), (16, 1)),
        ("eab,ebc->eac", (0, 6, 32), (1, 32, 4)),
    ],
    ids=str,
)
def test_one_element_goes_with_any_number_of_them(products, rng, spec, x_shape, w_shape):
    x, w = (rng.integers(-2, 3, shape).astype(np.float32) for shape in (x_shape, w_shape))
    x.flat[:1] = w.flat[:1] = 4.0  # So that no scale rounds anything.

    def ours(x, w):
        return jax_fp8.einsum(spec, x, w, recipe=POWERS, implementation=products)

    y, vjp = jax.vjp(ours, x, w)
    want, expected = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x, w)
    np.testing.assert_array_equal(y, want)
    for got, gradient in zip(vjp(jnp.ones_like(y)), expected(jnp.ones_like(y)), strict=True):
        np.testing.assert_array_equal(got, gradient)


def test_einsum_refuses():
    with pytest.raises(ValueError, match="has an axis of 16 in lhs"):
        jax_fp8.einsum("bd,df->bf", jnp.ones((4, 16)), jnp.ones((8, 8)))
    with pytest.raises(ValueError, match=r"'ab,bc->ac' has 2 axes of rhs, got \(8, 4, 2\)"):
        jax_fp8.einsum("ab,bc->ac", jnp.ones((4, 8)), jnp.ones((8, 4, 2)))
    with pytest.raises(ValueError, match="has an index of lhs twice"):
        jax_fp8.einsum("dd,df->f", jnp.ones((16, 16)), jnp.ones((16, 8)))
    with pytest.raises(ValueError, match="einsum: unknown recipe 'fp8'"):
        jax_fp8.einsum("bd,df->bf", jnp.ones((4, 16)), jnp.ones((16, 8)), recipe="fp8")
    with pytest.raises(ValueError, match="einsum: unknown precision .* but no algorithm"):
        jax_fp8.einsum("bd,df->bf", jnp.ones((4, 16)), jnp.ones((16, 8)), precision="F32_F32_F32")


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
@pytest.mark.parametrize(
    "spec, of_x, of_w",
    [
        ("bsk,nk->bsn", (3, 5, 32), (8, 32)),
        ("...k,nk->n...", (3, 5, 32), (8, 32)),
        ("k,nk->n", (32,), (8, 32)),
        ("bsk,bnk->bsn", (3, 5, 32), (3, 8, 32)),
        ("abmk,bank->abmn", (2, 3, 5, 32), (3, 2, 8, 32)),
    ],
)
def test_einsum_of_a_scaled_array(products, rng, granularity, spec, of_x, of_w):
    """As the right and as the left operand, and the gradient of the other one."""
    x = jnp.asarray(rng.integers(-2, 3, of_x).astype(np.float32)).at[..., 0].set(4.0)
    w = rng.integers(-2, 3, of_w).astype(np.float32)
    w[..., 0] = 4.0
    w = jax_fp8.quantize(jnp.asarray(w), granularity=granularity, power_of_two=True)
    want = np.einsum(spec, x, jax_fp8.dequantize(w))
    options = {"preferred_element_type": jnp.float32, "recipe": POWERS, "implementation": products}
    y, pull = jax.vjp(lambda x: jax_fp8.einsum(spec, x, w, **options), x)
    np.testing.assert_array_equal(y, want)
    dy = jnp.ones_like(y)
    dx = jax.vjp(lambda x: jnp.einsum(spec, x, jax_fp8.dequantize(w)), x)[1](dy)[0]
    assert training.cosine(pull(dy)[0], dx) > 0.997
    inputs, result = spec.split("->")
    mirrored = ",".join(reversed(inputs.split(","))) + "->" + result
    np.testing.assert_array_equal(jax_fp8.einsum(mirrored, w, x, **options), want)


def test_einsum_of_two_scaled_arrays(products, rng):
    x, w = (jax_fp8.quantize(jnp.asarray(sample(rng, "normal", s))) for s in ((5, 32), (8, 32)))
    options = {"preferred_element_type": jnp.float32, "implementation": products}
    y = jax_fp8.einsum("mk,nk->nm", x, w, **options)
    want = jax_fp8.dot_general(x, w, (((1,), (1,)), ((), ())), **options)
    ref.assert_same_bits(y, want.T)


@pytest.mark.parametrize(
    "spec, of_x, of_w, message",
    [
        ("mk,kn->mn", (4, 16), (16, 8), r"of rhs, .*\[16, 8\], axes \(0,\) are contracted"),
        ("bmk,nbk->bmn", (2, 4, 16), (8, 2, 16), r"of rhs, .* and \(1,\) are batch axes"),
        ("mhk,nhk->mn", (4, 2, 16), (8, 2, 16), r"of rhs, .* axes \(1, 2\) are contracted"),
        ("mk,nkd->mn", (4, 16), (8, 16, 2), "broadcasts an axis of rhs, .* got a ScaledArray"),
    ],
)
def test_einsum_moves_no_scaled_array(spec, of_x, of_w, message):
    with pytest.raises(ValueError, match=f"einsum: .*{message}"):
        jax_fp8.einsum(spec, jnp.ones(of_x), jax_fp8.quantize(jnp.ones(of_w)))


def test_einsum_does_not_differentiate_a_scaled_array():
    w = jax_fp8.quantize(jnp.ones((8, 16)))

    def loss(scale):
        scaled = jax_fp8.ScaledArray(w.data, scale, w.granularity)
        return jnp.sum(jax_fp8.einsum("mk,nk->mn", jnp.ones((4, 16)), scaled))

    with pytest.raises(TypeError, match="einsum: a ScaledArray cannot be differentiated"):
        jax.grad(loss)(w.scale)


def test_einsum_takes_a_pair_of_precisions(rng):
    x, w = (jnp.asarray(sample(rng, "normal", s)) for s in ((5, 32), (32, 8)))
    y, want = (
        jax_fp8.einsum("mk,kn->mn", x, w, precision=precision)
        for precision in ((jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST), "highest")
    )
    ref.assert_same_bits(y, want)
