"""Operations divided over meshes: the values of one device, and no collective but those stated.

Each script runs on eight devices that the CPU pretends. ``a`` has two devices, ``b`` four.
"""

import pytest
from test_partition import run

MESHES = """
import re

def mesh_of(axis_type):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)

def collectives(function, *operands):
    "Their number by name and dtype, of the program as it is compiled."
    text = jax.jit(function).lower(*operands).compile().as_text()
    names = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    found = {}
    for line in text.splitlines():
        match = re.search(rf"= \\(?(\\w+)\\[.* ({names})(-start)?\\(", line)
        if match:
            # A CPU gathers FP8 as float16.
            dtype = {"f16": "fp8"}.get(match.group(1), match.group(1))
            key = f"{match.group(2)} {dtype}"
            found[key] = found.get(key, 0) + 1
    return found

AMAX = "all-reduce s32"
"""

KINDS = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


def check(script, kind):
    run(MESHES + f"kind = AxisType.{kind}\nmesh = mesh_of(kind)\n" + script)


QUANTIZED = """
x = rng.standard_normal((16, 32, 512)).astype(np.float32)
x[0, 0, 0] = 100.0  # The amax is on one device.
#: How x lies -> how often an amax is reduced, with a scale for a tensor and for a row.
PLACES = {
    P("a"): (1, 0),
    P(None, "b"): (1, 0),
    P(None, None, "a"): (1, 1),
    P("a", "b"): (1, 0),
    P(("a", "b")): (1, 0),
    P(None, "b", "a"): (1, 1),
}
for granularity in ("tensor", "row", (1, 128)):
    def quantize(x):
        return jax_fp8.quantize(x, granularity=granularity, return_amax=True)

    want = jax.tree.map(np.asarray, quantize(x))
    for spec, counts in PLACES.items():
        with jax.set_mesh(mesh):
            operand = put(x, mesh, *spec)
            count = dict(zip(("tensor", "row"), counts)).get(granularity, 0)
            assert collectives(quantize, operand) == ({AMAX: count} if count else {}), spec
            got = jax.jit(quantize)(operand)
            ref.assert_same_trees(got, want)
            entries = (*spec, None, None)[:3]
            assert (*got[0].data.sharding.spec, None, None)[:3] == entries
            whole = granularity != "tensor"
            of_scale = (*entries[:2], entries[2] if granularity == (1, 128) else None)
            found = (*got[0].scale.sharding.spec, None, None, None)[:3]
            assert found == (of_scale if whole else (None,) * 3)
"""


@KINDS
def test_quantize(kind):
    check(QUANTIZED, kind)


@KINDS
def test_values_that_are_not_finite(kind):
    """One device's NaN or infinity is all devices'."""
    check(
        """
x = np.ones((16, 512), np.float32)
for bad in (np.nan, np.inf, -np.inf):
    x[3, 5] = bad
    with jax.set_mesh(mesh):
        got = jax.jit(jax_fp8.quantize)(put(x, mesh, "a", "b"))
        assert np.isnan(np.asarray(got.data).astype(np.float32)).all()
        rows = jax.jit(lambda x: jax_fp8.quantize(x, granularity="row"))(put(x, mesh, "a", "b"))
        is_nan = np.isnan(np.asarray(rows.data).astype(np.float32))
        assert is_nan[3].all() and is_nan.sum() == 512
""",
        kind,
    )


