"""Gradients and layers over meshes: the values of one device, and every movement stated.

Each script runs on eight devices that the CPU pretends. ``a`` has two devices, ``b`` four.
"""

import pytest
from mesh_cases import KINDS, check

pytestmark = pytest.mark.ends

GRADIENTS = """
B, S, K, N = 8, 64, 512, 256
x = rng.standard_normal((B, S, K)).astype(np.float32)
w = rng.standard_normal((K, N)).astype(np.float32)
t = rng.standard_normal((B, S, N)).astype(np.float32)

def step(x, w, t):
    def multiply(x, w):
        return jax_fp8.dot_general(x, w, (((2,), (0,)), ((), ())), recipe=recipe)

    y, pull = jax.vjp(multiply, x, w)
    return y, *pull(t)

want = jax.tree.map(np.asarray, jax.jit(step)(x, w, t))
M = B * S
#: How x, w and the result lie -> the maxima: with a scale for a row of so many elements, with one
#: for a tensor so many of one; what is summed: y, dx or dw; the parts of w that are gathered, each
#: for two products.
PLACES = {
    "data": (P("a"), P(), P("a"), [K, N], 2, [K * N], []),
    "fully sharded": (P("a"), P("a"), P("a"), [K, N, N], 3, [K * N], [K * N]),
    "columns": (P(), P(None, "b"), P(None, None, "b"), [M, K], 2, [M * K], []),
    "rows": (P(None, None, "b"), P("b"), P(), [M, N], 2, [M * N], []),
    "data and columns": (
        *(P("a"), P(None, "b"), P("a", None, "b")),
        *([K, N // 4, M // 2, K], 3, [M // 2 * K, K * N // 4], []),
    ),
    "data and rows": (
        *(P("a", None, "b"), P("b"), P("a")),
        *([M // 2, K // 4, N, N], 3, [M // 2 * N, K // 4 * N], []),
    ),
    "fully sharded and columns": (
        *(P("a"), P("a", "b"), P("a", None, "b")),
        *([K, N // 4, M // 2, K // 2, N // 4], 3, [M // 2 * K, K * N // 4], [K * N // 4]),
    ),
}
for name, (of_x, of_w, of_y, rows, tensors, summed, gathered) in PLACES.items():
    stated = {
        "all-reduce s32": sorted(rows) if recipe == "rowwise" else [1] * tensors,
        "all-reduce f32": sorted(summed),
    }
    if gathered:
        stated["all-gather fp8"] = gathered * 2
        # The rows of the copy for dx. On an auto mesh XLA also divides those of the copy of x, as
        # dw is, for a moment.
        scales = [K] * (1 + (kind == AxisType.Auto))
        stated |= {"all-gather f32": scales} if recipe == "rowwise" else {}
    with jax.set_mesh(mesh):
        placed = put(x, mesh, *of_x), put(w, mesh, *of_w), put(t, mesh, *of_y)
        out = None
        if kind == AxisType.Auto:
            out = tuple(NamedSharding(mesh, spec) for spec in (of_y, of_x, of_w))
        program = compiled(jax.jit(step, out_shardings=out), *placed)
        found = moved(program)
        assert found == stated, (name, found)
        for got, other, spec in zip(program(*placed), want, (of_y, of_x, of_w), strict=True):
            np.testing.assert_allclose(got, other, rtol=0, atol=2e-6 * np.abs(other).max())
            padded = (*got.sharding.spec, *(None,) * got.ndim)[: got.ndim]
            assert padded == (*spec, *(None,) * got.ndim)[: got.ndim], (name, got.sharding)
"""


@KINDS
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_dot_general_and_its_gradients(kind, recipe):
    check(f"recipe = {recipe!r}\n" + GRADIENTS, kind)


@KINDS
def test_matmul_and_its_gradients(kind):
    check(
        """
x = rng.standard_normal((8, 16, 512)).astype(np.float32)
wq = jax_fp8.quantize(rng.standard_normal((256, 512)).astype(np.float32), granularity="row")
bias = rng.standard_normal(256).astype(np.float32)

t = rng.standard_normal((8, 16, 256)).astype(np.float32)

def step(x, bias, w, t):
    def multiply(x, bias):
        # Of relu the gradient is exact, and so quantized alike however the sums are rounded.
        return jax_fp8.matmul(x, w, recipe="rowwise", bias=bias, activation="relu")

    y, pull = jax.vjp(multiply, x, bias)
    return y, *pull(t)

want = jax.tree.map(np.asarray, jax.jit(step)(x, bias, wq, t))
M, K, N = 8 * 16, 512, 256
#: How x, w, the bias and the result lie -> the maxima, and what is reduced in float32: sums of the
#: result, of dx, and of the bias along each axis by itself; the largest of the scales of w's rows.
PLACES = (
    (P("a"), P(), P(), P("a"), [], [N]),
    (P("a", "b"), P(), P(), P("a", "b"), [], [N] * 2),
    (P("a"), P("b"), P("b"), P("a", None, "b"), [M // 2], [1, N // 4, M // 2 * K]),
    (P("a", None, "b"), P(None, "b"), P(), P("a"), [M // 2], [N, M // 2 * N]),
)
for of_x, of_w, of_bias, of_y, maxima, summed in PLACES:
    with jax.set_mesh(mesh):
        rows = of_w[0] if len(of_w) else None
        w = scaled(put(wq.data, mesh, *of_w), put(wq.scale, mesh, rows), "row")
        placed = put(x, mesh, *of_x), put(bias, mesh, *of_bias), w, put(t, mesh, *of_y)
        program = compiled(step, *placed)
        found = moved(program)
        stated = {"all-reduce s32": maxima, "all-reduce f32": summed}
        assert found == {name: sizes for name, sizes in stated.items() if sizes}, found
        got = program(*placed)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6 * np.abs(other).max())
        padded = (*got[1].sharding.spec, None, None)[:3]
        assert padded == (*of_x, None, None)[:3]
""",
        kind,
    )


