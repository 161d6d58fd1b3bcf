"""fused_chain: the results of separate calls, in one; its arguments, its transformations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from around_cases import EPS, operands
from cases import on_gpu

import jax_fp8
from jax_fp8 import ChainLink as Link
from jax_fp8._src import ffi

pytestmark = pytest.mark.ends


@pytest.fixture
def implementation(quantizer):
    """Of fused_chain: it has those of quantize."""
    return quantizer


@pytest.fixture(params=["weight_only", "rowwise"])
def recipe(request):
    return request.param


def block(rng, m, width, hidden, qkv=None, w_dtype=ref.E4M3, granularity="row"):
    """x, and the links from a transformer's attention to its next one.

    The residuals are an array, that which the first link makes, and none.
    """

    def made(k, n, parts):
        x, w, around = operands(rng, m, n, k, parts, granularity, w_dtype=w_dtype)
        return x, Link(w, eps=EPS, **around)

    x, first = made(width, width, ("residual",))
    _, up = made(width, 2 * hidden, ("norm", "swiglu"))
    _, down = made(hidden, width, ())
    _, last = made(width, qkv or width + 16, ("norm", "bias"))
    return x, [first, up, Link(down.w, residual=0), last]


def apart(x, links, **options):
    """By fused_matmul."""
    results = []
    for link in links:
        residual = results[link.residual] if isinstance(link.residual, int) else link.residual
        x = jax_fp8.fused_matmul(
            x,
            link.w,
            norm=link.norm,
            eps=link.eps,
            bias=link.bias,
            activation=link.activation,
            residual=residual,
            **options,
        )
        results.append(x)
    return results


def assert_alike(found, want, *, recipe="weight_only", implementation=None, loose=None):
    """The same bits, but of plain JAX on a GPU, which XLA adds up otherwise in other programs."""
    for got, one in zip(found, want, strict=True):
        if ref.on_gpu() and implementation == "xla" if loose is None else loose:
            got, one = (np.asarray(y).astype(np.float32).reshape(-1) for y in (got, one))
            # Another sum may be rounded to another value in FP8.
            bound = 2.0**-5 if recipe == "weight_only" else 2.0**-1
            np.testing.assert_allclose(got, one, rtol=2.0**-4, atol=bound * float(np.std(one)))
        else:
            ref.assert_same_bits(got, one)


def check(x, links, **options):
    found = jax_fp8.fused_chain(x, links, **options)
    assert_alike(found, apart(x, links, **options), **options)
    return found


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [3, *on_gpu(1, 4, 5, 8)])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_it_is_the_separate_calls(implementation, recipe, rng, m, granularity):
    x, links = block(rng, m, 256, 528, granularity=granularity)
    options = {"recipe": recipe, "implementation": implementation}
    found = check(x, links, **options)
    assert [y.shape for y in found] == [(m, 256), (m, 528), (m, 256), (m, 272)]
    assert_alike(jax_fp8.fused_chain(x, links, one_call=False, **options), found, **options)


def test_one_link_and_many(implementation, recipe, rng):
    options = {"recipe": recipe, "implementation": implementation}
    x, links = block(rng, 2, 64, 96, 64)
    check(x, links[:1], **options)
    _, more = block(rng, 2, 64, 96, 64)
    more = [more[0], *more[1:2], Link(more[2].w, residual=4), *more[3:]]
    check(x, [*links, *more, Link(links[0].w, residual=3)], **options)


def test_axes_of_rows(implementation, recipe, rng):
    x, links = block(rng, 6, 64, 96)
    options = {"recipe": recipe, "implementation": implementation}
    flat = check(x, links, **options)
    for shape in ((2, 3), (6, 1), (1, 2, 3)):
        first = Link(links[0].w, residual=links[0].residual.reshape(*shape, 64))
        got = jax_fp8.fused_chain(x.reshape(*shape, 64), [first, *links[1:]], **options)
        assert_alike(got, [y.reshape(*shape, -1) for y in flat], **options)
    first = Link(links[0].w, residual=links[0].residual[0])
    got = jax_fp8.fused_chain(x[0], [first, *links[1:]], **options)
    assert [y.shape for y in got] == [y.shape[1:] for y in flat]


def test_what_the_kernels_do_not_take(rng, recipe):
    rows = {"m": 17, "qkv": 60} if recipe == "rowwise" else {"m": 17}
    for changed in ({"w_dtype": ref.E5M2}, {"granularity": (1, 128)}, rows, {"hidden": 104}):
        given = {"m": 3, "width": 256, "hidden": 256, **changed}
        x, links = block(rng, **given)
        found = jax_fp8.fused_chain(x, links, recipe=recipe)
        for got, want in zip(found, apart(x, links, recipe=recipe), strict=True):
            ref.assert_same_bits(got, want)
        index = 2 if "hidden" in changed else 3 if "qkv" in changed else 0
        with pytest.raises(
            NotImplementedError, match=f"^fused_chain, link {index}: implementation"
        ):
            jax_fp8.fused_chain(x, links, recipe=recipe, implementation="kernel")


def test_no_rows(implementation, recipe, rng):
    x, links = block(rng, 2, 64, 96)
    links[0] = Link(links[0].w)
    found = jax_fp8.fused_chain(x[:0], links, recipe=recipe, implementation=implementation)
    assert [y.shape for y in found] == [(0, 64), (0, 96), (0, 64), (0, 80)]


# --- Transformations ------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", ["x", "residual", "x residual", "w", "bias"])
def test_vmap_is_a_loop(implementation, recipe, rng, batched):
    entries = [block(rng, 2, 64, 96) for _ in range(3)]

    def parts(entry):
        x, links = entry
        made = {"x": x, "residual": links[0].residual, "w": links[2].w, "bias": links[3].bias}
        return {name: made[name] for name in batched.split()}

    def run(changed):
        x, links = entries[0]
        links = list(links)
        if "residual" in changed:
            links[0] = Link(links[0].w, residual=changed["residual"])
        if "w" in changed:
            links[2] = Link(changed["w"], residual=0)
        if "bias" in changed:
            links[3] = Link(links[3].w, norm=links[3].norm, eps=EPS, bias=changed["bias"])
        options = {"recipe": recipe, "implementation": implementation}
        return jax_fp8.fused_chain(changed.get("x", x), links, **options)

    each = [parts(entry) for entry in entries]
    got = jax.vmap(run)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
    want = [jnp.stack(results) for results in zip(*map(run, each), strict=True)]
    loose = implementation == "xla"  # Which adds up in another order for more rows.
    assert_alike(got, want, recipe=recipe, implementation=implementation, loose=loose)


def test_vmap_of_more_rows_than_the_kernels_take(rng, recipe):
    x, links = block(rng, 2, 64, 96)
    many = jnp.stack([x * i for i in range(9)])
    links[0] = Link(links[0].w)
    options = {"recipe": recipe, "implementation": "kernel"}
    got = jax.vmap(lambda x: jax_fp8.fused_chain(x, links, **options))(many)
    if recipe == "rowwise":  # The entries' rows are those of one call, which may have so many.
        together = apart(many.reshape(-1, x.shape[-1]), links, **options)
        for one, want in zip(got, together, strict=True):
            ref.assert_same_bits(one, want.reshape(one.shape))
        return
    for entry, x in enumerate(many):
        for one, want in zip(got, apart(x, links, **options), strict=True):
            ref.assert_same_bits(one[entry], want)


def test_it_cannot_be_differentiated(implementation, rng):
    x, links = block(rng, 2, 64, 96)

    def loss(x):
        results = jax_fp8.fused_chain(x, links, implementation=implementation)
        return sum(y.astype(jnp.float32).sum() for y in results)

    with pytest.raises(NotImplementedError, match="fused_chain: it cannot be differentiated"):
        jax.grad(loss)(x)


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ([], ValueError, "fused_chain: there must be a link"),
        ([{"w": None}], TypeError, "fused_chain, link 0: w must be a jax_fp8.ScaledArray"),
        ([{}, {"residual": 1}], ValueError, "link 1 can add the result of a link before it, got 1"),
        ([{"residual": 0}], ValueError, "link 0 can add the result of a link before it, got 0"),
        ([{}, {"residual": -1}], ValueError, "link 1 can add .* got -1"),
        ([{}, {"residual": True}], TypeError, "an array or the index of a link, got True"),
        ([{}, {"norm": jnp.ones(8)}], ValueError, r"fused_chain, link 1: norm must be of shape"),
        ([{}, {"eps": -1.0}], ValueError, "fused_chain, link 1: eps must be finite"),
        ([{}, {"activation": "gelu"}], ValueError, "link 1: unknown activation 'gelu'"),
        (
            [{"activation": "swiglu"}, {}],
            ValueError,
            r"link 1: multiplies .*\(2, 16\) and \(32, 32",
        ),
        (
            [{"activation": "swiglu"}, {"w": (32, 16), "residual": 0}],
            ValueError,
            r"link 1: residual must have shape .*\(2, 32\), got bfloat16\(2, 16\)",
        ),
    ],
)
def test_bad_arguments(changed, error, message):
    def made(shape):
        return shape and jax_fp8.quantize(jnp.ones(shape), granularity="row")

    links = [Link(**{**given, "w": made(given.get("w", (32, 32)))}) for given in changed]
    with pytest.raises(error, match=message):
        jax_fp8.fused_chain(jnp.ones((2, 32), jnp.bfloat16), links)


def test_bad_arguments_of_all_links():
    x, links = jnp.ones((2, 32), jnp.bfloat16), [Link(jax_fp8.quantize(jnp.ones((32, 32))))]
    with pytest.raises(TypeError, match="links must be jax_fp8.ChainLink, got Scaled"):
        jax_fp8.fused_chain(x, [links[0].w])
    with pytest.raises(TypeError, match="fused_chain: x must be bfloat16 or float16, got float32"):
        jax_fp8.fused_chain(x.astype(jnp.float32), links)
    for name in ("recipe", "implementation"):
        with pytest.raises(ValueError, match=f"unknown {name} 'gemv'"):
            jax_fp8.fused_chain(x, links, **{name: "gemv"})


def test_what_is_no_array_is_no_residual():
    x, w = jnp.ones((2, 32), jnp.bfloat16), jax_fp8.quantize(jnp.ones((32, 32)))
    struct = jax.ShapeDtypeStruct(x.shape, x.dtype)
    for implementation in (None, "xla", "kernel"):
        with pytest.raises(TypeError):
            jax_fp8.fused_matmul(x, w, residual=struct, implementation=implementation)
        with pytest.raises(TypeError):
            jax_fp8.fused_chain(x, [Link(w, residual=struct)], implementation=implementation)


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["weight_only", "rowwise", "static"])
@pytest.mark.parametrize(
    "m, width, hidden, qkv",
    [
        (1, 4096, 14336, 6144),
        (16, 4096, 14336, 6144),  # Kernels of clusters, which start beside a product.
        (2, 64, 8208, 64),
        (16, 64, 8192, 64),
        (3, 64, 8192, 64),
        (4, 16, 40000, 16),  # A kernel of one block, beside which all of the next one may start.
        (1, 12304, 16, 40),
        (3, 2064, 1040, 8200),
    ],
    ids=str,
)
def test_a_product_starts_after_what_it_multiplies(recipe, rng, m, width, hidden, qkv):
    """The same chain with other values each time, which early reads would take from the last."""
    m = min(m, 8) if recipe == "weight_only" else m
    x, links = block(rng, m, width, hidden, qkv)

    @jax.jit
    def both(x, shift):
        # The program writes weights right before, which the first link must not read early.
        written = [
            jax_fp8.ScaledArray(jnp.roll(link.w.data, shift, 0), link.w.scale, "row")
            for link in links
        ]
        scale = 2.0**-7 * (1 + shift % 2) if recipe == "static" else None
        now = [
            dataclasses.replace(
                link,
                w=w,
                norm=None if link.norm is None else jnp.roll(link.norm, shift),
                scale=scale,
            )
            for w, link in zip(written, links, strict=True)
        ]
        options = {"recipe": recipe, "implementation": "kernel"}
        found = jax_fp8.fused_chain(x, now, **options)
        return found, jax_fp8.fused_chain(x, now, one_call=False, **options)

    for shift in range(20):
        found, want = both(x * (1 + shift % 3), shift)
        for got, expected in zip(found, want, strict=True):
            ref.assert_same_bits(got, expected)


@pytest.mark.gpu
def test_what_runs(rng, recipe):
    x, links = block(rng, 8, 64, 96)
    jax_fp8.clear_plans()
    jax.block_until_ready(jax_fp8.fused_chain(x, links, recipe=recipe))
    found = [p for p in jax_fp8.plans() if p["when"] == "run"]
    assert {p["operation"] for p in found} == {"fused_matmul"}
    assert {p["implementation"] for p in found} == {
        "gemv" if recipe == "weight_only" else "small_m"
    }
    assert len(found) == 4


@pytest.mark.parametrize("quantizes", [False, True])
def test_a_link_in_steps_is_between_two_that_are_not(handlers, rng, quantizes):
    """Of the handler: operations do not ask it for links that it has no kernel for.

    Where it quantizes, with scales that are given, a link in steps finds its codes written.
    """
    ffi.register()
    options = {"quantizes": quantizes, "many_rows": False, "implementation": "", "capability": 0}
    scale = jnp.full((1, 1), 2.0**-4, jnp.float32) if quantizes else None

    def link(n, k, residual=None):
        w = jax_fp8.quantize(jnp.asarray(rng.standard_normal((n, k)), jnp.float32))
        return ffi.Link(w.data, w.scale, None, None, residual, scale, 0.0, swiglu=False)

    x = jnp.asarray(rng.standard_normal((2, 64)), ref.BF16)
    links = [link(72, 64), link(64, 72), link(64, 64, residual=1), link(64, 64)]
    jax_fp8.clear_plans()
    found = jax.block_until_ready(ffi.fused_matmul(x, links, **options))
    ran = [p["implementation"] for p in jax_fp8.plans() if p["when"] == "run"]
    # A K of 72 is not in steps of 16. Plans are not in the order in which they ran.
    kernel = "small_m" if quantizes else "gemv"
    assert sorted(ran) == ([kernel] * 3 + ["steps"] if ref.on_gpu() else ["naive"] * 4)
    for one, got in zip(links, found, strict=True):
        residual = one.residual if one.residual is None else found[one.residual]
        (want,) = ffi.fused_matmul(x, [dataclasses.replace(one, residual=residual)], **options)
        ref.assert_same_bits(got, want)
        x = got
