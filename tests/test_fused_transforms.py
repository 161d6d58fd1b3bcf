"""The fused producers inside of shard_map, on eight pretended devices, and of captured graphs."""

import json
import pathlib

import pytest
from cases import run_script
from mesh_cases import MESH, run

HERE = str(pathlib.Path(__file__).parent)

FUNCTIONS = """
def functions(implementation, granularity):
    options = dict(granularity=granularity, implementation=implementation)
    return [
        lambda x, w: jax_fp8.rms_norm_quantize(x, w, **options),
        lambda x, w: jax_fp8.rms_norm_quantize(x, w, residual=x, **options),
        lambda x, w: jax_fp8.layer_norm_quantize(x, w, w, **options),
        lambda x, w: jax_fp8.swiglu_quantize(x, **options),
        lambda x, w: jax_fp8.gelu_quantize(x, **options),
    ]

x = rng.standard_normal((16, 64)).astype(np.float32)
w = rng.standard_normal(64).astype(np.float32)
"""


@pytest.mark.parametrize("implementation", ["kernel", None])
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_inside_of_shard_map_each_device_has_its_own_rows(implementation, axis_type):
    printed = run(
        FUNCTIONS
        + f"""
all_of_them = functions({implementation!r}, "tensor")
wants = [
    [jax.tree.map(np.asarray, jax.jit(function)(x[i:i + 2], w)) for i in range(0, 16, 2)]
    for function in all_of_them
]
"""
        + MESH.format(axis_type=axis_type)
        + """
for function, want in zip(all_of_them, wants):
    got = sharded(function, (P("a"), P()), P("a"))(put(x, mesh, "a"), put(w, mesh))
    parts = zip(*(np.split(np.asarray(leaf), 8) for leaf in jax.tree.leaves(got)))
    for part, expected in zip(parts, want):
        ref.assert_same_trees(part, tuple(jax.tree.leaves(expected)))
    print(message_of(sharded(function, (P("a"), P()), P()), put(x, mesh, "a"), put(w, mesh)))
"""
    )
    lines = [line for line in printed.splitlines() if "Error" in line or line == "no error"]
    assert len(lines) == 5
    for line in lines:
        assert line.startswith("ValueError") and "out_specs" in line, line


CHAIN = """
import sys; sys.path.append({here!r})
import hashlib, json, time
import jax, jax.numpy as jnp, numpy as np
import jax_fp8

rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((33, 264)), jnp.bfloat16)
w = jnp.asarray(rng.standard_normal(264), jnp.bfloat16)

@jax.jit
def chain(x, w):
    results = []
    for granularity in ("tensor", "row", (1, 128)):
        options = dict(granularity=granularity, implementation="kernel")
        y, x = jax_fp8.rms_norm_quantize(x, w, residual=x, **options)
        results.append(y)
        results.append(jax_fp8.layer_norm_quantize(x, w, w, **options))
        results.append(jax_fp8.swiglu_quantize(x, **options))
        results.append(jax_fp8.gelu_quantize(x, **options))
        x = x + jax_fp8.dequantize(results[-1], jnp.bfloat16)
    return x, results

digests = set()
for _ in range({runs}):
    leaves = jax.tree.leaves(chain(x, w))
    digests.add(hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest())
    del leaves
    time.sleep(0.01)  # A copy to the host may let go of its buffer late, and the next move.
plans = [p for p in jax_fp8.plans() if p["when"] == "run"]
print(json.dumps(dict(digests=sorted(digests), counts=[p["count"] for p in plans])))
"""


@pytest.mark.gpu
def test_captured_or_not_the_bits_are_the_same():
    runs = 20
    captured, separate = (
        json.loads(run_script(CHAIN.format(here=HERE, runs=runs), XLA_FLAGS=flags).splitlines()[-1])
        for flags in ("", "--xla_gpu_enable_command_buffer=")
    )
    assert len(captured["digests"]) == 1 and captured["digests"] == separate["digests"]
    assert separate["counts"] == [runs] * 12
    assert max(captured["counts"]) <= runs // 4  # The first runs warm up and record.
