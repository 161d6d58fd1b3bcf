"""What runs for all entries of jax.vmap, what cannot, and vmap inside of shard_map."""

import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import integers, operand, run_script
from mesh_cases import EIGHT

import jax_fp8

SIZE = 3
weights = pytest.mark.parametrize("shared", [True, False], ids=["one w", "w each"])


def exact_operands(rng, m, shared):
    x = integers(rng, (SIZE, m, 48), granularity="row")
    return x, integers(rng, (8, 48) if shared else (SIZE, 8, 48), granularity="row")


@weights
def test_all_entries_are_one_product(handlers, rng, shared):
    x, w = exact_operands(rng, 5, shared)
    jax_fp8.clear_plans()
    multiply = functools.partial(jax_fp8.scaled_matmul, implementation="naive")
    jax.block_until_ready(jax.vmap(multiply, (0, None if shared else 0))(x, w))
    (plan,) = jax_fp8.plans()
    assert plan["shape"] == ([1, 15, 8, 48] if shared else [3, 5, 8, 48])
    assert plan["count"] == 1


def test_rows_beyond_those_of_small_m_are_refused(rng):
    multiply = functools.partial(jax_fp8.scaled_matmul, implementation="small_m")
    x, w = operand(rng, (5, 16, 48), granularity="row"), operand(rng, (8, 48), granularity="row")
    message = r"scaled_matmul: .*'small_m' .* 5 entries .* M = 16: .* M <= 64, not 80"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(jax.vmap(multiply, (0, None)), x, w)
    each = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), w)
    assert jax.eval_shape(jax.vmap(multiply), x, each).shape == (5, 16, 8)


@pytest.mark.gpu
@weights
def test_small_m(rng, shared):
    x, w = exact_operands(rng, 20, shared)
    multiply = functools.partial(jax_fp8.scaled_matmul, implementation="small_m")
    got = jax.vmap(multiply, (0, None if shared else 0))(x, w)
    for i in range(SIZE):
        x_i, w_i = (jax.tree.map(lambda leaf, i=i: leaf[i], operand) for operand in (x, w))
        want = multiply(x_i, w if shared else w_i)
        np.testing.assert_array_equal(got[i].astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("implementation, axis_type", [("naive", "Explicit"), (None, "Auto")])
def test_inside_of_shard_map(implementation, axis_type):
    """Weights that differ from device to device, with activations that do not, and the reverse."""
    here = str(pathlib.Path(__file__).parent)
    script = f"""
    import sys; sys.path.append({here!r})
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import jax_fp8
    from cases import integers

    assert len(jax.devices()) == 8
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.{axis_type},))
    x, w = integers(rng, (16, 3, 48), granularity="row"), integers(rng, (16, 8, 48))
    w = jax_fp8.ScaledArray(w.data, jnp.broadcast_to(w.scale, (16, 1, 1)))
    bias = jnp.asarray(rng.integers(-9, 10, (16, 8)), jnp.float32)
    one_x, one_w = (jax.tree.map(lambda leaf: leaf[0], operand) for operand in (x, w))

    def multiply(x, w, bias, scale):
        return jax_fp8.scaled_matmul(
            x, w, bias=bias, implementation={implementation!r}, output_scale=scale,
            preferred_element_type=jnp.float8_e4m3fn, return_amax=True,
        )

    for x_, x_axis in ((x, 0), (one_x, None)):
        for w_, w_axis in ((w, 0), (one_w, None)):
            axes = (x_axis, w_axis, 0, None)
            function = jax.vmap(multiply, axes)
            operands = (x_, w_, bias, jnp.float32(4))
            want = jax.jit(function)(*operands)
            specs = tuple(P() if axis is None else P("a") for axis in axes)
            sharded = [
                jax.device_put(operand, NamedSharding(mesh, spec))
                for operand, spec in zip(operands, specs, strict=True)
            ]
            got = jax.jit(jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=P("a"), check_vma=True
            ))(*sharded)
            for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(
                    np.asarray(one, np.float32), np.asarray(other, np.float32)
                )
    """
    run_script(inspect.cleandoc(script), **EIGHT)
