"""The handlers inside of captured graphs, which XLA makes by default, and outside of them.

Each program runs in a process of its own, for the flags of XLA are read once.
"""

import json
import pathlib

import pytest
from cases import run_script

pytestmark = pytest.mark.gpu

HERE = str(pathlib.Path(__file__).parent)
RUNS = 20

# Each step has sizes of its own, so that its handlers have entries of their own in the journal.
CHAIN = """
import sys; sys.path.append({here!r})
import hashlib, json, time
import jax, jax.numpy as jnp, numpy as np
import jax_fp8
from cases import codes

rng = np.random.default_rng(0)
BF16_BIAS, F32_BIAS = dict(bias=jnp.bfloat16), dict(bias=jnp.float32, activation="gelu")
FP8 = dict(preferred_element_type=jnp.float8_e4m3fn, output_scale=0.5, return_amax=True)
STEPS = [
    ("tensor", {{}}),
    ("row", BF16_BIAS),
    ("tensor", F32_BIAS),
    ("tensor", FP8),
    ("row", FP8),
    ("row", dict(implementation="decode")),
    ((1, 128), {{}}),
    ("tensor", dict(implementation="naive", **FP8)),
]
sizes = [64 + 16 * i for i in range(len(STEPS) + 1)]
up, down = codes(rng, (192, 32), granularity="row"), codes(rng, (40, 96), granularity="row")
weights = [
    codes(rng, (n, k), granularity="tensor" if g == "tensor" else "row")
    for k, n, (g, _) in zip(sizes, sizes[1:], STEPS)
]
x = jnp.asarray(rng.standard_normal((33, sizes[0])), jnp.bfloat16)

@jax.jit
def chain(x, weights):
    amaxes = []
    for w, (granularity, options) in zip(weights, STEPS):
        options = dict(options)
        if "bias" in options:
            options["bias"] = jnp.ones(w.shape[0], options["bias"])
        y = jax_fp8.matmul(
            x, w, granularity=granularity, **{{"preferred_element_type": jnp.bfloat16, **options}}
        )
        if options.get("return_amax"):
            y, amax = jax_fp8.dequantize(y[0], jnp.bfloat16), y[1]
            amaxes.append(amax)
        x = y / (1 + jnp.abs(y).max())
    fused = jax_fp8.rms_norm_quantize(x, jnp.ones(x.shape[1], x.dtype), granularity="row")
    links = [jax_fp8.ChainLink(up, activation="swiglu"), jax_fp8.ChainLink(down)]
    chained = jax_fp8.fused_chain(x[:3, :32], links, recipe="weight_only")
    return x, amaxes, fused.data.view(jnp.uint8), chained

digests = set()
for _ in range({runs}):
    leaves = jax.tree.leaves(chain(x, weights))
    digests.add(hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest())
    assert all(np.isfinite(np.asarray(leaf).astype(np.float32)).all() for leaf in leaves)
    del leaves
    time.sleep(0.01)  # A copy to the host may let go of its buffer late, and the next move.
plans = [p for p in jax_fp8.plans() if p["when"] == "run"]
print(json.dumps(dict(
    digests=sorted(digests),
    counts=[p["count"] for p in plans],
    implementations=sorted(p["implementation"] for p in plans),
)))
"""


def run_chain(flags):
    printed = run_script(CHAIN.format(here=HERE, runs=RUNS), XLA_FLAGS=flags)
    return json.loads(printed.splitlines()[-1])


def test_captured_or_not_the_bits_are_the_same_and_the_handlers_are_entered_less_often():
    captured = run_chain("")
    separate = run_chain("--xla_gpu_enable_command_buffer=")
    assert len(captured["digests"]) == 1
    assert captured["digests"] == separate["digests"]
    implementations = ["cublaslt"] * 6 + ["decode"] + ["gemv"] * 2 + ["kernel"] * 9 + ["naive"]
    assert captured["implementations"] == separate["implementations"] == implementations
    assert separate["counts"] == [RUNS] * 19
    assert max(captured["counts"]) <= RUNS // 4  # The first runs warm up and record.


SLICES = """
import sys; sys.path.append({here!r})
import jax, jax.numpy as jnp, numpy as np
import jax_fp8
import references as ref
from cases import codes, scaled

rng = np.random.default_rng(0)
stacked = codes(rng, (3, 47, 37), granularity="row")
aligned = codes(rng, (3, 48, 80), granularity="row")
for implementation in ("cublaslt", "decode", "naive", None):
    for w in (stacked, aligned):
        x = codes(rng, (4, w.shape[-1]))

        def multiply(x, w):
            return jax_fp8.scaled_matmul(x, w, implementation=implementation)

        parts = [jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf[i])), w) for i in range(3)]
        want = np.stack([np.asarray(multiply(x, part)) for part in parts])
        unrolled = jax.jit(lambda x, w: jnp.stack(
            [multiply(x, jax.tree.map(lambda leaf: leaf[i], w)) for i in range(3)]
        ))
        scanned = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (x, multiply(x, w)), x, w)[1])
        ref.assert_same_bits(unrolled(x, w), want)
        ref.assert_same_bits(scanned(x, w), want)
print("done")
"""


def test_slices_that_xla_hands_over_without_a_copy():
    flag = "--xla_gpu_enable_dynamic_slice_fusion=true"
    try:
        printed = run_script(SLICES.format(here=HERE), XLA_FLAGS=flag)
    except AssertionError as error:
        if "Unknown flag" in str(error):
            pytest.skip("this XLA has no such flag")
        raise
    assert printed.splitlines()[-1] == "done"
