"""The recipes by name, and how the model comes to them."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

import jax_fp8.nnx
from gpt import peer

#: What is no recipe: the model as it is, once more from weights a little larger, and with flax's
#: own FP8.
BF16, BF16_AGAIN, FLAX = "bf16", "bf16_again", "flax_direct"
#: How much larger: a bit of float32, or two. Where two trainings end that differ in this alone says
#: which differences between recipes mean something.
A_LITTLE = 1 + 2.0**-22
#: Name in the results -> what ``jax_fp8.named_recipe`` takes.
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("rowwise", "tensorwise", "blockwise", "delayed")},
    # Room for what grows until the next calibration.
    "static": {"name": "static", "margin": 1},
    "weight_only": {"name": "weight_only"},
    "rowwise_e5m2": {"name": "rowwise", "gradient_dtype": "float8_e5m2"},
    "tensorwise_e4m3": {"name": "tensorwise", "gradient_dtype": "float8_e4m3fn"},
    "rowwise_wide_wgrad": {"name": "rowwise", "wide_wgrad": True},
}
NAMES = (BF16, BF16_AGAIN, *OPTIONS, FLAX)
#: Those that are trained if none are named.
DEFAULT = (
    *(BF16, BF16_AGAIN, "rowwise", "tensorwise", "blockwise", "delayed", "static"),
    *("weight_only", FLAX),
)
#: Steps. Activations grow as a model learns, and static scales know of it by calibration alone.
CALIBRATED_EVERY = 50


def convert(model: Any, name: str) -> Any:
    """The model with its dense layers in FP8; ``nnx.convert`` leaves embedding and head wide."""
    if name == BF16:
        return model
    if name == BF16_AGAIN:
        nnx.update(model, jax.tree.map(lambda x: A_LITTLE * x, nnx.state(model, nnx.Param)))
        return model
    if name == FLAX:
        return peer.convert(model)
    return jax_fp8.nnx.convert(model, recipe=jax_fp8.named_recipe(**OPTIONS[name]))


def is_calibrated(name: str) -> bool:
    """Whether the recipe has scales that are to be calibrated."""
    return name == "static"


def differentiated(name: str) -> Any:
    """The Variables that a step needs the gradients of."""
    return nnx.Any(nnx.Param, peer.Overwritten) if name == FLAX else nnx.Param