@KINDS
def test_cast_transpose(kind):
    check(
        """
x = rng.standard_normal((2, 512, 512)).astype(np.float32)
x[1, 7, 300] = 50.0
#: How x lies -> how often an amax is reduced, with a scale for a tensor and for rows.
PLACES = {
    P("a"): (1, 0),
    P(None, "b"): (1, 1),  # Of the transpose's rows.
    P(None, None, "a"): (1, 1),  # Of its own.
    P(None, "a", "b"): (1, 2),
}
granularities = ("tensor", "row", (1, 128), (128, 128))
for granularity, named in (*((g, None) for g in granularities), ("row", "kernel")):
    def cast(x):
        return jax_fp8.cast_transpose(x, granularity=granularity, implementation=named)

    want = jax.tree.map(np.asarray, cast(x))
    for spec, counts in PLACES.items():
        with jax.set_mesh(mesh):
            operand = put(x, mesh, *spec)
            count = dict(zip(("tensor", "row"), counts)).get(granularity, 0)
            assert collectives(cast, operand) == ({AMAX: count} if count else {}), spec
            straight, transposed = jax.jit(cast)(operand)
            ref.assert_same_trees((straight, transposed), want)
            entries = (*spec, None, None)[:3]
            assert (*transposed.data.sharding.spec, None, None)[:3] == (
                entries[0], entries[2], entries[1]
            )

def rounded(x, key):
    return jax_fp8.cast_transpose(x, granularity="tensor", key=key)

# Parts that are rounded stochastically have bits of their own: the mean is still the value.
small = np.full((256, 256), 1.03, np.float32)
small[0, 0] = 448.0
with jax.set_mesh(mesh):
    straight, transposed = jax.jit(rounded)(put(small, mesh, "a", "b"), jax.random.key(0))
values = np.asarray(jax_fp8.dequantize(straight))
ref.assert_same_bits(np.asarray(transposed.data), np.asarray(straight.data).T)
assert set(np.unique(values[1:])) == {1.0, 1.125}
assert abs(values[1:].mean() - 1.03) < 5 * 0.0625 / 255
parts = values[1:129, :64], values[1:129, 64:128]
assert (parts[0] != parts[1]).any()
""",
        kind,
    )


PRODUCT = """
#: How x and w lie -> how often data and row scales are gathered, and products summed.
PLACES = {
    "data": (P("a"), P(), 0, 0),
    "data and sequence": (P("a", "b"), P(), 0, 0),
    "fully sharded along K": (P("a"), P(None, "a"), 1, 0),
    "columns": (P(), P("b"), 0, 0),
    "rows": (P(None, None, "b"), P(None, "b"), 0, 1),
    "data and columns": (P("a"), P("b"), 0, 0),
    "data and rows": (P("a", None, "b"), P(None, "b"), 0, 1),
}
def lie(operand, spec):
    entries = (*spec, None, None)
    shape = operand.data.shape
    of_scale = [e if n == m else None for e, n, m in zip(entries, operand.scale.shape, shape)]
    return scaled(
        put(operand.data, mesh, *spec), put(operand.scale, mesh, *of_scale), operand.granularity
    )

x = rng.integers(-8, 9, (8, 16, 512)).astype(ref.E4M3)
w = rng.integers(-8, 9, (256, 512)).astype(ref.E4M3)
bias = rng.integers(-99, 99, 256).astype(np.float32)
for granularity in ("tensor", "row"):
    scales = [
        2.0 ** rng.integers(-2, 3, s.shape[:-1] + (1,)).astype(np.float32)
        if granularity == "row" else np.full((1,) * s.ndim, 0.5, np.float32)
        for s in (x, w)
    ]
    operands = scaled(x, scales[0], granularity), scaled(w, scales[1], granularity)
    for options in (
        dict(preferred_element_type=jnp.float32),
        dict(preferred_element_type=jnp.float32, bias=bias, activation="relu"),
    ):
        def multiply(x, w):
            return jax_fp8.scaled_matmul(x, w, implementation=implementation, **options)

        want = np.asarray(multiply(*operands))
        for name, (of_x, of_w, gathered, summed) in PLACES.items():
            with jax.set_mesh(mesh):
                placed = lie(operands[0], of_x), lie(operands[1], of_w)
                found = collectives(multiply, *placed)
                stated = {"all-gather fp8": gathered, "all-reduce f32": summed}
                assert found == {k: n for k, n in stated.items() if n}, (name, found)
                got = jax.jit(multiply)(*placed)
                # The sums are exact whatever their order.
                np.testing.assert_array_equal(got, want, err_msg=name)
                rows = (*of_x, None, None)[:2]
                columns = (*of_w, None)[0]
                assert (*got.sharding.spec, None, None, None)[:3] == (*rows, columns), name

def narrow(x, w):
    return jax_fp8.scaled_matmul(
        x, w, preferred_element_type=jnp.float8_e4m3fn, output_scale=jnp.float32(8.0),
        return_amax=True, implementation=implementation,
    )

want = jax.tree.map(np.asarray, narrow(*operands))
for name, (of_x, of_w, *_) in PLACES.items():
    with jax.set_mesh(mesh):
        got = jax.jit(narrow)(lie(operands[0], of_x), lie(operands[1], of_w))
        ref.assert_same_trees(got, want)
"""


