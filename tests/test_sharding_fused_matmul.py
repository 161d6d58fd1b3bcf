"""fused_matmul over meshes: its values, how its results lie, and what moves."""

import pytest
from mesh_cases import KINDS, check

pytestmark = pytest.mark.ends

SCRIPT = """
from around_cases import EPS, expected, operands
M, N, K = 8, 64, 1024
#: Of x, w, the columns of the result.
PLACES = {
    "rows": (P("a"), P(), None),
    "columns": (P(), P("b"), "b"),
    "both": (P("a"), P("b"), "b"),
    "K": (P(None, "b"), P(None, "b"), None),
    "rows and K": (P("a", "b"), P(None, "b"), None),
}

def padded(spec):
    return (*spec, None, None)[:2]

for parts in ((), ("norm",), ("bias", "residual"), ("norm", "bias", "swiglu", "residual")):
    x, w, around = operands(rng, M, N, K, parts)
    options = {"activation": around.pop("activation", None), "eps": EPS}
    def run(x, w, around):
        return jax_fp8.fused_matmul(x, w, **around, **options)
    y, error = expected(x, w, **around, activation=options["activation"])
    for name, (of_x, of_w, columns) in PLACES.items():
        swiglu = "swiglu" in parts
        # Gates and what goes with them are on different devices, and the sums are brought together.
        brought = {"all-gather f32": 1} if swiglu and columns is not None else {}
        columns = None if swiglu else columns
        rows, k = padded(of_x)
        lies = {"norm": (k,), "bias": (padded(of_w)[0],), "residual": (rows, columns)}
        with jax.set_mesh(mesh):
            placed = (
                put(x, mesh, *of_x),
                jax_fp8.ScaledArray(
                    put(w.data, mesh, *of_w), put(w.scale, mesh, *of_w[:1]), w.granularity
                ),
                {name: put(array, mesh, *lies[name]) for name, array in around.items()},
            )
            found = counted(run, *placed)
            # The sums, and before them the squares.
            sums = (1 + ("norm" in parts)) if k is not None else 0
            assert found.pop("all-reduce f32", 0) == sums, (parts, name, found)
            assert found == brought, (parts, name, found)
            got = jax.jit(run)(*placed)
            ref.assert_close(got, y, error)
            assert padded(got.sharding.spec) == (rows, columns), (parts, name, got.sharding)
"""


@KINDS
def test_values_and_what_moves(kind):
    check(SCRIPT, kind)


@KINDS
def test_a_scale_that_is_given(kind):
    """It is that of every part of a row, so that K may be divided."""
    check(
        """
from around_cases import expected, operands, quantized

x, w, around = operands(rng, 8, 64, 1024, ("bias", "residual"))
scale = jnp.float32(2.0**-7)

def run(x, w, around, scale):
    return jax_fp8.fused_matmul(x, w, **around, recipe="static", scale=scale)

y, error = expected(x, w, multiplied=quantized(x, scale=scale), **around)
for of_x, of_w, sums in (
    (("a", None), (None, None), {}),
    ((None, None), ("b", None), {}),
    (("a", "b"), (None, "b"), {"all-reduce f32": 1}),
):
    weights = jax_fp8.ScaledArray(
        put(w.data, mesh, *of_w), put(w.scale, mesh, of_w[0]), w.granularity
    )
    lies = {"bias": of_w[:1], "residual": (of_x[0], of_w[0])}
    with jax.set_mesh(mesh):
        placed = {name: put(array, mesh, *lies[name]) for name, array in around.items()}
        placed = put(x, mesh, *of_x), weights, placed, put(scale, mesh)
        assert counted(run, *placed) == sums, (of_x, of_w)
        ref.assert_close(jax.jit(run)(*placed), y, error)
""",
        kind,
    )


