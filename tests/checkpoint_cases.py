"""Checkpoints as the tools of each format leave them, small, with what must be read from them."""

import dataclasses
import json
import math

import ml_dtypes
import numpy as np
import pytest
import references as ref

from jax_fp8 import Operand, checkpoint
from jax_fp8.checkpoint import Activation

E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
SHAPE = (200, 136)  # Of weights: the last blocks of both axes are partial.
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")

DYNAMIC, STATIC, WIDE = (
    Activation(Operand()),
    Activation(Operand(scaling="static")),
    Activation(None),
)
TOKEN = Activation(Operand(granularity="row"))
BLOCK = Activation(Operand(granularity=(1, 128)))
BLOCK_E8M0 = Activation(Operand(granularity=(1, 128), power_of_two=True))


@dataclasses.dataclass
class Case:
    """A format: how it says what it says, and what that means."""

    quantization: dict
    granularity: object
    activation: Activation
    scale: str = "weight_scale"
    scale_shape: tuple = ()
    input_scale: str | None = None
    dtype: np.dtype = ref.F32
    block: tuple = (128, 128)
    separate: bool = False  # In hf_quant_config.json.


def args(strategy, dynamic=None, **more):
    found = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}
    return found if dynamic is None else found | {"dynamic": dynamic}


def compressed(weights, inputs, **more):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    } | more


def modelopt(algorithm):
    return {"quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head", "*.gate"]}}


ROWS, COLUMNS = SHAPE
BLOCKS = (math.ceil(ROWS / 128), math.ceil(COLUMNS / 128))
AUTO = {"quant_method": "fp8", "ignored_layers": ["lm_head"]}
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
TENSOR, CHANNEL = args("tensor"), args("channel")
PER_TOKEN = args("token", True)

CASES = {
    "ct-tensor": Case(
        compressed(TENSOR, args("tensor", True)), "tensor", DYNAMIC, scale_shape=(1,),
        dtype=ref.BF16,
    ),
    "ct-static": Case(
        compressed(TENSOR, args("tensor", False)), "tensor", STATIC, scale_shape=(1,),
        input_scale="input_scale", dtype=ref.BF16,
    ),
    "ct-channel": Case(
        compressed(CHANNEL, PER_TOKEN), "row", TOKEN, scale_shape=(ROWS, 1), dtype=ref.BF16
    ),
    "ct-naive": Case(
        compressed(CHANNEL, PER_TOKEN, format="naive-quantized"), "row", TOKEN,
        scale_shape=(ROWS, 1),
    ),
    "ct-weight-only": Case(
        compressed(CHANNEL, None), "row", WIDE, scale_shape=(ROWS, 1), dtype=ref.F16
    ),
    "ct-block": Case(
        compressed(
            args("block", block_structure=[128, 128]), args("group", True, group_size=128)
        ),
        (128, 128), BLOCK, scale_shape=BLOCKS, dtype=ref.BF16,
    ),
    "ct-old-block": Case(
        compressed(
            args("block", block_structure="128x128"), args("group", True, group_size=128)
        ),
        (128, 128), BLOCK, scale_shape=BLOCKS,
    ),
    "fp8-dynamic": Case(AUTO | {"activation_scheme": "dynamic"}, "tensor", DYNAMIC),
    "fp8-static": Case(
        AUTO | {"activation_scheme": "static"}, "tensor", STATIC, input_scale="input_scale"
    ),
    "fp8-transformers": Case(
        AUTO | {"activation_scheme": "static", "weight_block_size": None}, "tensor", STATIC,
        scale="weight_scale_inv", input_scale="activation_scale",
    ),
    "fp8-block": Case(DEEPSEEK, (128, 128), BLOCK, "weight_scale_inv", BLOCKS),
    "fp8-block-bf16": Case(DEEPSEEK, (128, 128), BLOCK, "weight_scale_inv", BLOCKS, dtype=ref.BF16),
    "fp8-block-e8m0": Case(
        DEEPSEEK | {"scale_fmt": "ue8m0"}, (128, 128), BLOCK_E8M0, "weight_scale_inv", BLOCKS,
        dtype=E8M0,
    ),
    "fp8-block-u8": Case(
        DEEPSEEK | {"scale_fmt": "ue8m0"}, (128, 128), BLOCK_E8M0, "weight_scale_inv", BLOCKS,
        dtype=np.dtype(np.uint8),
    ),
    "fp8-tall-block": Case(
        DEEPSEEK | {"weight_block_size": [384, 128]}, (128, 128), BLOCK, "weight_scale_inv",
        (1, BLOCKS[1]), block=(384, 128),
    ),
    "fbgemm": Case(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []},
        "row", dataclasses.replace(TOKEN, bound=1200.0), scale_shape=(ROWS, 1),
    ),
    "modelopt": Case(modelopt("FP8"), "tensor", STATIC, input_scale="input_scale", separate=True),
    "modelopt-config": Case(
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, "tensor", STATIC,
        input_scale="input_scale",
    ),
    "modelopt-channel": Case(
        modelopt("FP8_PER_CHANNEL_PER_TOKEN"), "row", TOKEN, scale_shape=(ROWS,), separate=True
    ),
    "modelopt-block": Case(
        modelopt("fp8_pb_wo"), (128, 128), WIDE, scale_shape=(BLOCKS[0], 1, BLOCKS[1], 1),
        separate=True,
    ),
}  # fmt: skip