@KINDS
@pytest.mark.parametrize("implementation", [None, "naive"])
def test_scaled_matmul(kind, implementation):
    check(f"implementation = {implementation!r}\n" + PRODUCT, kind)


@KINDS
def test_block_scales(kind):
    """Whole blocks are divided, and K only where both sides have whole blocks of it."""
    check(
        """
x = rng.standard_normal((8, 16, 512)).astype(np.float32)
w = rng.standard_normal((512, 512)).astype(np.float32)
xq = jax_fp8.quantize(x, granularity=(1, 128))
wq = jax_fp8.quantize(w, granularity=(128, 128))

def multiply(x, w):
    return jax_fp8.scaled_matmul(x, w, preferred_element_type=jnp.float32)

want = np.asarray(multiply(xq, wq))
for of_x, of_w, stated in (
    (P("a"), P(), {}),
    (P("a"), P("b"), {}),
    (P(None, None, "b"), P(None, "b"), {"all-reduce f32": 1}),
    (P("a", None, "b"), P(None, "b"), {"all-reduce f32": 1}),
):
    with jax.set_mesh(mesh):
        placed = [
            scaled(put(q.data, mesh, *spec), put(q.scale, mesh, *spec), q.granularity)
            for q, spec in ((xq, of_x), (wq, of_w))
        ]
        assert collectives(multiply, *placed) == stated
        got = jax.jit(multiply)(*placed)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
""",
        kind,
    )


GRADIENTS = """
from mesh_cases import compiled, moved

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
from mesh_cases import compiled, moved

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


def test_a_scale_that_lies_otherwise_than_its_data():
    """It would be moved at each use; whole on every device it may be."""
    check(
        """
codes = rng.integers(-3, 4, (16, 64)).astype(ref.E4M3)
scales = (2.0 ** rng.integers(-2, 3, (16, 1))).astype(np.float32)
w = scaled(rng.integers(-3, 4, (24, 64)).astype(ref.E4M3), np.ones((1, 1), np.float32))
want = jax_fp8.scaled_matmul(scaled(codes, scales, "row"), w)
with jax.set_mesh(mesh):
    data = put(codes, mesh, ("a", "b"))
    for axes in (("a", "b"), "a", None):
        x = jax_fp8.ScaledArray(data, put(scales, mesh, axes), "row")
        assert np.array_equal(jax.jit(jax_fp8.scaled_matmul)(x, w), want), axes
    for data, axes in ((data, "b"), (put(codes, mesh, "a"), "b"), (put(codes, mesh), "a")):
        x = jax_fp8.ScaledArray(data, put(scales, mesh, axes), "row")
        for function in (jax_fp8.scaled_matmul, jax.jit(jax_fp8.scaled_matmul)):
            message = message_of(function, x, w)
            assert message.startswith(
                "ValueError: scaled_matmul: x.scale must be divided over the mesh as x.data, or not"
            ), message
        assert "dequantize: x.scale must be" in message_of(jax_fp8.dequantize, x)
""",
        "Explicit",
    )


def test_rows_that_cannot_be_divided():
    """JAX's own error, and not another number."""
    run(
        """
        mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
        print(message_of(lambda: put(np.ones((12, 64), np.float32), mesh, "a")))
        with jax.set_mesh(mesh):
            x = put(np.ones((16, 64), np.float32), mesh, "a")
            q = jax_fp8.quantize(x, granularity="row")
            assert q.data.sharding.spec == P("a", None) and q.scale.sharding.spec == P("a", None)
        """
    )


# --- Other ways to come there ---------------------------------------------------------------------


