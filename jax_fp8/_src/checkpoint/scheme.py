"""What the formats of FP8 checkpoints can say of a recipe, and how their config.json says it."""

from __future__ import annotations

from typing import Any

from jax_fp8._src.recipe import RECIPES, Operand, Recipe
from jax_fp8._src.scaled_array import BLOCK, Granularity

#: The recipes that each format has words for.
EXPRESSIBLE = {
    "fp8": ("tensorwise", "static", "blockwise"),
    "compressed-tensors": ("tensorwise", "rowwise", "blockwise", "static", "weight_only"),
}
_WEIGHT_STRATEGY: dict[Granularity, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "row": {"strategy": "channel"},
    (BLOCK, BLOCK): {"strategy": "block", "block_structure": [BLOCK, BLOCK]},
}
_ACTIVATION_STRATEGY: dict[Granularity, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "row": {"strategy": "token"},
    (1, BLOCK): {"strategy": "group", "group_size": BLOCK},
}


def operands(format: str, recipe: str) -> tuple[Operand, Operand | None]:
    """(weight, activation) of the named recipe, as far as ``format`` can express it.

    Raises:
      ValueError: for an unknown format, and for a recipe that this format has no words for.
    """
    if format not in EXPRESSIBLE:
        raise ValueError(
            f"quantize: unknown format {format!r}; accepted are {', '.join(EXPRESSIBLE)}"
        )
    if recipe not in EXPRESSIBLE[format]:
        others = [name for name, recipes in EXPRESSIBLE.items() if recipe in recipes]
        instead = f"; {' and '.join(others)} can" if others else ", and no other format either"
        raise ValueError(
            f"quantize: format {format!r} cannot express the recipe {recipe!r}{instead}; it"
            f" expresses {', '.join(EXPRESSIBLE[format])}"
        )
    found: Recipe = RECIPES[recipe]
    assert found.weight is not None
    return found.weight, found.activation


def scale_name(format: str, weight: Operand) -> str:
    """The last part of the name of a weight's scale."""
    by_blocks = isinstance(weight.granularity, tuple)
    return "weight_scale_inv" if format == "fp8" and by_blocks else "weight_scale"


def scalar_shape(format: str) -> tuple[int, ...]:
    """The stored shape of a scale that is one number."""
    return () if format == "fp8" else (1,)


def stored_shape(format: str, weight: Operand, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape of a weight's scale, ``shape`` being that of ScaledArray."""
    return scalar_shape(format) if weight.granularity == "tensor" else shape


def quantization_config(
    format: str, weight: Operand, activation: Operand | None, ignored: list[str]
) -> dict[str, Any]:
    """What config.json holds under ``quantization_config``.

    Args:
      format: ``"fp8"`` or ``"compressed-tensors"``.
      weight: how the weights of the linear layers are quantized.
      activation: how their inputs are; None leaves them wide.
      ignored: the linear layers that stay wide, by name.
    """
    is_static = activation is not None and activation.scaling == "static"
    if format == "fp8":
        blocks = isinstance(weight.granularity, tuple)
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "static" if is_static else "dynamic",
            "weight_block_size": list(weight.granularity) if blocks else None,
            # Some readers know the one name, some the other.
            "ignored_layers": ignored,
            "modules_to_not_convert": ignored,
        }
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs = activation and {
        **common,
        "dynamic": not is_static,
        **_ACTIVATION_STRATEGY[activation.granularity],
    }
    weights = {**common, "dynamic": False, **_WEIGHT_STRATEGY[weight.granularity]}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
        "ignore": ignored,
    }
