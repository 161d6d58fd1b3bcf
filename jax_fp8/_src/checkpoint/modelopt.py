"""ModelOpt's configuration: hf_quant_config.json, or quantization_config of config.json."""

from __future__ import annotations

from jax_fp8._src.checkpoint.storage import (
    PER_TOKEN,
    STATIC,
    WIDE,
    Format,
    Scheme,
    uniform,
    unsupported,
)
from jax_fp8._src.checkpoint.strict_json import Section
from jax_fp8._src.scaled_array import BLOCK

FILE = "hf_quant_config.json"

_SCHEMES = {
    "FP8": Scheme("tensor", STATIC),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("row", PER_TOKEN),
    "FP8_PB_WO": Scheme((BLOCK, BLOCK), WIDE),
}


def from_config(config: Section) -> Format:
    """The format of a section that has ``quant_algo``, or has it in ``quantization``."""
    inner = config.section("quantization") if "quantization" in config else config
    algorithm = inner.get("quant_algo", str).upper()
    if algorithm not in _SCHEMES:
        raise unsupported(inner.where, "quant_algo", algorithm, _SCHEMES)
    ignored = inner.strings("exclude_modules") + inner.strings("ignore")
    return uniform("modelopt", _SCHEMES[algorithm], ignored)


def from_files(separate: Section, config: Section | None) -> Format:
    """The same of the file of its own, which config.json, if it says anything, must not deny.

    Raises:
      ValueError: where the two contradict each other.
    """
    if config is None:
        return from_config(separate)
    method = config.get("quant_method", str)
    algorithms = [
        (each.section("quantization") if "quantization" in each else each).get("quant_algo", str)
        for each in ((separate, config) if method == "modelopt" else (separate,))
    ]
    if method != "modelopt" or len({algorithm.upper() for algorithm in algorithms}) > 1:
        raise ValueError(
            f"{separate.where} says quant_algo {algorithms[0]!r} and {config.where} says"
            f" quant_method {method!r}"
            + (f" with quant_algo {algorithms[1]!r}" if len(algorithms) > 1 else "")
        )
    return from_config(config)
