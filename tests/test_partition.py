"""Meshes, on eight devices that the CPU pretends: each script runs in a process of its own."""

import pytest
from mesh_cases import MESH, run

pytestmark = pytest.mark.ends


@pytest.mark.parametrize("named", [("None", "None"), ("'kernel'", "'naive'")], ids=["xla", "naive"])
def test_an_auto_mesh_gives_right_values(named):
    """Sharded along M, N and K: XLA brings the parts of the operands together."""
    run(
        f"""
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        x = rng.integers(-3, 4, (16, 64)).astype(np.float32)
        w = operand(rng, (24, 64), granularity="row")
        w = scaled(rng.integers(-3, 4, (24, 64)).astype(ref.E4M3), 2.0 ** rng.integers(
            -2, 3, (24, 1)).astype(np.float32), "row")

        def multiply(x, data, scale):
            xq = jax_fp8.quantize(
                x, granularity="row", scale=jnp.ones((16, 1)), implementation={named[0]}
            )
            return jax_fp8.scaled_matmul(
                xq, scaled(data, scale, "row"), implementation={named[1]},
                preferred_element_type=jnp.float32,
            )

        want = np.asarray(multiply(x, w.data, w.scale))
        expected, _ = ref.product(scaled(x, np.ones((16, 1), np.float32), "row"), w)
        np.testing.assert_array_equal(want, expected)
        for x_axes, w_axes in ((("a",), ()), ((), ("a",)), (("a",), ("b",)), ((None, "a"),) * 2):
            scale_axes = w_axes[:1]
            operands = (
                put(x, mesh, *x_axes), put(w.data, mesh, *w_axes), put(w.scale, mesh, *scale_axes)
            )
            got = jax.jit(multiply)(*operands)
            np.testing.assert_array_equal(got, want)
            eager = multiply(*operands)
            np.testing.assert_array_equal(eager, want)
        """
    )


@pytest.mark.parametrize("named", [("None", "None"), ("'kernel'", "'naive'")], ids=["xla", "naive"])
def test_a_replicated_operand_of_an_explicit_mesh_is_taken(named):
    run(
        f"""
        x, w = rng.standard_normal((16, 64)).astype(np.float32), operand(rng, (24, 64))

        def multiply(x, w):
            xq = jax_fp8.quantize(x, scale=0.01, implementation={named[0]})
            y = jax_fp8.scaled_matmul(xq, w, implementation={named[1]})
            return jax_fp8.quantize(y, granularity="row", implementation={named[0]})

        want = jax.tree.map(np.asarray, multiply(x, w))
        mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
        jax.set_mesh(mesh)
        operands = put(x, mesh), jax.tree.map(lambda leaf: put(leaf, mesh), w)
        ref.assert_same_trees(multiply(*operands), want)
        ref.assert_same_trees(jax.jit(multiply)(*operands), want)
        """
    )


# Operands on one device, then on the mesh; what a test expects is computed in between.
OPERANDS = """
x = operand(rng, (6, 64), granularity="row")
w = operand(rng, (32, 64), granularity="row")
fp8 = dict(preferred_element_type=jnp.float8_e4m3fn, output_scale=0.5, return_amax=True)
"""


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@pytest.mark.parametrize("implementation", ["naive", "xla", None])
def test_a_weight_that_is_sharded_inside_of_shard_map(axis_type, implementation):
    printed = run(
        OPERANDS
        + f"""
def multiply(x, w, **options):
    return jax_fp8.scaled_matmul(x, w, implementation={implementation!r}, **options)

parts = [scaled(w.data[i:i + 4], w.scale[i:i + 4], "row") for i in range(0, 32, 4)]
want = np.concatenate([np.asarray(multiply(x, part)) for part in parts], axis=1)
want_amax = np.stack([np.asarray(multiply(x, part, **fp8)[1]) for part in parts])
"""
        + MESH.format(axis_type=axis_type)
        + """
x = jax.tree.map(lambda leaf: put(leaf, mesh), x)
w = jax.tree.map(lambda leaf: put(leaf, mesh, "a"), w)
specs = (P(), P("a"))
ref.assert_same_bits(sharded(multiply, specs, P(None, "a"))(x, w), want)

def data_and_amax(x, w):
    y, amax = multiply(x, w, **fp8)
    return y.data, amax[None]

data, amax = sharded(data_and_amax, specs, (P(None, "a"), P("a")))(x, w)
assert data.shape == (6, 32)
ref.assert_same_bits(amax, want_amax)

# What differs from device to device may not be returned as if it were the same.
print(message_of(sharded(multiply, specs, P()), x, w))
print(message_of(sharded(lambda *xw: data_and_amax(*xw)[0], specs, P()), x, w))
print(message_of(sharded(lambda *xw: data_and_amax(*xw)[1], specs, P()), x, w))
"""
    )
    errors = [line for line in printed.splitlines() if "Error" in line or line == "no error"]
    assert len(errors) == 3
    for line in errors:
        assert line.startswith("ValueError") and "out_specs" in line, line


