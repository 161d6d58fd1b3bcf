"""What the writer wrote, read by transformers itself."""

import numpy as np
import pytest

import jax_fp8
from jax_fp8 import checkpoint
from jax_fp8._src.checkpoint.scheme import EXPRESSIBLE
from jax_fp8._src.checkpoint.write import quantize

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

TOKENS = [[1, 5, 9, 2, 30, 31, 7, 0]]


def llama(hidden, intermediate, tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def with_our_weights(model, folder):
    """The model with the values of the checkpoint, as our own reader has them."""
    values = {}
    for name, tensor in checkpoint.load(folder).tensors.items():
        if isinstance(tensor, jax_fp8.ScaledArray):
            values[name] = torch.from_numpy(np.array(jax_fp8.dequantize(tensor)))
    assert len(values) == 14  # 2 layers of 7 linear ones.
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    return model


def saved(tmp_path, model, format, recipe):
    model.save_pretrained(tmp_path / "src", max_shard_size="600KB")
    assert len(list((tmp_path / "src").glob("*.safetensors"))) > 1
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    amax = dict.fromkeys(names, 3.0) if recipe == "static" else None
    quantize(tmp_path / "src", tmp_path / "dst", format=format, recipe=recipe, input_amax=amax)
    return tmp_path / "dst"


WHOLE, PARTIAL = (256, 512), (192, 320)  # In blocks of 128.
CASES = [(recipe, WHOLE, False) for recipe in EXPRESSIBLE["compressed-tensors"]]


@pytest.mark.parametrize(
    "recipe, sizes, tied", [*CASES, ("blockwise", PARTIAL, False), ("rowwise", PARTIAL, True)]
)
def test_compressed_tensors(tmp_path, recipe, sizes, tied):
    model = llama(*sizes, tied)
    folder = saved(tmp_path, model, "compressed-tensors", recipe)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    read = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    before = logits(model)
    want = logits(with_our_weights(model, folder))
    assert np.abs(want - before).max() > 1e-3  # It is the FP8 weights that are compared.
    np.testing.assert_allclose(logits(read), want, rtol=0, atol=1e-4)


def test_blocks_of_the_format_fp8(tmp_path):
    pytest.importorskip("accelerate")
    model = llama(*WHOLE)
    folder = saved(tmp_path, model, "fp8", "blockwise")
    config = transformers.FineGrainedFP8Config(dequantize=True)
    read = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    np.testing.assert_allclose(
        logits(read), logits(with_our_weights(model, folder)), rtol=0, atol=1e-4
    )


def test_static_scales_of_compressed_tensors(tmp_path):
    folder = saved(tmp_path, llama(*WHOLE), "compressed-tensors", "static")
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = {n: m for n, m in read.named_modules() if isinstance(m, torch.nn.Linear)}
    assert not hasattr(layers.pop("lm_head"), "input_scale")
    assert len(layers) == 14
    for layer in layers.values():
        assert layer.input_scale.item() == np.float32(3.0) / np.float32(448)
