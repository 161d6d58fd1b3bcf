"""A decoder of the Llama, Qwen and Mistral families, on the library's public names.

Needs the extra ``jax-fp8[decoder]``. ``load`` reads a model from a folder of the Hugging Face hub,
``Generator`` writes text with it, and ``jax-fp8 generate`` does both.
"""

from jax_fp8.decoder.attention import Prompt, Step
from jax_fp8.decoder.config import DecoderConfig, read_config
from jax_fp8.decoder.generate import Generator, Written
from jax_fp8.decoder.load import load, random
from jax_fp8.decoder.model import Cache, Decoder, empty_cache
from jax_fp8.decoder.sampling import Sampling, sample
from jax_fp8.decoder.score import Score, calibrate, score
from jax_fp8.decoder.text import TextStream, read_tokenizer

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Generator",
    "Prompt",
    "Sampling",
    "Score",
    "Step",
    "TextStream",
    "Written",
    "calibrate",
    "empty_cache",
    "load",
    "random",
    "read_config",
    "read_tokenizer",
    "sample",
    "score",
]