@pytest.mark.parametrize("implementation", ["kernel", "xla", None])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_quantize_inside_of_shard_map(implementation, static):
    printed = run(
        f"""
wide = rng.standard_normal((16, 64)).astype(np.float32)
scales = np.exp(rng.standard_normal((8, 1))).astype(np.float32)

def quantize(x, scale):
    return jax_fp8.quantize(
        x, scale=scale if {static} else None, implementation={implementation!r}
    )

"""
        + MESH.format(axis_type="Explicit")
        + f"""
got = sharded(quantize, (P("a"), P("a")), P("a"))(put(wide, mesh, "a"), put(scales, mesh, "a"))
assert got.scale.shape == (8, 1)
for i in range(8):
    data, scale = ref.quantize(
        wide[2 * i:2 * i + 2], ref.E4M3, "tensor", scales[i] if {static} else None
    )
    ref.assert_same_bits(np.asarray(got.data)[2 * i:2 * i + 2], data)
    ref.assert_same_bits(np.asarray(got.scale)[i:i + 1], scale)
replicated = sharded(lambda x, scale: quantize(x, scale).data, (P(), P("a")), P())
print(message_of(replicated, put(wide, mesh), put(scales, mesh, "a")))
"""
    )
    # Dynamic scales of the same x are the same; given ones that differ make the data differ.
    if static:
        assert printed.startswith("ValueError") and "out_specs" in printed
    else:
        assert printed.strip() == "no error"


def test_gradients_of_what_devices_share():
    """In shard_map: a bias, an x that is multiplied by parts of w, and a probe."""
    run(
        """
        mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
        x = rng.standard_normal((8 * 16, 32)).astype(np.float32)
        w = jax_fp8.quantize(rng.standard_normal((8 * 4, 32)).astype(np.float32), granularity="row")
        bias = rng.standard_normal(8 * 4).astype(np.float32)

        def check(loss, parts, shared, divided):
            # The gradient of what is shared, which is a sum over the devices.
            def local(shared, divided):
                return jax.lax.psum(loss(shared, divided), "d")

            sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
            got = jax.jit(jax.grad(sharded))(shared, divided)
            each = [jax.grad(loss)(shared, part) for part in parts]
            total = jax.tree.map(lambda *leaves: sum(leaves), *each)
            for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(total), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)

        xs = np.split(x, 8)
        check(lambda b, x: jnp.sum(jax_fp8.matmul(x, w, bias=b) ** 2), xs, bias, x)

        def of_codes(b, x):
            q = jax_fp8.quantize(jax.lax.stop_gradient(x), granularity="row")
            return jnp.sum(jax_fp8.scaled_matmul(q, w, bias=b, preferred_element_type="f4") ** 2)

        check(of_codes, xs, bias, x)
        ws = [jax.tree.map(lambda leaf: leaf[4 * i : 4 * i + 4], w) for i in range(8)]
        check(lambda x, w: jnp.sum(jax_fp8.matmul(x, w) ** 2), ws, x, w)
        kernel = rng.standard_normal((32, 24)).astype(np.float32)

        def counted(probe, x):
            dims = (((1,), (0,)), ((), ()))
            return jnp.sum(jax_fp8.dot_general(x, kernel, dims, recipe="rowwise", probe=probe))

        check(counted, xs, jax_fp8.health_probe(), x)
        """
    )


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_gradients_in_shard_map(recipe):
    """Data parallel: each device's product has scales of its own, and dw is a sum over devices."""
    run(
        f"""
        mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
        dims = (((1,), (0,)), ((), ()))
        x = rng.integers(-3, 4, (8 * 16, 32)).astype(np.float32)
        w = rng.standard_normal((32, 24)).astype(np.float32)

        def loss(x, w):
            return jnp.sum(jax_fp8.dot_general(x, w, dims, recipe={recipe!r}) ** 2)

        def local(x, w):
            return jax.lax.psum(loss(x, w), "d")

        sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P()), out_specs=P())
        dx, dw = jax.jit(jax.grad(sharded, (0, 1)))(x, w)
        parts = [jax.grad(loss, (0, 1))(part, w) for part in np.split(x, 8)]
        ref.assert_same_bits(dx, np.concatenate([part[0] for part in parts]))
        np.testing.assert_allclose(dw, sum(part[1] for part in parts), rtol=1e-5, atol=1e-5)
        """
    )