@KINDS
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_layers(kind, recipe):
    """Flax's layers by columns and then by rows, with the data divided too."""
    check(
        f"""
import jax_fp8.nnx
from flax import nnx

x = rng.standard_normal((8, 16, 256)).astype(np.float32)
layers = nnx.Linear(256, 128, rngs=nnx.Rngs(0)), nnx.Linear(128, 256, rngs=nnx.Rngs(1))
model = nnx.Sequential(layers[0], nnx.relu, layers[1])
model = jax_fp8.nnx.convert(model, where=lambda path, layer: True, recipe={recipe!r})

def loss(model, x):
    return (model(x) ** 2).mean()

step = nnx.jit(nnx.value_and_grad(loss))
want = jax.tree.map(np.asarray, step(nnx.clone(model), x))
with jax.set_mesh(mesh):
    places = (layers[0].kernel, P(None, "b")), (layers[0].bias, P("b"))
    places += (layers[1].kernel, P("b", None)), (layers[1].bias, P(None))
    for variable, spec in places:
        variable.set_value(put(variable[...], mesh, *spec))
    got = step(model, put(x, mesh, "a"))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6 * np.abs(other).max())
    gradient = got[1]["layers"][0]["kernel"]
    assert gradient[...].sharding.spec == P(None, "b")
""",
        kind,
    )


@KINDS
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_values_where_something_has_to_be_gathered(kind, recipe):
    """One axis of the mesh for two things, and blocks that are not even: right all the same."""
    check(
        f"""
recipe = {recipe!r}
x = rng.standard_normal((8, 16, 384)).astype(np.float32)
w = rng.standard_normal((384, 256)).astype(np.float32)

def loss(x, w):
    y = jax_fp8.dot_general(x, w, (((2,), (0,)), ((), ())), recipe=recipe)
    return (y**2).sum()

step = jax.grad(loss, (0, 1))
want = jax.tree.map(np.asarray, jax.jit(step)(x, w))
for of_x, of_w in ((P("a", "b"), P()), (P("a", None, "b"), P("b")), (P("b"), P("b", "a"))):
    with jax.set_mesh(mesh):
        got = jax.jit(step)(put(x, mesh, *of_x), put(w, mesh, *of_w))
        for one, other in zip(got, want):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
""",
        kind,
    )


def test_an_explicit_mesh_that_is_not_set():
    """The mesh is in the operands' types."""
    check(
        """
x = rng.standard_normal((8, 16, 256)).astype(np.float32)
w = rng.standard_normal((256, 64)).astype(np.float32)
wq = jax_fp8.quantize(w.T, granularity="row")

t = rng.standard_normal((8, 16, 64)).astype(np.float32)

def both(x, w):
    dims = (((2,), (0,)), ((), ()))
    y = jax_fp8.dot_general(x, w, dims, recipe="rowwise")
    return y * jax_fp8.matmul(x, wq, recipe="rowwise")

def gradients(x, w, t):
    return jax.vjp(both, x, w)[1](t)

want = jax.tree.map(np.asarray, gradients(x, w, t))
wq = jax.tree.map(lambda leaf: put(leaf, mesh), wq)
got = gradients(put(x, mesh, "a"), put(w, mesh), put(t, mesh, "a"))
for one, other in zip(got, want):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())
""",
        "Explicit",
    )


@KINDS
@pytest.mark.parametrize("recipe", ["weight_only", "wide"])
def test_gradients_of_wide_products(kind, recipe):
    check(
        f"""
x = rng.standard_normal((8, 16, 256)).astype(jnp.bfloat16)
w = rng.standard_normal((256, 64)).astype(jnp.bfloat16)

def loss(x, w):
    y = jax_fp8.dot_general(x, w, (((2,), (0,)), ((), ())), recipe={recipe!r})
    return (y.astype(jnp.float32) ** 2).sum()

step = jax.grad(loss, (0, 1))
want = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), jax.jit(step)(x, w))
for of_w in (P(), P(None, "b"), P("a")):
    with jax.set_mesh(mesh):
        got = jax.jit(step)(put(x, mesh, "a"), put(w, mesh, *of_w))
        for one, other in zip(got, want):
            one = np.asarray(one, np.float32)
            # A sum over devices is of parts that are rounded to 8 bits.
            np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-7 * np.abs(other).max())
""",
        kind,
    )
