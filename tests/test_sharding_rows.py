"""Axes of rows that a mesh divides at once, as the batch and the sequence: what moves, and values.

Each script runs on eight devices that the CPU pretends. ``a`` has two devices, ``b`` four; of the
three axes ``a``, ``b`` and ``c`` each has two.
"""

import pytest
from mesh_cases import KINDS, check

pytestmark = pytest.mark.slow

ROWS = """
small = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(kind,) * 3)
B, S, K, N = 8, 512, 512, 256
x = rng.standard_normal((B, S, K)).astype(np.float32)
x[3, 200, 5] = 50.0  # The amax is on one device.
w = rng.standard_normal((K, N)).astype(np.float32)
t = rng.standard_normal((B, S, N)).astype(np.float32)

def multiply(x, w, **options):
    return jax_fp8.dot_general(x, w, (((2,), (0,)), ((), ())), recipe=recipe, **options)

def step_of(multiply):
    def step(x, w, t):
        y, pull = jax.vjp(multiply, x, w)
        return y, *pull(t)

    return step

def on(mesh, step, specs):
    "The step with its results as the operands lie, and operands that lie so."
    of_x, of_w, of_y = specs
    placed = [put(a, mesh, *spec) for a, spec in zip((x, w, t), specs)]
    out = None
    if kind == AxisType.Auto:
        out = tuple(NamedSharding(mesh, spec) for spec in (of_y, of_x, of_w))
    return compiled(jax.jit(step, out_shardings=out), *placed), placed

def expected(maxima=(), sums=(), gathered=(), scales=()):
    found = {"all-reduce s32": maxima, "all-reduce f32": sums}
    found |= {"all-gather fp8": gathered, "all-gather f32": scales}
    return {name: sorted(sizes) for name, sizes in found.items() if sizes}

def assert_near(got, want, specs):
    of_x, of_w, of_y = specs
    for one, other, spec in zip(got, want, (of_y, of_x, of_w), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())
        padded = (*one.sharding.spec, *(None,) * one.ndim)[: one.ndim]
        assert padded == (*spec, *(None,) * one.ndim)[: one.ndim], one.sharding
"""

GRADIENTS = """
want = jax.tree.map(np.asarray, jax.jit(step_of(multiply))(x, w, t))
ab = P("a", "b")
#: The mesh; how x, w and the result lie -> the maxima: with a scale for a row of so many elements,
#: with one for a tensor so many of one; the elements of y, dx or dw that are summed.
PLACES = {
    "batch and sequence": (mesh, (ab, P(), ab), [K, N], 2, [K * N]),
    "the other way": (mesh, (P("b", "a"), P(), P("b", "a")), [K, N], 2, [K * N]),
    "sequence": (mesh, (P(None, "b"), P(), P(None, "b")), [K, N], 2, [K * N]),
    "batch twice": (mesh, (P(("a", "b")), P(), P(("a", "b"))), [K, N], 2, [K * N]),
    "sequence twice": (small, (P("a", ("b", "c")), P(), P("a", ("b", "c"))), [K, N], 2, [K * N]),
    "rows": (
        *(small, (P("a", "b", "c"), P("c"), ab)),
        *([B * S // 4, K // 2, N, N], 3, [B * S // 4 * N, K // 2 * N]),
    ),
    "columns": (
        *(small, (ab, P(None, "c"), P("a", "b", "c"))),
        *([K, K, B * S // 4, N // 2], 3, [B * S // 4 * K, K * N // 2]),
    ),
    "fully sharded": (mesh, (ab, P(None, "a"), ab), [K, N, K], 3, [K * N]),
}
for name, (own, specs, rows, tensors, sums) in PLACES.items():
    gathered, scales = [], []
    if name == "fully sharded":  # Both copies of w, and their scales.
        gathered = [K * N] * 2
        # On an auto mesh XLA also divides those of the gradient's copy, as dw is, for a moment.
        scales = {"rowwise": [N] * (1 + (kind == AxisType.Auto)), "blockwise": [K * N >> 14] * 2}
        scales = scales.get(recipe, [])
    maxima = {"rowwise": rows, "tensorwise": [1] * tensors}.get(recipe, [])
    with jax.set_mesh(own):
        step, placed = on(own, step_of(multiply), specs)
        found = moved(step)
        assert found == expected(maxima, sums, gathered, scales), (name, found)
        assert_near(step(*placed), want, specs)

# The forward product alone.
for name, tensors in (("batch and sequence", 1), ("columns", 2)):
    own, (of_x, of_w, _), *_ = PLACES[name]
    with jax.set_mesh(own):
        found = moved(compiled(multiply, put(x, own, *of_x), put(w, own, *of_w)))
        assert found == expected([1] * tensors if recipe == "tensorwise" else []), (name, found)
"""


@KINDS
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_dot_general_and_its_gradients(kind, recipe):
    check(f"recipe = {recipe!r}\n" + ROWS + GRADIENTS, kind)


