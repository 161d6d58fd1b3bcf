import json
import os
import weakref

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references as ref

pytest.importorskip("safetensors")

import safetensors.numpy
from checkpoint_write_cases import (
    AMAX,
    CASES,
    LINEAR,
    SHARDS,
    amax_for,
    read,
    tensors,
    write_source,
)
from safetensors.numpy import save_file

import jax_fp8
from jax_fp8._src.checkpoint import plan, target, write
from jax_fp8._src.checkpoint.files import open_folder
from jax_fp8._src.checkpoint.write import quantize
from jax_fp8._src.recipe import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore:quantize.*transformers")


@pytest.fixture
def source(tmp_path, rng):
    return write_source(tmp_path / "src", tensors(rng))


@pytest.mark.parametrize("format, recipe", CASES)
def test_weights_have_the_bits_of_quantize_and_the_rest_is_kept(source, tmp_path, format, recipe):
    quantize(source, tmp_path / "dst", format=format, recipe=recipe, input_amax=amax_for(recipe))
    before, after = read(source), read(tmp_path / "dst")
    granularity = RECIPES[recipe].weight.granularity
    scale_name = "weight_scale_inv" if (format, recipe) == ("fp8", "blockwise") else "weight_scale"
    scalar = () if format == "fp8" else (1,)
    for module in LINEAR:
        wide = before.pop(f"{module}.weight")
        want = jax_fp8.quantize(jnp.asarray(wide), granularity=granularity)
        data, scale = after.pop(f"{module}.weight"), after.pop(f"{module}.{scale_name}")
        assert data.dtype == ml_dtypes.float8_e4m3fn and scale.dtype == np.float32
        np.testing.assert_array_equal(data.view(np.uint8), np.asarray(want.data).view(np.uint8))
        assert scale.shape == (scalar if granularity == "tensor" else want.scale.shape)
        np.testing.assert_array_equal(scale.reshape(want.scale.shape), want.scale)
        if recipe == "static":
            input_scale = after.pop(f"{module}.input_scale")
            assert input_scale.shape == scalar
            np.testing.assert_array_equal(
                input_scale.reshape(()), jnp.float32(AMAX[module]) / jnp.float32(448)
            )
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        np.testing.assert_array_equal(array, after[name])


@pytest.mark.parametrize("format, recipe", CASES)
def test_values_are_within_half_a_step(source, tmp_path, format, recipe):
    quantize(source, tmp_path / "dst", format=format, recipe=recipe, input_amax=amax_for(recipe))
    before, after = read(source), read(tmp_path / "dst")
    for module, shape in LINEAR.items():
        (scale,) = (after[k] for k in after if k.startswith(f"{module}.weight_scale"))
        if scale.ndim == 2 and scale.shape[1] > 1:
            scale = scale.repeat(128, 0)[: shape[0]].repeat(128, 1)[:, : shape[1]]
        wide = before[f"{module}.weight"].astype(np.float64)
        error = np.abs(after[f"{module}.weight"].astype(np.float64) * scale - wide)
        # Half a unit of 3 mantissa bits, or half the smallest number; and the rounding of 1 / scale
        assert (error <= np.maximum(np.abs(wide) * 2**-4, scale * 2**-10) * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_wide_dtypes(tmp_path, rng, dtype):
    source = write_source(tmp_path / "src", tensors(rng, dtype))
    quantize(source, tmp_path / "dst", format="compressed-tensors", recipe="rowwise")
    after = read(tmp_path / "dst")
    assert after["model.layers.1.down_proj.weight"].dtype == ml_dtypes.float8_e4m3fn
    assert after["lm_head.weight"].dtype == dtype


def test_the_folder_around_the_tensors(source, tmp_path):
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling": 1}')
    (source / ".cache").mkdir()
    (source / ".cache" / "x.json").write_text("{}")
    quantize(source, tmp_path / "dst", format="fp8", recipe="blockwise")
    names = {str(p.relative_to(tmp_path / "dst")) for p in (tmp_path / "dst").rglob("*.*")}
    others = {"config.json", "model.safetensors.index.json", "tokenizer.json"}
    assert names == {*SHARDS, *others, "1_Pooling/config.json"}
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    after = read(tmp_path / "dst")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in after.values())
    assert index["weight_map"]["model.layers.1.down_proj.weight_scale_inv"] == SHARDS[1]
    assert open_folder(tmp_path / "dst").metadata[SHARDS[0]] == {"format": "pt"}
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    ignored = ["lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"]
    assert config == {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "ignored_layers": ignored,
            "modules_to_not_convert": ignored,
        },
    }


