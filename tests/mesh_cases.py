"""Meshes of eight devices that the CPU pretends, and what a program moves between its devices.

A script on a mesh runs in a process of its own, which has the names of PREAMBLE.
"""

import inspect
import math
import pathlib
import re

import jax
import pytest
from cases import run_script, with_flags

EIGHT = {
    "XLA_FLAGS": with_flags("--xla_force_host_platform_device_count=8"),
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # They take longer than they save here.
}

PREAMBLE = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax_fp8
import references as ref
from cases import operand, scaled
from mesh_cases import compiled, counted, moved

assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
AMAX = "all-reduce s32"

def put(x, mesh, *axes):
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))

def message_of(function, *operands):
    try:
        function(*operands)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"

"""

#: For what runs inside of shard_map: code in the middle of a script, after one device's results.
MESH = """
mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.{axis_type},))
jax.set_mesh(mesh)

def sharded(function, in_specs, out_specs):
    return jax.jit(jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True
    ))
"""

#: Both with the oldest jax. With the newest the explicit ones, which are what it makes by itself;
#: test_partition.py has auto ones.
KINDS = pytest.mark.parametrize("kind", [pytest.param("Auto", marks=pytest.mark.slow), "Explicit"])


def run(script):
    here = str(pathlib.Path(__file__).parent)
    code = f"import sys; sys.path.append({here!r})\n" + PREAMBLE + inspect.cleandoc(script)
    return run_script(code, **EIGHT)


def check(script, kind):
    """Runs it with a ``mesh`` of that kind, whose axis ``a`` has two devices and ``b`` four."""
    mesh = f"""
kind = AxisType.{kind}
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
"""
    run(mesh + script)


# --- What moves -----------------------------------------------------------------------------------

_INSTRUCTION = re.compile(
    r" = (\(.*?\)|\S+) ((?:ragged-)?all-[\w-]+?|reduce-scatter|collective-[\w-]+?)(-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def compiled(function, *operands):
    """The program, to be called and to be read."""
    return jax.jit(function).lower(*operands).compile()


def moved(program):
    """The elements of all arrays that collectives make, ascending, by name and dtype.

    XLA may merge several collectives into one: what is counted are the arrays, of a device each.
    """
    found = {}
    for line in program.as_text().splitlines():
        match = _INSTRUCTION.search(line)
        if not match or match.group(2).endswith("-done"):
            continue
        arrays = _ARRAY.findall(match.group(1))
        # Of the pair that a start gives, operands and results, the last half are the results; but
        # that of a sum gives the results alone.
        if match.group(3) and match.group(2) != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]
        for dtype, sizes in arrays:
            # A CPU gathers FP8 as float16.
            key = f"{match.group(2)} {'fp8' if dtype == 'f16' else dtype}"
            size = math.prod(int(size) for size in sizes.split(",") if size)
            found.setdefault(key, []).append(size)
    return {key: sorted(sizes) for key, sizes in found.items()}


def counted(function, *operands):
    """How many arrays collectives make, by name and dtype."""
    program = compiled(function, *operands)
    return {key: len(sizes) for key, sizes in moved(program).items()}
