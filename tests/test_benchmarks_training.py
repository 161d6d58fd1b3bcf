"""The benchmark of a dense layer in training: its layers, its parts, its table and its targets."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import dense_layers, targets, training

pytestmark = pytest.mark.slow

M, N, K = 32, 48, 64


@pytest.mark.parametrize("name", dense_layers.LAYERS)
def test_a_layer_gives_the_value_and_both_gradients(name):
    layer = dense_layers.LAYERS[name]
    x, w, dy = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate(((M, K), (K, N), (M, N)))
    )
    *found, state = jax.jit(layer.step)(layer.start(x, w), x, dy, w)
    wide = [np.asarray(operand, np.float32) for operand in (x, w, dy)]
    expected = wide[0] @ wide[1], wide[2] @ wide[1].T, wide[0].T @ wide[2]
    # E5M2 has 2 bits of mantissa, E4M3 has 3: half an ulp is at most 2^-3 and 2^-4 of a value.
    for result, reference in zip(found, expected, strict=True):
        assert result.dtype == jnp.bfloat16 and result.shape == reference.shape
        off = np.asarray(result, np.float32) - reference
        error = np.sqrt(np.mean(off**2) / np.mean(reference**2))
        assert error < 2**-7 if name == "bf16" else error < 2**-3
    before = layer.start(x, w)
    same = jax.tree.map(np.array_equal, state, before)
    assert (not all(jax.tree.leaves(same))) == (name == "delayed" or name.startswith("flax"))


@pytest.mark.parametrize("name", dense_layers.LAYERS)
def test_what_is_kept_for_the_gradients(name):
    problem = m, n, k = 256, 384, 512
    activations, weights = dense_layers.kept_bytes(dense_layers.LAYERS[name], problem)
    wide = dense_layers.kept_bytes(dense_layers.LAYERS["bf16"], problem)
    assert wide == (2 * m * k, 2 * k * n)
    if name in dense_layers.NARROW:
        assert activations <= 0.6 * wide[0] and weights == k * n
    if name == "wide_wgrad":  # Its activation stays as it is.
        assert wide[0] <= activations < 1.1 * wide[0] and weights == k * n


@pytest.mark.parametrize(
    "part, variant, shape",
    [("forward", "tensor", (M, N)), ("dgrad", "row", (M, K)), ("wgrad", "block", (K, N))],
)
def test_a_product_alone_is_one_of_the_layers(part, variant, shape):
    problem = (M, N, K)

    @jax.jit
    def products():
        return [
            training._product(name, part)(*training._operands(name, part, problem, 1))
            for name in ("bf16", variant)
        ]

    wide, found = products()
    assert found.shape == wide.shape == shape and found.dtype == jnp.bfloat16
    assert 0 < float(training._off(found, wide)) < 2**-3


@pytest.mark.parametrize("operand", training.CASTS.values())
def test_a_quantization_alone_is_of_both_layouts(operand):
    x = jnp.ones(training._shape((M, N, K), operand), jnp.bfloat16)
    for variant in training.GRANULARITIES:
        straight, transposed, *amax = jax.eval_shape(
            lambda x, variant=variant: training._both(x, operand, variant, (True, True)), x
        )
        assert straight.shape == x.shape and transposed.shape == x.shape[::-1]
        assert straight.data.dtype == (jnp.float8_e5m2 if operand == "dy" else jnp.float8_e4m3fn)
        assert bool(amax) == (variant == "delayed" and operand != "dy")


def test_smoke_leaves_out_what_takes_long_to_compile():
    few, all_ = training._parts("smoke"), training._parts("all")
    assert set(few) < set(all_) and len(all_) == 24
    assert "bf16" in training._layers("smoke")
    assert training._layers("all") == list(dense_layers.LAYERS)


# --- The table and the targets --------------------------------------------------------------------

BIG, SMALL = targets._STEP_SPEEDUPS
#: Microseconds at BIG; a quarter of them at SMALL.
TIMES = {
    "bf16": 4400.0,
    "tensorwise": 2400.0,
    "rowwise": 2450.0,
    "delayed": 2300.0,
    "blockwise": 2600.0,
    "flax_direct": 2700.0,
}


def made_up(**changed):
    """Results that meet every target, but for the times of the variants given."""
    rows = []
    for problem, factor in ((BIG, 1), (SMALL, 4)):
        size = dict(zip("mnk", problem, strict=True))
        for name, us in {**TIMES, **changed}.items():
            row = {"part": training.STEP, **size, "variant": name}
            row["us"] = us and us / factor
            if name != "bf16":
                row |= {"fp8": True, "multiplied": ["f8 by jax_fp8"]}
            if problem == BIG:
                share = 2 if name == "bf16" else 1
                row |= {"activation_bytes": share * 33e6, "weight_bytes": share * 58e6}
            rows.append(row)
        for part in ("forward", "dgrad", "wgrad", "cast x", "cast w", "cast dy"):
            for variant in ("bf16", "tensor", "row"):
                if variant != "bf16" or not part.startswith("cast"):
                    rows.append({"part": part, **size, "variant": variant, "us": 100.0})
    return rows


def missed(rows):
    verdicts = targets.check({"name": "training", "rows": rows}, training.KEYS)
    assert len(verdicts) == 2 * (3 + 4) + len(dense_layers.NARROW)
    return [str(verdict) for verdict in verdicts if not verdict.passed]


@pytest.mark.parametrize(
    "changed, count",
    [
        ({}, 0),
        ({"tensorwise": 2520.0}, 1),
        ({"rowwise": 3200.0}, 4),
        ({"delayed": 2450.0}, 1),
        ({"blockwise": 2750.0}, 2),
        ({"flax_direct": 2350.0}, 6),
        ({"flax_direct": None}, 8),
        ({"bf16": None}, 6),
    ],
)
def test_targets(changed, count):
    assert len(missed(made_up(**changed))) == count


def test_target_of_what_is_kept():
    rows = made_up()
    for row in rows:
        if row["variant"] == "rowwise" and "activation_bytes" in row:
            row["activation_bytes"] *= 1.3
    (said,) = missed(rows)
    assert "rowwise: what is kept of x over bf16's: 0.650 (at most 0.6)" in said


def test_table_sums_the_parts_and_marks_what_ran_wide():
    rows = made_up(blockwise=None)
    for row in rows:
        if row["variant"] == "flax_direct":
            row |= {"fp8": False, "multiplied": ["f8 by cublasLt", "bf16 by Triton"]}
    rows.append({**rows[0], "variant": "wide_wgrad", "us": None, "error": "RuntimeError: no"})
    text = training.table(rows)
    table = text.split("\n\n")[1]
    lines = {line.split("|")[1].strip(): line for line in table.splitlines()}
    assert "2400 (1.83x)" in lines["jax_fp8 tensorwise"] and "yes" in lines["jax_fp8 tensorwise"]
    assert "33.0 (0.50)" in lines["jax_fp8 tensorwise"]
    assert "partly" in lines["flax Fp8DirectDotGeneralOp"]
    assert "2700 (1.63x) *" in text and "wide_wgrad at step x 8192" in text
    sums = [line.split("|")[3:] for line in text.splitlines() if "| " in line and " sum |" in line]
    # No quantization was timed with known scales, and nothing with blocks.
    assert [cell.strip() for cell in sums[0]][:5] == ["300", "600", "-", "600", "-"]
