"""FP8 matrix products for JAX that run what they say.

``quantize`` makes ScaledArrays, ``scaled_matmul`` and ``matmul`` multiply them, on cublasLt's FP8
kernels where the GPU has them, and ``plans`` tells what ran.
"""

from jax_fp8._src.ffi import VERSION as __version__
from jax_fp8._src.ffi import register
from jax_fp8._src.fused import (
    gelu_quantize,
    layer_norm_quantize,
    rms_norm_quantize,
    swiglu_quantize,
)
from jax_fp8._src.matmul import matmul
from jax_fp8._src.plan_choice import export_plans, import_plans, set_plan_choice
from jax_fp8._src.plans import clear_plans, plans
from jax_fp8._src.quantize import dequantize, quantize
from jax_fp8._src.recipe import Operand, Recipe
from jax_fp8._src.scaled_array import ScaledArray
from jax_fp8._src.scaled_matmul import scaled_matmul

__all__ = [
    "Operand",
    "Recipe",
    "ScaledArray",
    "__version__",
    "clear_plans",
    "dequantize",
    "export_plans",
    "import_plans",
    "gelu_quantize",
    "layer_norm_quantize",
    "matmul",
    "plans",
    "quantize",
    "register",
    "rms_norm_quantize",
    "scaled_matmul",
    "set_plan_choice",
    "swiglu_quantize",
]
