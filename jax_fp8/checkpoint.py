"""FP8 checkpoints of the Hugging Face hub.

``load`` reads a local folder into arrays and ScaledArrays, strictly: what a checkpoint says and
this library does not understand is an error, and never a number.

>>> import jax_fp8.checkpoint
>>> checkpoint = jax_fp8.checkpoint.load("Meta-Llama-3-8B-FP8", progress=True)  # doctest: +SKIP
>>> checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].granularity  # doctest: +SKIP
'row'
"""

from jax_fp8._src.checkpoint.fuse import concatenate
from jax_fp8._src.checkpoint.load import Checkpoint, load
from jax_fp8._src.checkpoint.storage import Activation
from jax_fp8._src.checkpoint.write import quantize

__all__ = ["Activation", "Checkpoint", "concatenate", "load", "quantize"]
