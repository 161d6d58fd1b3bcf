"""FP8 matrix products for JAX that run what they say.

``quantize`` makes ScaledArrays, ``scaled_matmul`` and ``matmul`` multiply them, on cublasLt's FP8
kernels where the GPU has them, and ``plans`` tells what ran.
"""

from jax_fp8._src.cast_transpose import cast_transpose
from jax_fp8._src.dot_general import dot_general
from jax_fp8._src.einsum import einsum
from jax_fp8._src.ffi import VERSION as __version__
from jax_fp8._src.ffi import register
from jax_fp8._src.fused import (
    gelu_quantize,
    layer_norm_quantize,
    rms_norm_quantize,
    swiglu_quantize,
)
from jax_fp8._src.fused_chain import ChainLink, fused_chain
from jax_fp8._src.fused_matmul import fused_matmul
from jax_fp8._src.health import HealthProbe, OperandStats, health_probe, summarize
from jax_fp8._src.health_plot import plot_health
from jax_fp8._src.matmul import matmul
from jax_fp8._src.plan_choice import export_plans, import_plans, set_plan_choice
from jax_fp8._src.plans import clear_plans, plans
from jax_fp8._src.prepared import PreparedWeight, prepare_weight
from jax_fp8._src.product import checkpoint_policy
from jax_fp8._src.quantize import dequantize, quantize
from jax_fp8._src.recipe import Operand, Recipe, named_recipe
from jax_fp8._src.scaled_array import ScaledArray
from jax_fp8._src.scaled_matmul import scaled_matmul
from jax_fp8._src.scaling import ScalingState, calibrate, init_scaling

__all__ = [
    "ChainLink",
    "HealthProbe",
    "Operand",
    "OperandStats",
    "PreparedWeight",
    "Recipe",
    "ScaledArray",
    "ScalingState",
    "__version__",
    "calibrate",
    "cast_transpose",
    "checkpoint_policy",
    "clear_plans",
    "dequantize",
    "dot_general",
    "einsum",
    "export_plans",
    "fused_chain",
    "fused_matmul",
    "gelu_quantize",
    "health_probe",
    "import_plans",
    "init_scaling",
    "layer_norm_quantize",
    "matmul",
    "named_recipe",
    "plans",
    "plot_health",
    "prepare_weight",
    "quantize",
    "register",
    "rms_norm_quantize",
    "scaled_matmul",
    "set_plan_choice",
    "summarize",
    "swiglu_quantize",
]
