"""fused_matmul and fused_chain of one row, which the product quantizes: as the first of two."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from around_cases import ALL, EPS, operands

import jax_fp8
from jax_fp8 import ChainLink as Link

pytestmark = pytest.mark.gpu

#: What a row is made of, but for its normal values.
KINDS = {
    "normal": lambda x: x,
    "zero": lambda x: x * 0,
    "infinity": lambda x: x.at[0, -1].set(jnp.inf),
    "NaN": lambda x: x.at[0, 0].set(jnp.nan),
    "squares overflow": lambda x: x.at[0, 1].set(1e30),
    "squares vanish": lambda x: x * 1e-25,
    "saturates": lambda x: x.at[0, 2].set(1e4),
}
SCALE = 2.0**-7


@pytest.fixture(params=["rowwise", "static"])
def recipe(request):
    return request.param


def first_row(around):
    return {name: value[:1] if name == "residual" else value for name, value in around.items()}


@pytest.mark.parametrize(
    # One tile for each thread block, and several; K that no pack, chunk or round divides; all of K
    # that a product takes, and more.
    "n, k",
    [(336, 16), (336, 272), (8480, 1040), (8480, 4096), (336, 14336), (48, 14352)],
    ids=str,
)
@pytest.mark.parametrize("parts", [(), ("norm",), ("swiglu", "residual"), ALL], ids="+".join)
def test_it_is_the_first_row_of_two(rng, recipe, n, k, parts):
    x, w, around = operands(rng, 2, n, k, parts)
    scales = [SCALE, jnp.nan, jnp.inf, 0.0] if recipe == "static" else [None]
    for scale in scales:
        options = {"recipe": recipe, "scale": scale, "eps": EPS, "implementation": "kernel"}
        for kind, change in KINDS.items():
            changed = change(x)
            two = jax_fp8.fused_matmul(changed, w, **around, **options)
            jax_fp8.clear_plans()
            one = jax_fp8.fused_matmul(changed[:1], w, **first_row(around), **options)
            jax.block_until_ready(one)
            (plan,) = [p for p in jax_fp8.plans() if p["when"] == "run"]
            assert plan.get("algorithm") == ("quantizes x" if k <= 14336 else None)
            ref.assert_same_bits(one, two[:1])
            assert kind != "normal" or np.isnan(one.astype(np.float32)).any() == (
                scale is not None and scale != SCALE
            )


def block(rng, width, hidden, scales):
    """Two rows, and the links of an MLP and of two products behind it, the first with a norm."""
    x, up, around = operands(rng, 2, 2 * hidden, width, ("norm", "swiglu"))
    _, down, added = operands(rng, 2, width, hidden, ("residual",))
    _, third, normed = operands(rng, 2, width, width, ("norm",))
    _, last, biased = operands(rng, 2, width, width, ("bias",))
    return x, [
        Link(up, eps=EPS, **around, scale=scales[0]),
        Link(down, **added, scale=scales[1]),
        Link(third, eps=EPS, **normed, scale=scales[2]),
        Link(last, **biased, residual=1, scale=scales[0]),
    ]


@pytest.mark.parametrize("width, hidden", [(256, 272), (4096, 14336)], ids=str)
def test_so_it_is_in_a_chain(rng, recipe, width, hidden):
    scales = (SCALE, 2 * SCALE, SCALE) if recipe == "static" else (None,) * 3
    x, links = block(rng, width, hidden, scales)
    options = {"recipe": recipe, "implementation": "kernel"}
    two = jax_fp8.fused_chain(x, links, **options)
    links[1] = dataclasses.replace(links[1], residual=links[1].residual[:1])
    for one_call in (True, False):
        one = jax_fp8.fused_chain(x[:1], links, one_call=one_call, **options)
        for got, want in zip(one, two, strict=True):
            ref.assert_same_bits(got, want[:1])


@pytest.mark.parametrize("of", ["x", "norm"])
@pytest.mark.parametrize("offset", [1, 8])
def test_a_row_of_a_larger_buffer(rng, of, offset):
    """What does not start at a multiple of 16 bytes is quantized by a kernel, or XLA copies it."""
    x, w, around = operands(rng, 1, 336, 272, ("norm",))
    part = x if of == "x" else around["norm"]
    flat = jnp.concatenate([jnp.zeros(offset, part.dtype), part.reshape(-1)])
    options = {"recipe": "rowwise", "eps": EPS}

    @jax.jit
    def run(flat):
        found = flat[offset:].reshape(part.shape)
        given = (found, around["norm"]) if of == "x" else (x, found)
        return jax_fp8.fused_matmul(given[0], w, norm=given[1], **options)

    ref.assert_same_bits(run(flat), jax_fp8.fused_matmul(x, w, **around, **options))