SEQUENCE = """
want = jax.tree.map(np.asarray, jax.jit(step_of(multiply))(x, w, t))
M, auto = B // 2 * S, kind == AxisType.Auto
#: How x, w and the result lie -> the maxima of rows, the elements of sums, and what is gathered in
#: FP8. One axis of the mesh divides the sequence of one of them, and K or N.
PLACES = {
    "to columns": (
        (P("a", "b"), P(None, "b"), P("a", None, "b")),
        *([M, N // 4, K, K], [M * K, K * N // 4], [M * K] * 2),
    ),
    "from rows": (
        (P("a", None, "b"), P("b"), P("a", "b")),
        *([K // 4, M, N, N], [M * N, K // 4 * N], [M * N] * 2),
    ),
}
# Their row scales too. On an auto mesh XLA also divides those of the other, for a moment.
scales = [M] * (1 + auto) if recipe == "rowwise" else []
for name, (specs, rows, sums, gathered) in PLACES.items():
    maxima = rows if recipe == "rowwise" else [1] * 3
    with jax.set_mesh(mesh):
        options = {} if auto else {"out_sharding": NamedSharding(mesh, specs[2])}
        step, placed = on(mesh, step_of(functools.partial(multiply, **options)), specs)
        found = moved(step)
        assert found == expected(maxima, sums, gathered, scales), (name, found)
        assert_near(step(*placed), want, specs)

        def statistics(probe, x, w, **options):
            return (multiply(x, w, probe=probe, **options) ** 2).mean()

        probed = functools.partial(jax.grad(statistics), jax_fp8.health_probe())
        alone = jax.jit(probed)(x, w)
        got = jax.jit(functools.partial(probed, **options))(*placed[:2])
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3)
"""


@KINDS
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_activations_are_gathered_in_fp8(kind, recipe):
    """A sequence that is divided goes into columns, and comes out of rows."""
    check(f"recipe = {recipe!r}\n" + ROWS + SEQUENCE, kind)


@KINDS
def test_copies_have_the_bits_of_one_device(kind):
    """Scales of the transposed copy are of all rows, along whatever axes they are divided."""
    check(
        """
from jax_fp8._src.layouts import quantize_layouts

x = rng.standard_normal((2, 4, 512, 512)).astype(np.float32)
x[1, 3, 300, 7] = 50.0
for granularity in ("tensor", "row", (1, 128)):
    how = jax_fp8.Operand(granularity=granularity)
    folded = jax_fp8.cast_transpose(x.reshape(2, 2048, 512), granularity=granularity)
    for wanted in ((how, how), (None, how)):
        want = [copy for asked, copy in zip(wanted, folded) if asked]
        cast = jax.jit(lambda x: quantize_layouts(x, *wanted)[:2])
        for spec in (P(None, "a", "b"), P("a", "b", None, None), P(None, "b", None, "a")):
            with jax.set_mesh(mesh):
                got = [copy for copy in cast(put(x, mesh, *spec)) if copy]
            assert got[-1].shape == (2, 512, 4, 512)
            entries = (*spec, None)[:4]
            assert (*got[-1].data.sharding.spec, None, None, None)[:4] == (
                entries[0], entries[3], entries[1], entries[2]
            )
            for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                ref.assert_same_bits(np.asarray(one).reshape(other.shape), np.asarray(other))
""",
        kind,
    )


OTHERS = """
recipe, ab = "rowwise", P("a", "b")
specs = ab, P(), ab

def heads(x, w):
    y = jax_fp8.einsum("bsd,dhe->hbse", x, w.reshape(K, 4, N // 4), recipe=recipe)
    return y.transpose(1, 2, 0, 3).reshape(B, S, N)

remat = jax.checkpoint(multiply, policy=jax_fp8.checkpoint_policy)
wide = jax_fp8.named_recipe("rowwise", wide_wgrad=True)
wq = jax_fp8.quantize(w.T, granularity="row")

def wide_wgrad(x, w):
    return jax_fp8.dot_general(x, w, (((2,), (0,)), ((), ())), recipe=wide)

def prepared(x, w):
    return multiply(x, jax_fp8.prepare_weight(w, recipe))

def matmul(x, w):
    return jax_fp8.matmul(x, wq, recipe=recipe)

def of_fp8(x, w):
    return multiply(jax_fp8.quantize(jax.lax.stop_gradient(x)), w)

#: The maxima, and what is summed.
FUNCTIONS = {
    heads: ([K, N], [K * N]),
    remat: ([K, N], [K * N]),
    prepared: ([K, N], [K * N]),
    wide_wgrad: ([], [K * N] * 2),  # XLA's own product sums along each axis by itself.
    matmul: ([], []),
    of_fp8: ([1, N], [K * N]),
}
for function, (maxima, sums) in FUNCTIONS.items():
    wq = jax_fp8.quantize(w.T, granularity="row")
    want = jax.tree.map(np.asarray, jax.jit(step_of(function))(x, w, t))
    wq = jax.tree.map(lambda leaf: put(leaf, mesh), wq)
    with jax.set_mesh(mesh):
        step, placed = on(mesh, step_of(function), specs)
        found = moved(step)
        assert found == expected(maxima, sums), (function, found)
        got = step(*placed)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())
"""


