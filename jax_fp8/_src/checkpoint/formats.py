"""Which format a checkpoint has, and what its configuration says about each module.

``quantization_config`` of config.json says it, or ModelOpt's hf_quant_config.json. What is not
understood is refused by name: a misread scale gives numbers that look right.
"""

from __future__ import annotations

import dataclasses

from jax_fp8._src.checkpoint import compressed_tensors, modelopt, torchao
from jax_fp8._src.checkpoint.files import CONFIG, Folder, read_json
from jax_fp8._src.checkpoint.storage import (
    PER_BLOCK,
    PER_TENSOR,
    PER_TOKEN,
    STATIC,
    Activation,
    Format,
    Scheme,
    uniform,
    unsupported,
)
from jax_fp8._src.checkpoint.strict_json import Section
from jax_fp8._src.scaled_array import BLOCK

#: Under which names config.json has held it.
_KEYS = ("quantization_config", "compression_config")
_METHODS = ("compressed-tensors", "fp8", "fbgemm_fp8", "modelopt", "torchao")

#: What transformers takes where the configuration does not say it.
_FBGEMM_BOUND = 1200.0


def format_of(folder: Folder) -> Format | None:
    """The format of a checkpoint, or None where nothing says that it is quantized.

    Raises:
      ValueError: for a configuration that is broken or contradicts itself.
      NotImplementedError: for a method or an option that is not supported.
    """
    config = Section(str(folder.path / CONFIG), folder.config)
    found = [config.section(key) for key in _KEYS if key in config]
    if len(found) == 2 and found[0].fields != found[1].fields:
        raise ValueError(f"{config.where}: {_KEYS[0]} and {_KEYS[1]} differ")
    extra = folder.path / modelopt.FILE
    if extra.exists():
        separate = Section(str(extra), read_json(extra))
        return modelopt.from_files(separate, found[0] if found else None)
    if not found:
        return None
    section = found[0]
    method = section.get("quant_method", str)
    if method == "compressed-tensors":
        return compressed_tensors.from_config(section)
    if method == "fp8":
        return _fp8(section)
    if method == "fbgemm_fp8":
        return _fbgemm(section)
    if method == "modelopt":
        return modelopt.from_config(section)
    if method == "torchao":
        return torchao.from_metadata(section, folder)
    raise unsupported(section.where, "quant_method", method, _METHODS)


def _fp8(config: Section) -> Format:
    """AutoFP8's scale for a tensor, and DeepSeek's for a block of the weight."""
    where = config.where
    fmt = config.get("fmt", str, "e4m3")
    if fmt not in ("e4m3", "float8_e4m3fn"):
        raise unsupported(where, "fmt", fmt, ("e4m3",))
    experts = config.get("expert_dtype", str, "fp8")
    if experts != "fp8":
        raise unsupported(where, "expert_dtype", experts, ("fp8",))
    activations = config.get("activation_scheme", str, "dynamic")
    if activations not in ("static", "dynamic"):
        raise unsupported(where, "activation_scheme", activations, ("static", "dynamic"))
    ignored = config.strings("ignored_layers") + config.strings("modules_to_not_convert")
    if "weight_block_size" not in config:
        activation = STATIC if activations == "static" else PER_TENSOR
        return uniform("fp8", Scheme("tensor", activation), ignored)
    block = config.pair("weight_block_size")
    if activations == "static":
        raise unsupported(where, "activation_scheme of blocks", activations, ("dynamic",))
    return uniform("fp8", Scheme(block, _per_block(config, block)), ignored)


def _per_block(config: Section, block: tuple[int, int]) -> Activation:
    """Of activations, which have blocks as long as the weight's."""
    if block[1] != BLOCK:
        raise unsupported(config.where, "weight_block_size", list(block), ([BLOCK, BLOCK],))
    scale_fmt = config.get("scale_fmt", str, "float")
    if scale_fmt not in ("float", "ue8m0"):
        raise unsupported(config.where, "scale_fmt", scale_fmt, ("float", "ue8m0"))
    assert PER_BLOCK.operand is not None
    power_of_two = scale_fmt == "ue8m0"
    return Activation(dataclasses.replace(PER_BLOCK.operand, power_of_two=power_of_two))


def _fbgemm(config: Section) -> Format:
    bound = config.get("activation_scale_ub", float, _FBGEMM_BOUND)
    if bound <= 0:
        raise ValueError(f"{config.where}.activation_scale_ub must be positive, got {bound!r}")
    activation = dataclasses.replace(PER_TOKEN, bound=bound)
    ignored = config.strings("modules_to_not_convert")
    return uniform("fbgemm_fp8", Scheme("row", activation), ignored)
