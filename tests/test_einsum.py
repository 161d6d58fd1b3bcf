"""einsum: which product it is, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from cases import sample
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
]


@pytest.mark.parametrize("spec", SPECS)
def test_einsum_is_that_of_numpy(products, rng, spec):
    """On integers that every operand of the product holds exactly."""
    sizes = dict(zip("abcdfhijkqsx", (3, 4, 5, 16, 6, 2, 7, 3, 8, 5, 9, 2), strict=True))
    inputs = spec.replace("...", "bs").split("->")[0].split(",")
    x, w = (rng.integers(-2, 3, [sizes[c] for c in part]).astype(np.float32) for part in inputs)
    x.flat[0] = w.flat[0] = 4.0  # So that no scale rounds anything.
    y = jax_fp8.einsum(spec, x, w, recipe=POWERS, implementation=products)
    np.testing.assert_array_equal(y, np.einsum(spec, x, w))  # Zeros may differ in sign.


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


def test_einsum_refuses():
    with pytest.raises(ValueError, match="has index 'd' of size 16 in lhs"):
        jax_fp8.einsum("bd,df->bf", jnp.ones((4, 16)), jnp.ones((8, 8)))
    with pytest.raises(ValueError, match="has an index of lhs twice"):
        jax_fp8.einsum("dd,df->f", jnp.ones((16, 16)), jnp.ones((16, 8)))
    with pytest.raises(TypeError, match="einsum: rhs must be a wide array"):
        jax_fp8.einsum("bd,fd->bf", jnp.ones((4, 16)), jax_fp8.quantize(jnp.ones((8, 16))))