@KINDS
def test_other_ways_to_multiply(kind):
    check(ROWS + OTHERS, kind)


@KINDS
def test_layers(kind):
    """Flax's own layers, with weights by columns and then by rows."""
    check(
        """
import jax_fp8.nnx
from flax import nnx
small = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(kind,) * 3)
x = rng.standard_normal((8, 16, 64)).astype(np.float32)
layers = nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.Linear(128, 64, rngs=nnx.Rngs(1))
model = nnx.Sequential(layers[0], nnx.relu, layers[1])
model = jax_fp8.nnx.convert(model, where=lambda path, layer: True, recipe="rowwise")

def step(model, x):
    return nnx.value_and_grad(lambda model, x: (model(x) ** 2).mean())(model, x)

want = jax.tree.map(np.asarray, nnx.jit(step)(nnx.clone(model), x))
with jax.set_mesh(small):
    places = (layers[0].kernel, P(None, "c")), (layers[0].bias, P("c"))
    places += (layers[1].kernel, P("c", None)), (layers[1].bias, P(None))
    for variable, spec in places:
        variable.set_value(put(variable[...], small, *spec))
    placed = put(x, small, "a", "b")
    got = nnx.jit(step)(model, placed)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6 * np.abs(other).max())
    graph, state = nnx.split(model)
    found = moved(compiled(lambda state, x: step(nnx.merge(graph, state), x), state, placed))
    # Rows of x, of the transposed copies of both layers and of the second's weight.
    assert found.pop("all-reduce s32") == [32, *[64] * 5], found
    # The second layer's result and both dw, apart from the loss and the gradients of the biases.
    assert [size for size in found.pop("all-reduce f32") if size > 64] == [2048, 4096, 4096]
    assert not found
""",
        kind,
    )


@KINDS
def test_statistics_and_stochastic_rounding(kind):
    """Statistics are sums of numbers; bits of each device's own have the value for their mean."""
    check(
        "recipe = jax_fp8.named_recipe('rowwise', stochastic_rounding=True)\n"
        + ROWS
        + """
key = jax.random.key(0, impl="threefry2x32")

def step(x, w, t):
    def call(x, w, probe):
        return multiply(x, w, key=key, probe=probe)

    y, pull = jax.vjp(call, x, w, jax_fp8.health_probe())
    return y, *pull(t)

*want, stats = jax.tree.map(np.asarray, jax.jit(step)(x, w, t))
with jax.set_mesh(mesh):
    placed = [put(a, mesh, *spec) for a, spec in ((x, ("a", "b")), (w, ()), (t, ("a", "b")))]
    program = compiled(step, *placed)
    found = moved(program)
    wide = {name: [size for size in sizes if size > 1] for name, sizes in found.items()}
    assert wide == expected([K, N], [K * N]), found
    *got, own = program(*placed)
np.testing.assert_allclose(got[0], want[0], rtol=0, atol=2e-6 * np.abs(want[0]).max())
for one, other in zip(got[1:], want[1:], strict=True):
    assert (np.asarray(one) != other).any()
    # E5M2 values are up to a quarter apart: that squared, by a half, is the most of two variances.
    assert np.mean((one - other) ** 2) < 2.0**-4 / 2 * np.mean(other**2)
for name in ("activation", "weight"):
    ref.assert_same_trees(getattr(own, name).flushed, getattr(stats, name).flushed)
    np.testing.assert_allclose(getattr(own, name).noise, getattr(stats, name).noise, rtol=1e-5)
""",
        kind,
    )


@KINDS
def test_vmap(kind):
    """Entries that are divided too have amaxes of their own."""
    check(
        """
small = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(kind,) * 3)
x = rng.standard_normal((4, 8, 16, 64)).astype(np.float32)
x *= np.array([1, 30, 0.02, 5], np.float32)[:, None, None, None]
w = rng.standard_normal((64, 32)).astype(np.float32)
t = rng.standard_normal((4, 8, 16, 32)).astype(np.float32)

def step(x, w, t):
    def multiply(x, w):
        return jax_fp8.dot_general(x, w, (((2,), (0,)), ((), ())), recipe="tensorwise")

    y, pull = jax.vjp(multiply, x, w)
    return y, *pull(t)

step = jax.vmap(step, (0, None, 0))
want = jax.tree.map(np.asarray, jax.jit(step)(x, w, t))
with jax.set_mesh(small):
    placed = [put(a, small, *spec) for a, spec in ((x, "abc"), (w, ()), (t, "abc"))]
    program = compiled(step, *placed)
    found = moved(program)
    # Of two entries on each device.
    assert found == {"all-reduce s32": [2, 2], "all-reduce f32": [2 * 64 * 32]}, found
    for one, other in zip(program(*placed), want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())
""",
        kind,
    )