@KINDS
def test_rows_with_scales(kind):
    """A row that gets a scale is whole: where K is divided, x and w are brought together."""
    check(
        """
from around_cases import EPS, expected, operands, quantized
for parts in ((), ("norm", "residual")):
    x, w, around = operands(rng, 8, 64, 1024, parts)
    want = expected(x, w, **around, multiplied=quantized(x, around.get("norm")))
    def run(x, w):
        return jax_fp8.fused_matmul(x, w, **around, eps=EPS, recipe="rowwise")
    for of_x, of_w, moved in (
        (P("a"), P(), {}),
        (P("a"), P("b"), {}),
        # XLA moves bfloat16 as float32 between CPUs.
        (P(None, "b"), P(None, "b"), {"all-gather f32": 1, "all-gather fp8": 1}),
    ):
        with jax.set_mesh(mesh):
            data, scale = put(w.data, mesh, *of_w), put(w.scale, mesh, *of_w[:1])
            placed = put(x, mesh, *of_x), jax_fp8.ScaledArray(data, scale, w.granularity)
            found = counted(run, *placed)
            assert found == moved, (parts, of_x, found)
            got = jax.jit(run)(*placed)
            ref.assert_close(got, *want)
            if not moved:
                rows, columns = (*of_x, None)[:1][0], (*of_w, None)[:1][0]
                assert (*got.sharding.spec, None, None)[:2] == (rows, columns), got.sharding
""",
        kind,
    )


@KINDS
def test_many_rows_of_a_swiglu(kind):
    """Their sums are larger than the weights, which are brought together then."""
    check(
        """
from around_cases import EPS, expected, operands
x, w, around = operands(rng, 300, 64, 1024, ("norm", "swiglu"))
def run(x, w):
    return jax_fp8.fused_matmul(x, w, **around, eps=EPS)
with jax.set_mesh(mesh):
    data, scale = put(w.data, mesh, "b"), put(w.scale, mesh, "b")
    placed = x, jax_fp8.ScaledArray(data, scale, w.granularity)
    assert counted(run, *placed) == {"all-gather fp8": 1, "all-gather f32": 1}
    ref.assert_close(jax.jit(run)(*placed), *expected(x, w, **around))
""",
        kind,
    )


@KINDS
def test_the_named_kernel_has_all_of_k(kind):
    """On the CPU it is the loop of the host, which knows no mesh."""
    check(
        """
from around_cases import ALL, EPS, expected, operands
x, w, around = operands(rng, 8, 64, 1024, ALL)
activation = around.pop("activation")
def run(x, w, around):
    return jax_fp8.fused_matmul(
        x, w, **around, activation=activation, eps=EPS, implementation="kernel"
    )
want = jax.jit(run)(x, w, around)
with jax.set_mesh(mesh):
    placed = put(x, mesh, "a", "b"), jax_fp8.ScaledArray(
        put(w.data, mesh, None, "b"), put(w.scale, mesh), w.granularity
    )
    found = counted(run, *placed, around)
    assert all(name.startswith("all-gather") for name in found) and found, found
    ref.assert_same_bits(jax.jit(run)(*placed, around), want)
""",
        kind,
    )


@KINDS
def test_vmap(kind):
    """Entries that lie on different devices: more rows, or one after the other."""
    check(
        """
from around_cases import ALL, EPS, expected, operands
made = [operands(rng, 2, 64, 1024, ALL) for _ in range(4)]
activation = made[0][2]["activation"]
stack = lambda *leaves: jnp.stack(leaves)
x = stack(*(x for x, _, _ in made))
residual = stack(*(around["residual"] for *_, around in made))
_, w, around = made[0]
def run(x, residual):
    vectors = {"norm": around["norm"], "bias": around["bias"]}
    return jax_fp8.fused_matmul(
        x, w, **vectors, residual=residual, activation=activation, eps=EPS, implementation="kernel"
    )
want = stack(*(run(*pair) for pair in zip(x, residual)))
with jax.set_mesh(mesh):
    got = jax.jit(jax.vmap(run))(put(x, mesh, "b"), put(residual, mesh, "b"))
    ref.assert_same_bits(got, want)
    assert got.sharding.spec[0] == "b", got.sharding
""",
        kind,
    )


def test_inside_of_shard_map():
    check(
        """
from around_cases import EPS, expected, operands
x, w, around = operands(rng, 8, 64, 1024, ("norm", "residual"))
def run(x, w, around):
    return jax_fp8.fused_matmul(x, w, **around, eps=EPS)
in_specs = (P("a"), P("b"), {"norm": P(), "residual": P("a", "b")})
with jax.set_mesh(mesh):
    got = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=P("a", "b"), check_vma=True)
    )(x, w, around)
ref.assert_close(got, *expected(x, w, **around))
""",
        "Auto",
    )
