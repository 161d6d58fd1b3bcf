"""What a checkpoint says and stores must fit together: scales, weights and configurations."""

import numpy as np
import pytest
import references as ref
from checkpoint_cases import (
    CASES,
    COLUMNS,
    DECLARED,
    NAMES,
    ROWS,
    assert_read,
    change,
    compressed,
    refuses,
    tensors_of,
    torchao,
    write,
)

from jax_fp8 import checkpoint

pytest.importorskip("safetensors")

FIRST = f"{NAMES[0]}.weight"


# --- Scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_scale_must_be_there_and_belong_to_a_weight(tmp_path, rng, name):
    """Takes away one tensor after the other, and adds each once more under another's name."""
    case = CASES[name]
    stored, _ = tensors_of(case, rng)
    of_weights = [key for key in stored if key.startswith(NAMES[0])]
    for i, key in enumerate(of_weights):
        part = {k: v for k, v in stored.items() if k != key}
        folder = write(tmp_path / f"{i}", part, case.quantization, separate=case.separate)
        what = "belong to no FP8 weight" if key == FIRST else f"needs one .*{key.split('.')[-1]}"
        refuses(folder, ValueError, what)
    stray = {key.replace("q_proj", "o_proj"): stored[key] for key in of_weights if key != FIRST}
    folder = write(tmp_path / "stray", stored | stray, case.quantization, separate=case.separate)
    refuses(folder, ValueError, "belong to no FP8 weight: .*o_proj")


def test_two_scales_of_one_weight(tmp_path, rng):
    stored, _ = tensors_of(CASES["fp8-dynamic"], rng)
    stored[f"{FIRST}_scale_inv"] = np.ones((), ref.F32)
    folder = write(tmp_path, stored, CASES["fp8-dynamic"].quantization)
    refuses(folder, ValueError, "needs one scale, .*; got .*weight_scale'.*weight_scale_inv'")


def test_a_scale_of_a_dynamic_activation_is_too_many(tmp_path, rng):
    stored, _ = tensors_of(CASES["fp8-static"], rng)
    quantization = CASES["fp8-static"].quantization | {"activation_scheme": "dynamic"}
    refuses(write(tmp_path, stored, quantization), ValueError, "no FP8 weight: .*input_scale")


@pytest.mark.parametrize("what", ["k_scale", "v_scale", "input_scale_ub", "weight_zero_point"])
def test_other_scales_are_not_passed_over(tmp_path, rng, what):
    stored, _ = tensors_of(CASES["ct-channel"], rng)
    stored[f"{NAMES[0]}.{what}"] = np.ones(1, ref.F32)
    refuses(write(tmp_path, stored, CASES["ct-channel"].quantization), ValueError, what)


def test_many_names_are_cut(tmp_path, rng):
    stored = {f"layers.{i}.weight": ref.random_codes(rng, (2, 2), ref.E4M3) for i in range(9)}
    message = r"these FP8 tensors mean: .*layers.*\(F8_E4M3\[2, 2\], .*\) and 4 more"
    refuses(write(tmp_path, stored), ValueError, message)


def test_fp8_is_announced_and_absent(tmp_path, rng):
    stored = {"x.weight": np.ones((2, 2), ref.BF16)}
    refuses(
        write(tmp_path, stored, CASES["fp8-block"].quantization), ValueError, "no tensor is FP8"
    )


