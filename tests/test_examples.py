"""The examples run, and show what they promise."""

import importlib.util
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from cases import run_script, with_flags

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's rows, its output and its picture, made on the CPU."""
    for needed in ("flax", "matplotlib", "optax", "sklearn", "tqdm"):
        pytest.importorskip(needed, reason="the extra 'demo' brings it")
    import contextlib
    import io

    picture = tmp_path_factory.mktemp("demo") / "digits.png"
    printed = io.StringIO()
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu), contextlib.redirect_stdout(printed):
        rows = load("digits").main(["--epochs", "20", "--out", str(picture)])
    return {row["name"]: row for row in rows}, printed.getvalue(), picture


def test_digits_learns(demo):
    rows, _, _ = demo
    assert list(rows) == ["float32", "tensorwise", "rowwise", "blockwise"]
    assert rows["float32"]["accuracy"] > 0.95


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_digits_in_fp8_is_as_accurate_as_in_float32(demo, recipe):
    rows, _, _ = demo
    reference, fp8 = rows["float32"], rows[recipe]
    assert abs(fp8["accuracy"] - reference["accuracy"]) <= 0.005
    # It did go through FP8: the logits differ, by what three bits of mantissa make of them.
    deviation = reference["logits"].std()
    assert 0.002 * deviation < fp8["rms"] < 0.1 * deviation
    # A quarter of float32, and the scales: at most a float32 for each of the 522 rows.
    assert reference["bytes"] / 4 < fp8["bytes"] <= reference["bytes"] / 4 + 522 * 4


def test_digits_trains_in_fp8(demo):
    _, printed, _ = demo
    (said,) = re.findall(r"trained in FP8, rowwise: accuracy ([\d.]+)%", printed)
    assert float(said) > 95


def test_digits_says_what_ran_and_where(demo):
    rows, printed, picture = demo
    assert {row["ran"] for row in rows.values()} == {"XLA", "xla on cpu"}
    assert "device: cpu" in printed and str(picture) in printed
    for name, row in rows.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(name)]
        assert f"{row['accuracy']:.2%}" in line


def test_digits_picture_shows_something(demo):
    _, _, picture = demo
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    from matplotlib.image import imread

    pixels = imread(picture)
    height, width = pixels.shape[:2]
    assert height >= 400 and width >= 800
    colors = np.unique((pixels[..., :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0)
    assert len(colors) > 50
    for half in (pixels[:, : width // 2], pixels[:, width // 2 :]):
        assert half[..., :3].std() > 0.1


# --- parallel.py ----------------------------------------------------------------------------------

PARALLEL = """
import json, sys
sys.path.insert(0, {folder!r})
import parallel
found = parallel.main({arguments!r}.split())
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--model 4 --fsdp", "--model 2 --fsdp --train"])
def test_parallel_gathers_weights_in_fp8(arguments):
    """The gathered weights take half of bf16's bytes; what is summed is the same."""
    printed = run_script(
        PARALLEL.format(folder=str(EXAMPLES), arguments=arguments),
        XLA_FLAGS=with_flags("--xla_force_host_platform_device_count=8"),
        JAX_PLATFORMS="cpu",
    )
    found = json.loads(printed.splitlines()[-1])
    bf16, fp8 = found["bf16"]["moved"], found["rowwise"]["moved"]
    assert 0 < found["rowwise"]["error"] < 0.15
    # A CPU gathers bf16 as float32 and FP8 as float16; of a row's scales there is one for hundreds.
    assert fp8["all-gather f16"] == bf16["all-gather f32"] / 2
    assert fp8["all-gather f32"] < 0.01 * bf16["all-gather f32"]
    assert fp8["all-reduce f32"] == pytest.approx(bf16["all-reduce f32"])
    assert not {key.split()[0] for key in fp8} - {"all-gather", "all-reduce"}