def random_scale(rng, shape, dtype):
    """A scale as stored, and the same in float32."""
    if dtype.itemsize == 1:
        codes = rng.integers(100, 140, shape).astype(np.uint8)
        return codes.view(dtype), np.ldexp(np.float32(1), codes.astype(int) - 127)
    stored = np.asarray(np.exp(rng.standard_normal(shape)), dtype)
    return stored, np.asarray(stored, np.float32)


def tensors_of(case, rng):
    """What is stored, and what must be read: (data, scale) of FP8 weights, arrays of the rest."""
    wide = {
        "lm_head.weight": rng.standard_normal((8, COLUMNS)).astype(ref.BF16),
        "model.norm.weight": rng.standard_normal(COLUMNS).astype(ref.F32),
        "model.empty": np.zeros((0, 3), np.int32),
    }
    stored, wanted = dict(wide), dict(wide)
    for name in NAMES:
        data = ref.random_codes(rng, SHAPE, ref.E4M3)
        scale, value = random_scale(rng, case.scale_shape, case.dtype)
        if isinstance(case.granularity, tuple):
            value = value.reshape(
                [math.ceil(n / b) for n, b in zip(SHAPE, case.block, strict=True)]
            )
            down, across = (b // 128 for b in case.block)
            value = np.repeat(np.repeat(value, down, 0), across, 1)[: BLOCKS[0], : BLOCKS[1]]
        stored |= {f"{name}.weight": data, f"{name}.{case.scale}": scale}
        wanted[f"{name}.weight"] = data, value.reshape(ref.scale_shape(SHAPE, case.granularity))
        if case.input_scale:
            of_input, value = random_scale(rng, case.scale_shape and (1,), case.dtype)
            stored[f"{name}.{case.input_scale}"] = of_input
            wanted[f"{name}.input_scale"] = value.reshape(())
    return stored, wanted


def float8_tensor(shape, act_quant_kwargs, row=True):
    """What torchao says of a Float8Tensor in a file's header."""
    attributes = {
        "block_size": [1 if row else shape[0], shape[1]],
        "mm_config": None,
        "act_quant_kwargs": act_quant_kwargs,
        "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
    }
    return json.dumps(
        {
            "_type": "Float8Tensor",
            "_data": attributes,
            "_tensor_data_names": ["qdata", "scale"],
        }
    )


def torchao(rng, act_quant_kwargs=None, row=True):
    """Tensors, header metadata and what must be read, of a Float8Tensor for each weight."""
    stored = {"model.norm.weight": np.ones(COLUMNS, ref.BF16), f"{NAMES[0]}.bias": np.ones(ROWS)}
    stored = {name: array.astype(ref.BF16) for name, array in stored.items()}
    wanted = dict(stored)
    metadata = {name: json.dumps({"_type": "Tensor"}) for name in stored}
    for name in NAMES:
        data = ref.random_codes(rng, SHAPE, ref.E4M3)
        scale, value = random_scale(rng, (ROWS, 1) if row else (1, 1), ref.F32)
        stored |= {f"{name}._weight_qdata": data, f"{name}._weight_scale": scale}
        wanted[f"{name}.weight"] = data, value
        metadata[f"{name}.weight"] = float8_tensor(SHAPE, act_quant_kwargs, row)
    metadata["tensor_names"] = json.dumps(list(metadata))
    return stored, metadata, wanted


def write(folder, stored, quantization=None, *, files=1, metadata=None, separate=False):
    """A folder with these tensors in so many files."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "hidden_size": COLUMNS}
    if quantization is not None and separate:
        (folder / "hf_quant_config.json").write_text(json.dumps(quantization))
    elif quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    metadata = {"format": "pt"} | (metadata or {})
    if files == 1:
        save_file(stored, folder / "model.safetensors", metadata)
        return folder
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = {name: stored[name] for name in list(stored)[i::files]}
        save_file(part, folder / file, metadata)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder, weight_map):
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_read(checkpoint, wanted):
    """Every tensor is there, bit for bit, and no other one."""
    assert checkpoint.tensors.keys() == wanted.keys()
    for name, want in wanted.items():
        got = checkpoint.tensors[name]
        if isinstance(want, tuple):
            ref.assert_same_bits(got.data, want[0])
            ref.assert_same_bits(got.scale, want[1])
        else:
            ref.assert_same_bits(got, want)


#: What load may raise for a file.
DECLARED = (ValueError, NotImplementedError, FileNotFoundError)


def refuses(folder, error, message):
    with pytest.raises(error, match=f"(?s)^load: .*{message}"):
        checkpoint.load(folder)


def change(file, **fields):
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | fields))
