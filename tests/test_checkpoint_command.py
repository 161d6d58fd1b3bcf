import sys
import types

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("safetensors")

from checkpoint_write_cases import AMAX, read, tensors, write_source

from jax_fp8.__main__ import main


@pytest.fixture
def source(tmp_path, rng):
    return write_source(tmp_path / "src", tensors(rng))


pytestmark = pytest.mark.filterwarnings("ignore:quantize.*transformers")


def command_line(*arguments):
    return main(["quantize", *map(str, arguments)])


@pytest.fixture
def calibration(monkeypatch):
    """What a calibration was asked for."""
    asked = []

    def calibrate(folder, text, *, progress):
        asked.append((folder, text))
        return AMAX

    decoder = types.ModuleType("jax_fp8.decoder")
    decoder.calibrate = calibrate
    monkeypatch.setitem(sys.modules, "jax_fp8.decoder", decoder)
    return asked


def test_the_command(source, tmp_path, capsys):
    pytest.importorskip("tqdm")
    how = ("--format", "compressed-tensors", "--recipe", "rowwise", "--ignore", "*.q_proj")
    assert command_line(source, tmp_path / "dst", *how) == 0
    assert read(tmp_path / "dst")["model.layers.0.q_proj.weight"].dtype == ml_dtypes.bfloat16
    printed = capsys.readouterr()
    assert "1 FP8 layers, 0.3 MB -> 0.2 MB" in printed.out
    assert "100%" in printed.err


def test_the_command_calibrates(source, tmp_path, calibration):
    pytest.importorskip("tqdm")
    (tmp_path / "text.txt").write_text("Größe", encoding="utf-8")
    how = ("--format", "fp8", "--recipe", "static", "--calibrate", tmp_path / "text.txt")
    assert command_line(source, tmp_path / "dst", *how) == 0
    assert calibration == [(source, "Größe")]
    found = read(tmp_path / "dst")["model.layers.0.q_proj.input_scale"]
    np.testing.assert_array_equal(found, np.float32(4.48) / np.float32(448))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--recipe", "static"), "jax-fp8 quantize: --calibrate goes with --recipe static"),
        (("--recipe", "blockwise", "--calibrate", "text"), "and with no other"),
        (("--recipe", "rowwise"), "cannot express the recipe 'rowwise'"),
        (("--recipe", "static", "--calibrate", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_the_command_says_what_is_wrong(source, tmp_path, calibration, capsys, options, message):
    assert command_line(source, tmp_path / "dst", "--format", "fp8", *options) == 1
    assert message in capsys.readouterr().err
    assert calibration == [] and not (tmp_path / "dst").exists()
