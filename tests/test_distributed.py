"""Two processes of four devices each over `jax.distributed`: the values of one device."""

import inspect
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from cases import with_flags

PROGRAM = """
import sys
sys.path.append({here!r})
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:{port}", 2, {index})
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax_fp8

assert jax.process_count() == 2 and len(jax.devices()) == 8
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)  # The same in both processes, which put their parts of it.
x = rng.standard_normal((16, 256)).astype(np.float32)
w = rng.standard_normal((256, 128)).astype(np.float32)

def loss(x, w):
    y = jax_fp8.dot_general(x, w, (((1,), (0,)), ((), ())), recipe={recipe!r})
    return (y**2).mean()

def put(value, spec):
    where = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

step = jax.jit(jax.value_and_grad(loss, (0, 1)))
value, (dx, dw) = step(put(x, P("data")), put(w, P({w_axes})))
with jax.default_device(jax.local_devices()[0]):
    want, (want_dx, want_dw) = step(x, w)
np.testing.assert_allclose(float(value), float(want), rtol=1e-6)
for got, expected in ((dx, want_dx), (dw, want_dw)):
    expected = np.asarray(expected)
    for part in got.addressable_shards:
        np.testing.assert_allclose(
            part.data, expected[part.index], rtol=0, atol=2e-6 * np.abs(expected).max()
        )
print("the same", float(value))
"""


def run_both(**changed):
    """The program in two processes, and what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = str(pathlib.Path(__file__).parent)
    environment = {
        **os.environ,
        "XLA_FLAGS": with_flags("--xla_force_host_platform_device_count=4"),
        "JAX_PLATFORMS": "cpu",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", script],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for script in (
            inspect.cleandoc(PROGRAM).format(here=here, port=port, index=index, **changed)
            for index in range(2)
        )
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, printed, strict=True):
        assert process.returncode == 0, text
    return [text.splitlines()[-1] for text in printed]


@pytest.mark.parametrize(
    "recipe, w_axes", [("rowwise", '"data", "model"'), ("tensorwise", 'None, "model"')]
)
def test_two_processes_are_one_program(recipe, w_axes):
    one, other = run_both(recipe=recipe, w_axes=w_axes)
    assert one == other and one.startswith("the same")
