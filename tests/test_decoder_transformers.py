"""The decoder against `transformers`, family by family, in float32."""

import decoder_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import logits, tokens_of

from jax_fp8 import decoder

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

MODELS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3": ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA_3}),
    "linear rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "dynamic rope": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32},
    ),
    "yarn": ("llama", {"rope_scaling": YARN}),
    "yarn as it is written now": (
        "llama",
        {"rope_parameters": {**YARN, "rope_theta": 1000.0, "beta_fast": 16, "beta_slow": 2}},
    ),
    "yarn with a factor of its own": ("llama", {"rope_scaling": {**YARN, "attention_factor": 1.3}}),
    "mistral": ("mistral", {}),
    "mistral with a window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 with yarn": ("qwen3", {"rope_scaling": YARN, "attention_bias": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits(tmp_path, name):
    family, changed = MODELS[name]
    given = cases.config(family, **changed)
    folder = cases.write(tmp_path / "model", given)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert reference.config.model_type == family
    texts = tokens_of((2, 48))
    with torch.no_grad():
        want = reference(torch.tensor(texts)).logits.numpy()
    found = logits(decoder.load(folder, dtype=jnp.float32), texts)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4)


def test_a_text(tmp_path):
    """Greedy, with its own cache against `transformers`'."""
    folder = cases.write(tmp_path / "model", cases.config("qwen2"))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokens_of(9).tolist()
    with torch.no_grad():
        want = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[999],
            pad_token_id=0,
        )[0, 9:]
    model = decoder.load(folder, dtype=jnp.float32)
    generator = decoder.Generator(model, positions=32)
    found = [int(token[0]) for token in generator.stream([prompt], 12, eos=())]
    assert found == want.tolist()
