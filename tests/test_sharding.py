"""Operations divided over meshes: the values of one device, and no collective but those stated.

Each script runs on eight devices that the CPU pretends. ``a`` has two devices, ``b`` four.
"""

import pytest
from mesh_cases import KINDS, check, run

pytestmark = pytest.mark.ends

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
            assert counted(quantize, operand) == ({AMAX: count} if count else {}), spec
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
            assert counted(cast, operand) == ({AMAX: count} if count else {}), spec
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
                found = counted(multiply, *placed)
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
        assert counted(multiply, *placed) == stated
        got = jax.jit(multiply)(*placed)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
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
