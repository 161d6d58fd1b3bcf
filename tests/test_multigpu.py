"""Two GPUs of one host, from one process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import codes
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mesh_cases import moved

import jax_fp8


@pytest.mark.multigpu
def test_equal_gpus_agree(rng):
    """One compiled program for each, from one process, in turn and at once."""
    devices = jax.devices("cuda")[:2]
    if len({device.device_kind for device in devices}) > 1:
        pytest.skip("the GPUs differ")
    x, w = codes(rng, (300, 1024)), codes(rng, (512, 1024), granularity="row")

    @jax.jit
    def multiply(x, w):
        return jax_fp8.quantize(jax_fp8.scaled_matmul(x, w), granularity="row")

    for _ in range(3):
        results = [multiply(*jax.device_put((x, w), device)) for device in devices]
        for result, device in zip(results, devices, strict=True):
            assert result.data.devices() == {device}
        ref.assert_same_trees(*results)


# --- Meshes ---------------------------------------------------------------------------------------

DIMENSIONS = (((1,), (0,)), ((), ()))


def put(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((2,), ("a",), (request.param,), devices=jax.devices()[:2])


@pytest.mark.multigpu
@pytest.mark.parametrize("granularity", ["tensor", "row", (1, 128), (128, 128)])
@pytest.mark.parametrize("spec", [("a",), (None, "a")], ids=["rows", "columns"])
def test_quantize_over_gpus(mesh, rng, spec, granularity):
    """Bitwise one GPU's, whichever GPU has the largest value."""
    x = rng.standard_normal((512, 1024)).astype(np.float32)
    x[3, 900] = 77.0

    def quantize(x):
        return jax_fp8.quantize(x, granularity=granularity)

    want = jax.tree.map(np.asarray, jax.jit(quantize)(jax.device_put(x, jax.devices()[0])))
    with jax.set_mesh(mesh):
        operand = put(mesh, x, *spec)
        compiled = jax.jit(quantize).lower(operand).compile()
        ref.assert_same_trees(compiled(operand), want)
    assert all(key.startswith("all-reduce ") for key in moved(compiled)), moved(compiled)


@pytest.mark.multigpu
@pytest.mark.parametrize("granularity", ["tensor", "row", (1, 128), (128, 128)])
@pytest.mark.parametrize("spec", [("a",), (None, "a")], ids=["rows", "columns"])
@pytest.mark.parametrize("key", [None, 3], ids=["nearest", "stochastic"])
def test_cast_transpose_over_gpus(mesh, rng, spec, granularity, key):
    """Both layouts are bitwise one GPU's; of random bits each GPU has its own."""
    x = rng.standard_normal((1024, 1536)).astype(jnp.bfloat16)
    x[700, 1400] = 77.0
    key = None if key is None else jax.random.key(key)

    def cast(x):
        return jax_fp8.cast_transpose(x, granularity=granularity, key=key)

    want = jax.tree.map(np.asarray, jax.jit(cast)(jax.device_put(x, jax.devices()[0])))
    with jax.set_mesh(mesh):
        operand = put(mesh, x, *spec)
        compiled = jax.jit(cast).lower(operand).compile()
        got = compiled(operand)
    assert all(key.startswith("all-reduce ") for key in moved(compiled)), moved(compiled)
    if key is None:
        ref.assert_same_trees(got, want)
        return
    for ours, theirs in zip(got, want, strict=True):
        assert np.array_equal(ours.scale, theirs.scale)
        ours, theirs = (
            np.asarray(jax_fp8.dequantize(jax.tree.map(jnp.asarray, a), jnp.float32))
            for a in (jax.device_get(ours), theirs)
        )
        # Within a unit in the last place, of which E4M3's is at most an eighth of a value.
        assert (np.abs(ours - theirs) <= np.abs(theirs) / 7 + 1e-3).all()
        assert abs((ours - theirs).mean()) < 1e-3


@pytest.mark.multigpu
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
@pytest.mark.parametrize(
    "lies",
    [(("a",), ()), (("a",), ("a",)), ((), (None, "a")), ((None, "a"), ("a",))],
    ids=["data", "fsdp", "columns", "rows"],
)
def test_products_and_gradients_over_gpus(mesh, rng, lies, recipe):
    """Those of one GPU but for the order of sums, and no wide operand moves."""
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((512, 1024), (1024, 512)))
    x, w = x.astype(jnp.bfloat16), (w / 32).astype(jnp.bfloat16)

    dy = jnp.cos(jnp.arange(512 * 512, dtype=jnp.float32)).reshape(512, 512)

    def step(x, w):
        def loss(x, w):
            y = jax_fp8.dot_general(
                x, w, DIMENSIONS, recipe=recipe, preferred_element_type=jnp.float32
            )
            return (y * dy).sum(), y

        return jax.grad(loss, (0, 1), has_aux=True)(x, w)

    want = jax.jit(step)(*jax.device_put((x, w), jax.devices()[0]))
    with jax.set_mesh(mesh):
        operands = put(mesh, x, *lies[0]), put(mesh, w, *lies[1])
        compiled = jax.jit(step).lower(*operands).compile()
        got = compiled(*operands)
    for ours, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        ours, theirs = (np.asarray(a).astype(np.float32) for a in (ours, theirs))
        # Sums in another order, of fast accumulation as well, in results of 16 bits.
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 5e-3, error
    found = moved(compiled)
    # What is gathered are FP8 values and their scales.
    gathered = {key.split()[1] for key in found if key.startswith("all-gather ")}
    assert not gathered - {"f8e4m3fn", "f8e5m2", "u8", "f32"}, found
    assert {key.split()[0] for key in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    if lies == (("a",), ("a",)) and recipe != "blockwise":
        assert gathered & {"f8e4m3fn", "u8"}, found