@KINDS
def test_vmap(kind):
    """Entries that are on different devices have scales and amaxes of their own."""
    check(
        """
x = rng.standard_normal((4, 16, 256)).astype(np.float32)
x *= np.array([1, 30, 0.02, 5], np.float32)[:, None, None]

def amaxes(x):
    return jax_fp8.cast_transpose(x, return_amax=True)

for function in (jax.vmap(jax_fp8.quantize), jax.vmap(amaxes)):
    want = jax.tree.map(np.asarray, jax.jit(function)(x))
    for spec in (P("a"), P(None, "b"), P("a", "b")):
        with jax.set_mesh(mesh):
            ref.assert_same_trees(jax.jit(function)(put(x, mesh, *spec)), want)
""",
        kind,
    )


@KINDS
def test_vmap_of_delayed_scaling(kind):
    check(
        """
x = rng.standard_normal((4, 16, 64)).astype(np.float32)
x *= np.array([1, 30, 0.02, 5], np.float32)[:, None, None]
w = rng.standard_normal((64, 32)).astype(np.float32)
state = jax_fp8.init_scaling("delayed", weight=w)

def one(x, w):
    dims = (((1,), (0,)), ((), ()))
    return jax_fp8.dot_general(x, w, dims, recipe="delayed", state=state)[1].activation

want = np.asarray(jax.vmap(one, (0, None))(x, w))
with jax.set_mesh(mesh):
    state = jax.tree.map(lambda leaf: put(leaf, mesh), state)
    got = jax.jit(jax.vmap(one, (0, None)))(put(x, mesh, "a"), put(w, mesh))
np.testing.assert_array_equal(got, want)
""",
        kind,
    )


@KINDS
def test_operands_that_lie_on_no_mesh(kind):
    check(
        """
x = rng.standard_normal((16, 512)).astype(np.float32)
w = rng.standard_normal((512, 64)).astype(np.float32)
functions = (
    lambda x, w: jax_fp8.quantize(x),
    lambda x, w: jax_fp8.cast_transpose(x, granularity=(1, 128)),
    lambda x, w: jax_fp8.dot_general(x, w, (((1,), (0,)), ((), ())), recipe="rowwise"),
)
wants = [jax.tree.map(np.asarray, function(x, w)) for function in functions]
with jax.set_mesh(mesh):
    for function, want in zip(functions, wants):
        ref.assert_same_trees(jax.jit(function)(x, w), want)
        ref.assert_same_trees(function(x, w), want)
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


def test_partly_manual_regions():
    """Manual over one axis: the values are right, and scales are of the part at hand."""
    check(
        """
x = rng.standard_normal((16, 256)).astype(np.float32)
w = rng.standard_normal((256, 64)).astype(np.float32)

def multiply(x, w):
    return jax_fp8.dot_general(x, w, (((1,), (0,)), ((), ())), recipe="rowwise")

want = np.asarray(multiply(x, w))
for check_vma in (True, False):
    divided = jax.shard_map(
        multiply, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"},
        check_vma=check_vma,
    )
    with jax.set_mesh(mesh):
        got = jax.jit(divided)(put(x, mesh, "a"), put(w, mesh, None, "b"))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
""",
        "Auto",
    )


def test_naive_loops_over_entries():
    check(
        """
x = scaled(ref.random_codes(rng, (4, 8, 64), ref.E4M3), np.float32(0.1), "tensor")
x = scaled(x.data, np.full((4, 1, 1), 0.1, np.float32), "tensor")
w = operand(rng, (16, 64), granularity="row")
bias = rng.standard_normal((4, 16)).astype(np.float32)

def multiply(x, bias):
    return jax_fp8.scaled_matmul(x, w, bias=bias, implementation="naive")

want = np.asarray(jax.vmap(multiply)(x, bias))
with jax.set_mesh(mesh):
    w = jax.tree.map(lambda leaf: put(leaf, mesh), w)
    placed = jax.tree.map(lambda leaf: put(leaf, mesh, "a"), (x, bias))
    ref.assert_same_bits(jax.jit(jax.vmap(multiply))(*placed), want)
""",
        "Explicit",
    )
