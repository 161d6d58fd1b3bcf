"""What quantize refuses before it writes anything, and of what it warns."""

import json
import math
import warnings

import numpy as np
import pytest

pytest.importorskip("safetensors")

from checkpoint_write_cases import AMAX, SHARDS, tensors, write_source

from jax_fp8._src.checkpoint.write import quantize

pytestmark = pytest.mark.filterwarnings("ignore:quantize.*transformers")


@pytest.fixture
def source(tmp_path, rng):
    return write_source(tmp_path / "src", tensors(rng))


@pytest.mark.parametrize(
    "format, recipe, message",
    [
        ("fp8", "rowwise", "'fp8' cannot express the recipe 'rowwise'; compressed-tensors can"),
        ("fp8", "weight_only", "compressed-tensors can"),
        ("fp8", "delayed", "and no other format either"),
        ("compressed-tensors", "wide", "it expresses tensorwise, rowwise, blockwise"),
        ("gguf", "rowwise", "unknown format 'gguf'; accepted are fp8, compressed-tensors"),
    ],
)
def test_recipes_that_a_format_has_no_words_for(source, tmp_path, format, recipe, message):
    with pytest.raises(ValueError, match=message):
        quantize(source, tmp_path / "dst", format=format, recipe=recipe)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    "amax, message",
    [
        (None, "needs input_amax"),
        ({"model.layers.0.q_proj": 1.0}, "lacks model.layers.1.down_proj"),
        (AMAX | {"model.layers.0.q_proj": math.nan}, r"q_proj \(nan\)"),
        (AMAX | {"model.layers.0.q_proj": -1.0}, r"q_proj \(-1.0\)"),
    ],
)
def test_a_calibration_must_be_whole(source, tmp_path, amax, message):
    with pytest.raises(ValueError, match=message):
        quantize(source, tmp_path / "dst", format="fp8", recipe="static", input_amax=amax)
    assert not (tmp_path / "dst").exists()


def test_a_calibration_must_be_of_use(source, tmp_path):
    with pytest.raises(ValueError, match="'blockwise' has no use for input_amax"):
        quantize(source, tmp_path / "d", format="fp8", recipe="blockwise", input_amax=AMAX)


def refused(source, tmp_path, message, error=ValueError, **how):
    how = {"format": "compressed-tensors", "recipe": "rowwise"} | how
    with pytest.raises(error, match=message):
        quantize(source, tmp_path / "dst", **how)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_weights_must_be_finite(tmp_path, rng, value, recipe):
    first, second = tensors(rng)
    second["model.layers.1.down_proj.weight"][130, 257] = value
    source = write_source(tmp_path / "src", (first, second))
    with pytest.raises(ValueError, match="down_proj.weight.* holds a NaN or an infinity"):
        quantize(source, tmp_path / "dst", format="compressed-tensors", recipe=recipe)
    assert not (tmp_path / "dst" / SHARDS[1]).exists()
    assert not (tmp_path / "dst" / "config.json").exists()


def test_a_checkpoint_is_not_quantized_twice(source, tmp_path, rng):
    quantize(source, tmp_path / "once", format="fp8", recipe="blockwise")
    refused(tmp_path / "once", tmp_path, "quantized already: its config.json has a quantization")
    (tmp_path / "once" / "config.json").write_text("{}")
    refused(tmp_path / "once", tmp_path, "quantized already: tensor 'model.layers.0.q_proj.weight'")
    (source / "hf_quant_config.json").write_text("{}")
    refused(source, tmp_path, "quantized already: it has hf_quant_config.json")


@pytest.mark.parametrize("destination", ["src", "src/sub", "."])
def test_source_and_destination_lie_outside_of_each_other(source, tmp_path, destination):
    with pytest.raises(ValueError, match="must be folders outside of each other"):
        quantize(source, tmp_path / destination, format="fp8", recipe="blockwise")
    assert not (source / "sub").exists()


def test_patterns_that_match_nothing_are_mistakes(source, tmp_path):
    refused(source, tmp_path, "no linear layer matches \\*.dwon_proj", ignore=["*.dwon_proj"])
    refused(source, tmp_path, "no linear layer to quantize", ignore=["*"])
    refused(source, tmp_path, "must be a sequence of patterns", TypeError, ignore="*.q_proj")


def test_models_with_transposed_weights_are_refused(tmp_path, rng):
    source = write_source(tmp_path / "src", tensors(rng), {"model_type": "gpt2"})
    refused(source, tmp_path, r"'gpt2' are stored \(in, out\)")


def test_stacked_experts_are_refused_or_ignored(tmp_path, rng):
    first, second = tensors(rng)
    second["model.layers.1.mlp.experts.gate_up_proj"] = np.zeros((2, 8, 8), np.float32)
    source = write_source(tmp_path / "src", (first, second))
    refused(source, tmp_path, "stacks experts.*ignore 'model.layers.1.mlp.experts'")
    quantize(source, tmp_path / "d", format="fp8", recipe="blockwise", ignore=["*.experts"])
    config = json.loads((tmp_path / "d" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.experts" in config["ignored_layers"]


def test_other_dtypes_are_refused(tmp_path, rng):
    first, second = tensors(rng)
    second["model.layers.1.down_proj.weight"] = np.zeros((128, 128))
    source = write_source(tmp_path / "src", (first, second))
    refused(source, tmp_path, r"F64\[128, 128\].* must be F32, BF16, F16, or ignored")


def test_layouts_that_a_reader_mistakes_are_told(source, tmp_path):
    with pytest.warns(UserWarning, match="transformers drops the scales.*'tensorwise'"):
        quantize(source, tmp_path / "a", format="fp8", recipe="tensorwise")
    with pytest.warns(UserWarning, match="misreads or refuses.*: model.layers.0.q_proj.weight;"):
        quantize(source, tmp_path / "b", format="fp8", recipe="blockwise")


@pytest.mark.parametrize("followed", ["q_proj", "k_proj", "gate_proj"])
def test_blocks_that_vllm_refuses_are_told(tmp_path, rng, followed):
    """Partial ones of rows, where another weight follows: not the last one's, nor of columns."""
    shapes = {
        followed: (192, 128),
        "o_proj": (128, 192),
        "v_proj": (192, 128),
        "up_proj": (64, 128),
    }
    first, second = (
        {
            f"model.layers.{layer}.{name}.weight": rng.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        for layer in range(2)
    )
    source = write_source(tmp_path / "src", (first, second))
    with pytest.warns(UserWarning) as caught:
        quantize(source, tmp_path / "a", format="compressed-tensors", recipe="blockwise")
    (message,) = (str(w.message) for w in caught if "vLLM" in str(w.message))
    assert f"up: model.layers.0.{followed}.weight, model.layers.1.{followed}.weight;" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(source, tmp_path / "b", format="compressed-tensors", recipe="rowwise")
