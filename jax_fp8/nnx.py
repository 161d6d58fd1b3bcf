"""Flax nnx models in FP8: switched in one line, or built of FP8 layers.

``convert`` switches a model; ``Linear``, ``LinearGeneral`` and ``Einsum`` are Flax's own with two
more arguments, ``recipe`` and ``implementation``. Parameters, initializers, names and partitioning
are Flax's, so checkpoints move both ways. Static and delayed recipes keep amaxes in Variables of
the type ``ScalingVariable``, which ``nnx.Param``, and with it an optimizer, does not see.

>>> import jax.numpy as jnp, jax_fp8.nnx
>>> from flax import nnx
>>> rngs = nnx.Rngs(0)
>>> model = nnx.Sequential(nnx.Linear(16, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 4, rngs=rngs))
>>> model = jax_fp8.nnx.convert(model, recipe="rowwise")
>>> model(jnp.ones((2, 16))).shape
(2, 4)
"""

from jax_fp8._src.layers import require_flax

require_flax("jax_fp8.nnx")

from jax_fp8._src.nnx_convert import calibrate, convert  # noqa: E402
from jax_fp8._src.nnx_health import health, measure  # noqa: E402
from jax_fp8._src.nnx_kernel import FP8Kernel, KernelVariable  # noqa: E402
from jax_fp8._src.nnx_layers import (  # noqa: E402
    DotGeneral,
    Einsum,
    EinsumOp,
    Linear,
    LinearGeneral,
    ScalingVariable,
)
from jax_fp8._src.nnx_quantize import prepare, quantize  # noqa: E402

__all__ = [
    "DotGeneral",
    "Einsum",
    "EinsumOp",
    "FP8Kernel",
    "KernelVariable",
    "Linear",
    "LinearGeneral",
    "ScalingVariable",
    "calibrate",
    "convert",
    "health",
    "measure",
    "prepare",
    "quantize",
]
