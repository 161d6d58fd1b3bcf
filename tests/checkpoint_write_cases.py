"""A small wide checkpoint to quantize, and how the tests read what came of it."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jax_fp8._src.checkpoint.files import open_folder
from jax_fp8._src.checkpoint.scheme import EXPRESSIBLE

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CASES = [(format, recipe) for format, recipes in EXPRESSIBLE.items() for recipe in recipes]
LINEAR = {"model.layers.0.q_proj": (160, 256), "model.layers.1.down_proj": (256, 384)}
AMAX = {"model.layers.0.q_proj": 4.48, "model.layers.1.down_proj": 1000.0}


def tensors(rng, dtype=ml_dtypes.bfloat16):
    """Of a model in two shards: two linear layers, and all that has to stay as it is."""

    def sample(*shape):
        return rng.standard_normal(shape).astype(dtype)

    first = {
        "model.embed_tokens.weight": sample(32, 256),
        "model.layers.0.q_proj.weight": sample(*LINEAR["model.layers.0.q_proj"]),
        "model.layers.0.q_proj.bias": sample(160),
        "model.layers.0.norm.weight": sample(256),
    }
    second = {
        "model.layers.1.down_proj.weight": sample(*LINEAR["model.layers.1.down_proj"]),
        "model.layers.1.mlp.gate.weight": sample(4, 256),
        "model.layers.1.conv.weight": sample(4, 1, 3),
        "lm_head.weight": sample(32, 256),
    }
    return first, second


def write_source(folder, shards, config=None):
    folder.mkdir()
    weight_map = {}
    for name, shard in zip(SHARDS, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "torch_dtype": "bfloat16"} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    return folder


def read(folder):
    return {name: np.array(t.map()) for name, t in open_folder(folder).tensors.items()}


def amax_for(recipe):
    return AMAX if recipe == "static" else None
