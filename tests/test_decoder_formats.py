"""The decoder on checkpoints of every FP8 format, against the same weights in float32."""

import json
import math

import decoder_cases
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_decoder import logits, stored, tokens_of

pytest.importorskip("safetensors")
import checkpoint_cases
from safetensors.numpy import save_file

from jax_fp8 import decoder
from jax_fp8.__main__ import main

pytestmark = pytest.mark.slow

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
TEXTS = tokens_of((2, 24))


def fp8(case, weight):
    """A weight as a format stores it: (data, scale as stored, values in float32)."""
    out, width = weight.shape
    rows, columns = {"tensor": (out, width), "row": (1, width)}.get(case.granularity, case.block)
    padded = np.zeros((-(-out // rows) * rows, -(-width // columns) * columns), np.float32)
    padded[:out, :width] = np.abs(weight)
    amax = padded.reshape(-(-out // rows), rows, -1, columns).max(axis=(1, 3))
    if case.dtype.itemsize == 1:
        codes = (np.ceil(np.log2(amax / 448)) + 127).astype(np.uint8)
        scale, value = codes.view(case.dtype), np.exp2(codes.astype(np.float32) - 127)
    else:
        scale = np.asarray(amax / 448, case.dtype)
        value = scale.astype(np.float32)
    by_element = np.repeat(np.repeat(value, rows, 0), columns, 1)[:out, :width]
    data = np.clip(weight / by_element, -448, 448).astype(E4M3)
    shape = (
        case.scale_shape
        if case.granularity == "tensor"
        else scale.shape[: len(case.scale_shape)]
        if len(case.scale_shape) <= 2
        else (scale.shape[0], 1, scale.shape[1], 1)
    )
    return data, scale.reshape(shape), data.astype(np.float32) * by_element


def write_torchao(folder, given, weights):
    """The same for torchao's Float8Tensor, with a scale for each row of weights and of inputs."""
    row = checkpoint_cases.CASES["ct-naive"]
    inputs = {
        "_type": "QuantizeTensorToFloat8Kwargs",
        "_data": {"granularity": {"_type": "PerRow", "_data": {"dim": -1}}},
    }
    tensors, values = {}, dict(weights)
    metadata = {"format": "pt"}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            tensors[name], metadata[name] = weight, json.dumps({"_type": "Tensor"})
            continue
        data, scale, values[name] = fp8(row, weight)
        tensors |= {f"{module}._weight_qdata": data, f"{module}._weight_scale": scale}
        metadata[name] = checkpoint_cases.float8_tensor(weight.shape, inputs)
    metadata["tensor_names"] = json.dumps(list(weights))
    folder.mkdir()
    given = {**given, "quantization_config": {"quant_method": "torchao"}}
    (folder / "config.json").write_text(json.dumps(given))
    save_file(tensors, folder / "model.safetensors", metadata)
    return values


def write(folder, case, given, weights, input_amax):
    """The checkpoint of a format, and the float32 weights that it stands for."""
    tensors, values = dict(weights), dict(weights)
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            continue
        module = name.removesuffix(".weight")
        tensors[name], scale, values[name] = fp8(case, weight)
        tensors[f"{module}.{case.scale}"] = scale
        if case.input_scale:
            of_input = np.full(case.scale_shape and (1,), input_amax[module] / 448, case.dtype)
            tensors[f"{module}.{case.input_scale}"] = of_input
    folder.mkdir()
    if case.separate:
        (folder / "hf_quant_config.json").write_text(json.dumps(case.quantization))
    else:
        given = {**given, "quantization_config": case.quantization}
    (folder / "config.json").write_text(json.dumps(given))
    save_file(tensors, folder / "model.safetensors")
    return values


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model: its configuration, weights and, for static scales, amaxes."""
    given = decoder_cases.config("llama", hidden_size=192, intermediate_size=320)
    weights = decoder_cases.tensors(given)
    folder = tmp_path_factory.mktemp("models") / "wide"
    decoder_cases.write(folder, given, weights)
    text = "".join(chr(29 + token) for token in TEXTS.reshape(-1))
    return given, weights, decoder.calibrate(folder, text, dtype=jnp.float32, window=24)


#: RMS error over RMS of a product of normal values of which one side was rounded to E4M3, without
#: the values that a scale's amax leaves to the subnormals: 2^-4 / sqrt(3) of a value that lies at
#: the lower end of its binade, and 0.72 of that on average over the binade.
ROUNDED = 0.72 * 2**-4 / math.sqrt(3)


def check(folder, given, values, wide_inputs=False):
    """Holds the checkpoint, dequantized and as it is, to the weights that it stands for."""
    want = logits(stored(given, values), TEXTS)
    dequantized = decoder.load(folder, dtype=jnp.float32, dequantize=True)
    np.testing.assert_allclose(logits(dequantized, TEXTS), want, rtol=0, atol=1e-4)
    found = decoder.load(folder, dtype=jnp.float32)
    assert found.format is not None
    error = np.linalg.norm(logits(found, TEXTS) - want) / np.linalg.norm(want)
    if wide_inputs:
        assert error < 1e-5
    else:  # Four products in a row in each of two layers, each of which rounds its input.
        assert 1e-3 < error < ROUNDED * math.sqrt(4 * given["num_hidden_layers"])


@pytest.mark.parametrize("name", checkpoint_cases.CASES)
def test_a_format(tmp_path, model, name):
    given, weights, input_amax = model
    case = checkpoint_cases.CASES[name]
    values = write(tmp_path / "model", case, given, weights, input_amax)
    check(tmp_path / "model", given, values, wide_inputs=case.activation.operand is None)


def test_torchao(tmp_path, model):
    given, weights, _ = model
    check(tmp_path / "model", given, write_torchao(tmp_path / "model", given, weights))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["ct-naive", "fp8-block"])
def test_every_family(tmp_path, family, name):
    given = decoder_cases.config(family, hidden_size=192, intermediate_size=320)
    weights = decoder_cases.tensors(given)
    case = checkpoint_cases.CASES[name]
    check(tmp_path / "model", given, write(tmp_path / "model", case, given, weights, {}))


def test_scales_of_a_cache_in_fp8(tmp_path, model):
    """Which ModelOpt writes beside the weights: an error, unless they are left out on purpose."""
    given, weights, input_amax = model
    case = checkpoint_cases.CASES["modelopt"]
    at = "model.layers.{}.self_attn.{}_proj.{}_scale"
    scales = {at.format(i, side, side): np.ones(1, np.float32) for i in (0, 1) for side in "kv"}
    write(tmp_path / "without", case, given, weights, input_amax)
    write(tmp_path / "with", case, given, weights | scales, input_amax)
    with pytest.raises(ValueError, match=r"scales that belong to no FP8 weight: .*k_scale"):
        decoder.load(tmp_path / "with")
    found = decoder.load(tmp_path / "with", dtype=jnp.float32, ignore=["*.k_scale", "*.v_scale"])
    want = decoder.load(tmp_path / "without", dtype=jnp.float32)
    np.testing.assert_array_equal(logits(found, TEXTS), logits(want, TEXTS))


def test_static_scales_by_the_command(tmp_path):
    """From a wide checkpoint and a text to FP8 that the decoder runs."""
    given = decoder_cases.config(hidden_size=192, intermediate_size=320)
    weights = decoder_cases.tensors(given)
    decoder_cases.write(tmp_path / "wide", given, weights)
    text = "".join(chr(29 + token) for token in TEXTS.reshape(-1))
    (tmp_path / "text").write_text(text, encoding="utf-8")
    how = ["--format", "compressed-tensors", "--recipe", "static", "--calibrate"]
    command = ["quantize", str(tmp_path / "wide"), str(tmp_path / "fp8"), *how]
    assert main([*command, str(tmp_path / "text")]) == 0
    found = decoder.load(tmp_path / "fp8", dtype=jnp.float32)
    wide = decoder.load(tmp_path / "fp8", dtype=jnp.float32, dequantize=True)
    want = logits(wide, TEXTS)
    error = np.linalg.norm(logits(found, TEXTS) - want) / np.linalg.norm(want)
    assert 1e-3 < error < ROUNDED * math.sqrt(4 * given["num_hidden_layers"])


def test_a_recipe_for_what_is_in_fp8(tmp_path, model):
    case = checkpoint_cases.CASES["fp8-dynamic"]
    write(tmp_path / "model", case, *model)
    with pytest.raises(ValueError, match="the checkpoint is in FP8"):
        decoder.load(tmp_path / "model", recipe="rowwise")