def test_a_file_that_is_too_large_becomes_several(source, tmp_path, rng, monkeypatch):
    """Which hold the same tensors, whether it was one file or two."""
    one = tmp_path / "one"
    one.mkdir()
    save_file({k: v for part in tensors(rng) for k, v in part.items()}, one / "model.safetensors")
    (one / "config.json").write_text("{}")
    for folder in (source, one):
        whole, parts = tmp_path / f"{folder.name}-whole", tmp_path / f"{folder.name}-parts"
        quantize(folder, whole, format="compressed-tensors", recipe="rowwise")
        with monkeypatch.context() as patch:
            patch.setattr(plan, "MOST_BYTES", 100_000)
            quantize(folder, parts, format="compressed-tensors", recipe="rowwise")
        files = sorted(file.name for file in parts.glob("*.safetensors"))
        assert files == [
            f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
        ]
        assert len(files) > len(list(whole.glob("*.safetensors")))
        sizes = dict.fromkeys(files, 0)
        for stored in open_folder(parts).tensors.values():
            sizes[stored.file.name] += stored.nbytes
        assert min(sizes.values()) > 0 and max(sizes.values()) <= 100_000
        got, want = read(parts), read(whole)
        assert got.keys() == want.keys()
        for name, array in want.items():
            ref.assert_same_bits(got[name], array)