@pytest.mark.parametrize("name", CASES)
def test_the_shape_of_a_scale_is_what_the_configuration_says(tmp_path, rng, name):
    case = CASES[name]
    stored, _ = tensors_of(case, rng)
    key = f"{NAMES[0]}.{case.scale}"
    for i, shape in enumerate([(2,), (ROWS, 2), (1, ROWS), (1, 2), (2, 1, 1, 2), (ROWS // 2, 1)]):
        stored[key] = np.ones(shape).astype(case.dtype)
        folder = write(tmp_path / f"{i}", stored, case.quantization, separate=case.separate)
        if shape == (1, 2) and name == "fp8-tall-block":
            continue
        refuses(folder, ValueError, f"scale '{key}' .* must have the shape ")


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
@pytest.mark.parametrize("key", ["weight_scale", "input_scale"])
def test_a_scale_is_finite_and_positive(tmp_path, rng, key, value):
    stored, _ = tensors_of(CASES["fp8-static"], rng)
    stored[f"{NAMES[0]}.{key}"] = np.array(value, ref.F32)
    folder = write(tmp_path, stored, CASES["fp8-static"].quantization)
    refuses(folder, ValueError, f"{key}' .* must be finite and positive, got {value}")


@pytest.mark.parametrize("name", ["fp8-block-e8m0", "fp8-block-u8"])
def test_an_exponent_of_255_is_no_scale(tmp_path, rng, name):
    stored, _ = tensors_of(CASES[name], rng)
    stored[f"{FIRST}_scale_inv"].view(np.uint8)[1, 1] = 255
    folder = write(tmp_path, stored, CASES[name].quantization)
    refuses(folder, ValueError, "must be finite and positive, got nan")


@pytest.mark.parametrize("dtype", [np.int8, np.float64, np.int32, ref.E4M3, ref.E5M2])
def test_a_scale_of_another_dtype(tmp_path, rng, dtype):
    stored, _ = tensors_of(CASES["ct-channel"], rng)
    stored[f"{FIRST}_scale"] = np.ones((ROWS, 1), dtype)
    folder = write(tmp_path, stored, CASES["ct-channel"].quantization)
    refuses(folder, DECLARED, f"{FIRST}_scale' .*")


# --- Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((2, 4, 8), ref.E4M3, "must be a matrix"),
        ((4,), ref.E4M3, "must be a matrix"),
        ((4, 8), ref.E5M2, "must be F8_E4M3"),
    ],
)
def test_a_weight_is_a_matrix_of_e4m3(tmp_path, rng, shape, dtype, message):
    stored, _ = tensors_of(CASES["fp8-dynamic"], rng)
    stored[FIRST] = ref.random_codes(rng, shape, dtype)
    folder = write(tmp_path, stored, CASES["fp8-dynamic"].quantization)
    refuses(folder, NotImplementedError, f"'{FIRST}' .* {message}")


def test_two_tensors_of_one_name(tmp_path, rng):
    stored, metadata, _ = torchao(rng)
    stored[FIRST] = np.ones((2, 2), ref.BF16)
    folder = write(tmp_path, stored, {"quant_method": "torchao"}, metadata=metadata)
    refuses(folder, ValueError, f"two tensors are called '{FIRST}'")


# --- Configurations -------------------------------------------------------------------------------

FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


def of_weights(**fields):
    return compressed(FLOAT8 | fields, None)


def of_inputs(**fields):
    return compressed(FLOAT8, FLOAT8 | {"strategy": "tensor"} | fields)


@pytest.mark.parametrize(
    "quantization, error, message",
    [
        ([], ValueError, "quantization_config must be an object, got list"),
        ({}, ValueError, "quant_method is missing"),
        ({"quant_method": 8}, ValueError, "quant_method must be a string, got int 8"),
        ({"quant_method": "gptq"}, NotImplementedError, "'gptq' is not supported; .*'torchao'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, NotImplementedError, "fmt 'e5m2'"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, NotImplementedError, "'none'"),
        ({"quant_method": "fp8", "ignored_layers": "lm_head"}, ValueError, "must be a list"),
        ({"quant_method": "fp8", "ignored_layers": [1]}, ValueError, "must hold strings"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, ValueError, "two positive integers"),
        ({"quant_method": "fp8", "weight_block_size": [128, True]}, ValueError, "two positive"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, NotImplementedError, "multiples"),
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, NotImplementedError, "64"),
        (
            {
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
                "activation_scheme": "static",
            },
            NotImplementedError,
            "activation_scheme of blocks 'static'",
        ),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, NotImplementedError, "expert_dtype"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": "x"}, ValueError, "must be float"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 0}, ValueError, "positive, got 0"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 10**400}, ValueError, "be finite"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, NotImplementedError, "NVFP4"),
        ({"quant_method": "modelopt"}, ValueError, "quant_algo is missing"),
        ({"quant_method": "torchao"}, ValueError, "no torchao metadata"),
        (compressed(None, None, config_groups=[]), ValueError, "config_groups must be an object"),
        (compressed(None, None, config_groups={"g": "FP8"}), ValueError, "g must be an object"),
        (compressed(None, None, format="int-quantized"), NotImplementedError, "'int-quantized'"),
        (compressed(None, None, ignore="lm_head"), ValueError, "ignore must be a list"),
        (compressed(None, None, transform_config={"a": 1}), NotImplementedError, "transform_co"),
        (compressed(None, None, sparsity_config={"format": "24"}), NotImplementedError, "sparsi"),
        (of_weights(type="int"), NotImplementedError, r"\('int', 8\) is not supported"),
        (of_weights(num_bits=4), NotImplementedError, r"\('float', 4\)"),
        (of_weights(num_bits=True), ValueError, "num_bits must be int, got bool"),
        (of_weights(symmetric=False), NotImplementedError, "symmetric"),
        (of_weights(strategy="group", group_size=128), NotImplementedError, "strategy 'group'"),
        (of_weights(strategy="block"), ValueError, "block_structure is missing"),
        (of_weights(strategy="block", block_structure="x"), ValueError, "must be a list"),
        (of_weights(strategy="block", block_structure=[1, 128]), NotImplementedError, "multiples"),
        (of_weights(dynamic=True), NotImplementedError, "dynamic"),
        (of_inputs(strategy="token"), NotImplementedError, "strategy, dynamic, group_size"),
        (of_inputs(strategy="group", dynamic=True, group_size=64), NotImplementedError, "64"),
        (of_inputs(dynamic="local"), ValueError, "dynamic must be bool"),
    ],
)
def test_configurations_that_are_refused(tmp_path, rng, quantization, error, message):
    stored = {FIRST: ref.random_codes(rng, (ROWS, COLUMNS), ref.E4M3)}
    stored[f"{FIRST}_scale"] = np.ones((ROWS, 1), ref.F32)
    refuses(write(tmp_path, stored, quantization), error, message)


def test_the_two_configurations_of_modelopt_agree(tmp_path, rng):
    stored, wanted = tensors_of(CASES["modelopt"], rng)
    folder = write(tmp_path, stored, CASES["modelopt"].quantization, separate=True)
    config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    change(folder / "config.json", quantization_config=config)
    assert_read(checkpoint.load(folder), wanted)
    change(folder / "config.json", quantization_config=config | {"quant_algo": "FP8_PB_WO"})
    refuses(folder, ValueError, "hf_quant_config.json says quant_algo 'FP8' and .*'FP8_PB_WO'")
    change(folder / "config.json", quantization_config={"quant_method": "fp8"})
    refuses(folder, ValueError, "quant_algo 'FP8' and .* says quant_method 'fp8'")


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("tensor_names", "[", ValueError, "is not valid JSON"),
        ("tensor_names", "{}", ValueError, "must be a list of names"),
        ("tensor_names", '["other.weight"]', ValueError, "does not describe 'other.weight'"),
        ("tensor_names", "[]", ValueError, "says that it is not quantized"),
        (FIRST, "[]", ValueError, "must be an object"),
        (FIRST, '{"_type": "Int4Tensor", "_data": {}}', NotImplementedError, "Int4Tensor"),
        (FIRST, '{"_type": "Tensor"}', ValueError, f"there is no tensor '{FIRST}'"),
        (FIRST, '{"_type": "Float8Tensor"}', ValueError, "_data is missing"),
        (
            FIRST,
            '{"_type": "Float8Tensor", "_data": {"block_size": [1, 8]}}',
            NotImplementedError,
            r"block_size of shape \[200, 136\] \(1, 8\)",
        ),
        (
            FIRST,
            '{"_type": "Float8Tensor", "_data": {"block_size": [[1], {}]}}',
            NotImplementedError,
            "block_size",
        ),
        (
            FIRST,
            '{"_type": "Float8Tensor", "_data": {"block_size": [1, 136], "act_quant_kwargs": 1}}',
            ValueError,
            "act_quant_kwargs must be an object",
        ),
    ],
)
def test_metadata_of_torchao_that_is_refused(tmp_path, rng, name, value, error, message):
    stored, metadata, _ = torchao(rng)
    folder = write(tmp_path, stored, {"quant_method": "torchao"}, metadata=metadata | {name: value})
    refuses(folder, error, message)
