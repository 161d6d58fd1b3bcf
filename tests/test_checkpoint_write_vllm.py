"""What the writer wrote, loaded by vLLM itself, where that is installed, on a CPU or a GPU."""

import importlib.util

import numpy as np
import pytest
from cases import run_script
from checkpoint_write_cases import CASES

from jax_fp8._src.checkpoint.write import quantize

pytestmark = pytest.mark.slow
if importlib.util.find_spec("vllm") is None:  # It takes half a minute to import.
    pytest.skip("vllm is not installed", allow_module_level=True)
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

#: Builds the model with vLLM's layers, each parameter NaN, has vLLM load the folder, strictly, and
#: holds every parameter to the bits of the tensors that it is made of.
SCRIPT = """
import glob, os
os.environ |= {{"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}}
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w8a8_fp8 as w8a8, compressed_tensors_w8a16_fp8 as w8a16)
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

class NoKernel:  # To multiply with, which some recipes lack without a GPU.
    def input_quant_key(self):
        return None

def with_or_without_kernel(module, name):
    choose = getattr(module, name)
    def chosen(**options):
        try:
            return choose(**options)
        except ValueError:
            return NoKernel()
    setattr(module, name, chosen)

with_or_without_kernel(fp8, "init_fp8_linear_kernel")
with_or_without_kernel(w8a8, "init_fp8_linear_kernel")
with_or_without_kernel(w8a16, "init_wfp8_a16_linear_kernel")
config = EngineArgs(
    model={folder!r}, dtype="bfloat16", max_model_len=64, enforce_eager=True,
    skip_tokenizer_init=True,
).create_engine_config()
assert config.model_config.quantization == {format!r}, config.model_config.quantization
init_distributed_environment(1, 0, "file://" + {meeting!r}, 0, backend="gloo")
with set_current_vllm_config(config):
    initialize_model_parallel(1, 1)
    with set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(vllm_config=config)
    # But for the scales of a cache in FP8, which vLLM has itself.
    parameters = {{n: p for n, p in model.named_parameters() if ".self_attn.attn." not in n}}
    for p in parameters.values():
        p.data.view(torch.uint8).fill_(0x7F) if p.element_size() == 1 else p.data.fill_(torch.nan)
    loader = get_model_loader(config.load_config)
    loader.enable_weights_track = True
    loader.load_weights(model, config.model_config)

stored = {{}}
for file in glob.glob({folder!r} + "/*.safetensors"):
    stored |= load_file(file)
together = {{"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}}
for name, p in parameters.items():
    fused = [f for f in together if f in name]
    parts = [name.replace(fused[0], one) for one in together[fused[0]]] if fused else [name]
    tensors = [stored.pop(part) for part in parts]
    tensors = [t.reshape(1) if t.numel() == 1 else t for t in tensors]
    want = torch.cat(tensors)
    assert p.dtype == want.dtype and p.shape == want.shape, (name, p.shape, want.shape)
    assert torch.equal(p.data.view(torch.uint8), want.view(torch.uint8)), name
    assert not p.float().isnan().any(), name
assert not stored, stored.keys()
print(len(parameters), "parameters")
"""


def written(tmp_path, format, recipe, hidden=256):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=hidden,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
    ).to(torch.bfloat16)
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for index, (_, module) in enumerate(linear):  # So that each has a scale of its own.
        module.weight.data *= 1 + index
    model.save_pretrained(tmp_path / "src", max_shard_size="600KB")
    names = [name for name, _ in linear]
    amax = dict(zip(names, np.linspace(1, 9, len(names)), strict=True))
    options = {"format": format, "recipe": recipe}
    options["input_amax"] = amax if recipe == "static" else None
    quantize(tmp_path / "src", tmp_path / "dst", **options)
    folder, meeting = str(tmp_path / "dst"), str(tmp_path / "meeting")
    return SCRIPT.format(folder=folder, meeting=meeting, format=format)


@pytest.mark.parametrize("format, recipe", CASES)
def test_loaded_bit_for_bit(tmp_path, format, recipe):
    script = written(tmp_path, format, recipe)
    assert int(run_script(script).split()[-2]) > 20


@pytest.mark.parametrize("format", ["fp8", "compressed-tensors"])
def test_partial_blocks_are_refused(tmp_path, format):
    """As quantize says in a warning: q has 192 rows, and k follows."""
    with pytest.warns(UserWarning, match="vLLM refuses blocks that are partial"):
        script = written(tmp_path, format, "blockwise", hidden=192)
    with pytest.raises(AssertionError, match="not divisible|exceeds dimension size"):
        run_script(script)