def test_one_file_gets_no_index(tmp_path, rng):
    source = tmp_path / "src"
    source.mkdir()
    save_file(tensors(rng)[0], source / "model.safetensors")
    (source / "config.json").write_text("{}")
    quantize(source, tmp_path / "dst", format="compressed-tensors", recipe="weight_only")
    assert {p.name for p in (tmp_path / "dst").iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize(
    "recipe, weights, inputs",
    [
        ("tensorwise", {"strategy": "tensor"}, {"strategy": "tensor", "dynamic": True}),
        ("rowwise", {"strategy": "channel"}, {"strategy": "token", "dynamic": True}),
        (
            "blockwise",
            {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "group_size": 128, "dynamic": True},
        ),
        ("static", {"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}),
        ("weight_only", {"strategy": "channel"}, None),
    ],
)
def test_what_compressed_tensors_is_told(source, tmp_path, recipe, weights, inputs):
    dst = tmp_path / "dst"
    quantize(source, dst, format="compressed-tensors", recipe=recipe, input_amax=amax_for(recipe))
    found = json.loads((dst / "config.json").read_text())["quantization_config"]
    (group,) = found["config_groups"].values()
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {**common, "dynamic": False, **weights}
    assert group["input_activations"] == (inputs and {**common, **inputs})


@pytest.mark.parametrize("format, recipe", CASES)
def test_our_reader_reads_it(source, tmp_path, format, recipe):
    checkpoint = pytest.importorskip("jax_fp8.checkpoint")
    dst = tmp_path / "dst"
    quantize(source, dst, format=format, recipe=recipe, input_amax=amax_for(recipe))
    found, want = checkpoint.load(dst), RECIPES[recipe]
    assert found.format == format
    assert found.activations.keys() == {f"{module}.weight" for module in LINEAR}
    before = read(source)
    for name, activation in found.activations.items():
        same = jax_fp8.quantize(jnp.asarray(before[name]), granularity=want.weight.granularity)
        assert found.tensors[name].granularity == want.weight.granularity
        np.testing.assert_array_equal(
            jax_fp8.dequantize(found.tensors[name]), jax_fp8.dequantize(same)
        )
        assert activation.operand == want.activation


def test_patterns_leave_layers_wide(source, tmp_path):
    dst = tmp_path / "dst"
    quantize(source, dst, format="fp8", recipe="blockwise", ignore=["*.down_proj"])
    after = read(dst)
    assert after["model.layers.1.down_proj.weight"].dtype == ml_dtypes.bfloat16
    assert after["model.layers.0.q_proj.weight"].dtype == ml_dtypes.float8_e4m3fn
    config = json.loads((dst / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.down_proj" in config["ignored_layers"]


def test_a_tied_head_is_ignored_by_name(tmp_path, rng):
    first, second = tensors(rng)
    del second["lm_head.weight"]
    source = write_source(tmp_path / "src", (first, second))
    quantize(source, tmp_path / "dst", format="compressed-tensors", recipe="rowwise")
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert "lm_head" in config["quantization_config"]["ignore"]


@pytest.mark.parametrize("moment", ["in the first shard", "after the first", "before config.json"])
def test_a_run_that_was_cut_off_goes_on(source, tmp_path, monkeypatch, moment):
    how = {"format": "compressed-tensors", "recipe": "static", "input_amax": AMAX}
    quantize(source, tmp_path / "whole", **how)
    dst = tmp_path / "dst"
    cut_at, cut_before = {
        "in the first shard": (SHARDS[0], False),
        "after the first": (SHARDS[1], True),
        "before config.json": ("config.json", True),
    }[moment]
    replace, written = os.replace, []

    def cut(partial, path):
        if path.name == cut_at:
            raise KeyboardInterrupt
        replace(partial, path)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, dst, **how)
    with pytest.raises(FileNotFoundError, match="config.json"):
        open_folder(dst)
    assert (dst / SHARDS[0]).exists() == cut_before
    kept = {p.name: p.stat().st_mtime_ns for p in dst.glob("*.safetensors")}

    monkeypatch.setattr(os, "replace", replace)
    real = write._write_shard
    monkeypatch.setattr(write, "_write_shard", lambda *a: (written.append(a[-1].name), real(*a)))
    quantize(source, dst, **how)
    assert len(written) == 2 - len(kept)
    assert all((dst / name).stat().st_mtime_ns == time for name, time in kept.items())
    files = {p.name: p.read_bytes() for p in dst.iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}


@pytest.fixture
def unfinished(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(write, "_describe", lambda plan: (_ for _ in ()).throw(KeyboardInterrupt))
        quantize(source, tmp_path / "dst", format="compressed-tensors", recipe="rowwise")
    return tmp_path / "dst"


@pytest.mark.parametrize(
    "other",
    [{"recipe": "blockwise"}, {"format": "fp8", "recipe": "blockwise"}, {"ignore": ["*q_*"]}],
)
def test_an_unfinished_run_goes_on_only_as_it_was_started(source, unfinished, other):
    how = {"format": "compressed-tensors", "recipe": "rowwise"} | other
    with pytest.raises(FileExistsError, match=f"another {', '.join(other)}; finish"):
        quantize(source, unfinished, **how)


def test_an_unfinished_run_goes_on_only_from_the_same_source(source, unfinished):
    os.utime(source / SHARDS[0], (1, 1))
    with pytest.raises(FileExistsError, match="another source"):
        quantize(source, unfinished, format="compressed-tensors", recipe="rowwise")


def test_what_tells_of_an_unfinished_run_may_be_broken(source, unfinished):
    (unfinished / target.STATE).write_text("[]")
    with pytest.raises(FileExistsError, match="does not tell of an unfinished run"):
        quantize(source, unfinished, format="compressed-tensors", recipe="rowwise")


def test_a_folder_with_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="dst is not empty"):
        quantize(source, tmp_path / "dst", format="fp8", recipe="blockwise")
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["thesis.tex"]


def test_host_memory_holds_one_shard_of_the_result(source, tmp_path, monkeypatch):
    earlier, alive, mapped = [], [], []

    def observed(tensors, path, **kwargs):
        alive.append([name for name, array in earlier if array() is not None])
        mapped.append({name for name, array in tensors.items() if isinstance(array, np.memmap)})
        earlier.extend((name, weakref.ref(array)) for name, array in tensors.items())
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(safetensors.numpy, "save_file", observed)
    quantize(source, tmp_path / "dst", format="compressed-tensors", recipe="rowwise")
    assert alive == [[], []]
    wide = {n for n in read(source) if n.removesuffix(".weight") not in LINEAR}
    assert set().union(*mapped) == wide  # What stays wide is not copied at all.
