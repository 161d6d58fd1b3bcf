"""Checkpoints of every format, read right; and what is asked for, done."""

import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import run_script, with_flags
from checkpoint_cases import (
    CASES,
    COLUMNS,
    DEEPSEEK,
    DYNAMIC,
    NAMES,
    ROWS,
    TOKEN,
    WIDE,
    Case,
    assert_read,
    compressed,
    tensors_of,
    torchao,
    write,
)

import jax_fp8
from jax_fp8 import checkpoint
from jax_fp8._src import scaled_array

pytest.importorskip("safetensors")


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_every_format(tmp_path, rng, name, files):
    case = CASES[name]
    stored, wanted = tensors_of(case, rng)
    write(tmp_path, stored, case.quantization, files=files, separate=case.separate)
    found = checkpoint.load(tmp_path)
    assert_read(found, wanted)
    weights = [found.tensors[f"{name}.weight"] for name in NAMES]
    assert {w.granularity for w in weights} == {case.granularity}
    for weight in weights:
        scaled_array.check_scaled_array("test", "weight", weight)
    assert found.activations == {f"{name}.weight": case.activation for name in NAMES}
    assert found.format == case.quantization.get("quant_method", "modelopt")
    assert found.config["hidden_size"] == COLUMNS


def test_the_values_are_data_times_scale(tmp_path, rng):
    """In numpy, from the bytes of the file: 2 ** (code - 127) for each block of 128 x 128."""
    case = CASES["fp8-block-u8"]
    stored, _ = tensors_of(case, rng)
    found = checkpoint.load(write(tmp_path, stored, case.quantization))
    name = NAMES[0]
    scale = np.exp2(stored[f"{name}.weight_scale_inv"].astype(np.float64) - 127)
    scale = np.kron(scale, np.ones((128, 128)))[:ROWS, :COLUMNS]
    want = stored[f"{name}.weight"].astype(np.float64) * scale
    np.testing.assert_array_equal(
        jax_fp8.dequantize(found.tensors[f"{name}.weight"]), want.astype(np.float32)
    )


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize(
    "kwargs, activation",
    [
        (None, WIDE),
        ({"granularity": {"_type": "PerRow", "_data": {"dim": -1}}}, TOKEN),
        (
            {
                "float8_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
                "granularity": {"_type": "PerTensor", "_data": {}},
                "hp_value_lb": None,
                "hp_value_ub": 12,
            },
            checkpoint.Activation(DYNAMIC.operand, 12.0),
        ),
    ],
    ids=["weight-only", "row", "tensor"],
)
def test_torchao(tmp_path, rng, kwargs, activation, files):
    row = activation.bound is None
    if kwargs is not None:
        kwargs = {"_type": "QuantizeTensorToFloat8Kwargs", "_data": kwargs}
    stored, metadata, wanted = torchao(rng, kwargs, row)
    write(tmp_path, stored, {"quant_method": "torchao"}, metadata=metadata, files=files)
    found = checkpoint.load(tmp_path)
    assert_read(found, wanted)
    assert found.tensors[f"{NAMES[0]}.weight"].granularity == ("row" if row else "tensor")
    assert found.activations == {f"{name}.weight": activation for name in NAMES}
    assert found.format == "torchao"


@pytest.mark.parametrize("files", [1, 2])
def test_a_checkpoint_without_fp8(tmp_path, rng, files):
    dtypes = (ref.F32, ref.BF16, ref.F16, np.int8, np.uint8, np.int16, np.uint32, np.bool_)
    stored = {
        f"tensor.{i}": rng.integers(0, 2, (3, i)).astype(dtype) for i, dtype in enumerate(dtypes)
    }
    stored["logit_scale"] = np.array(2.5, ref.F32)
    found = checkpoint.load(write(tmp_path, stored, files=files))
    assert_read(found, stored)
    assert (found.format, found.activations) == (None, {})


def test_64_bits_are_narrowed_where_that_changes_nothing(tmp_path):
    folder = write(tmp_path, {"ids": np.arange(5), "x": np.array([0.5, np.nan])})
    found = checkpoint.load(folder).tensors
    assert (found["ids"].dtype, found["x"].dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(found["ids"], np.arange(5))
    with jax.enable_x64(True):
        assert checkpoint.load(folder).tensors["ids"].dtype == jnp.int64
    for value in (np.array([2**31]), np.array([0.1]), np.array([1e300])):
        with pytest.raises(ValueError, match=r"'big' \(.*model.safetensors\) has values that"):
            checkpoint.load(write(tmp_path, {"big": value}))


def test_files_may_be_links_into_a_store(tmp_path, rng):
    """As the cache of huggingface_hub has them."""
    stored, wanted = tensors_of(CASES["fp8-block"], rng)
    folder = write(tmp_path / "snapshot", stored, DEEPSEEK, files=2)
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "blobs" / str(i))
        file.symlink_to(pathlib.Path("..") / "blobs" / str(i))
    assert_read(checkpoint.load(str(folder)), wanted)


def test_what_is_ignored_is_left_out(tmp_path, rng):
    case = CASES["fp8-dynamic"]
    stored, wanted = tensors_of(case, rng)
    stored[f"{NAMES[0]}.k_scale"] = np.ones((), ref.F32)
    stored["odd.table"] = np.ones(3, np.complex64)
    folder = write(tmp_path, stored, case.quantization)
    with pytest.raises(ValueError, match="belong to no FP8 weight: .*q_proj.k_scale.*ignore="):
        checkpoint.load(folder)
    with pytest.raises(
        NotImplementedError, match=r"load: tensor 'odd.table' \(C64\[3\], .*F8_E4M3"
    ):
        checkpoint.load(folder, ignore=["*.k_scale"])
    assert_read(checkpoint.load(folder, ignore=["*.k_scale", "odd.*"]), wanted)
    with pytest.raises(TypeError, match="ignore must be a list of patterns, got the string"):
        checkpoint.load(folder, ignore="*.k_scale")


def test_the_progress_bar_ends_full(tmp_path, rng, capsys):
    pytest.importorskip("tqdm")
    stored, _ = tensors_of(CASES["fp8-static"], rng)
    checkpoint.load(write(tmp_path, stored, CASES["fp8-static"].quantization), progress=True)
    assert "load: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["safetensors", "tqdm"])
def test_what_is_not_installed_is_named(tmp_path, rng, monkeypatch, module):
    folder = write(tmp_path, {"x": np.ones(3, ref.F32)})
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=rf"load: .* needs {module}, .*jax-fp8\[checkpoint\]"):
        checkpoint.load(folder, progress=True)


# --- compressed-tensors' groups -------------------------------------------------------------------


def grouped(groups, ignore=()):
    """Weights with a scale for each row under the first group, for each tensor under the second."""
    kinds = [{"num_bits": 8, "type": "float", "strategy": s} for s in ("channel", "tensor")]
    named = {
        f"group_{i}": {"targets": targets, "weights": kind}
        for i, (targets, kind) in enumerate(zip(groups, kinds, strict=False))
    }
    return compressed(None, None, config_groups=named, ignore=list(ignore))


@pytest.mark.parametrize(
    "groups, first, second",
    [
        (([NAMES[0]], ["Linear"]), "row", "tensor"),
        (([r"re:.*self_attn\..*"], ["Linear"]), "row", "tensor"),
        ((["Linear"], [r"re:.*mlp\.down_proj$"]), "row", "tensor"),
        (([r"re:model.*"], [NAMES[1]]), "row", "tensor"),
        ((["Linear"],), "row", "row"),
    ],
)
def test_a_name_goes_before_a_pattern_and_that_before_a_class(tmp_path, rng, groups, first, second):
    stored = {}
    for name, granularity in zip(NAMES, (first, second), strict=True):
        stored[f"{name}.weight"] = ref.random_codes(rng, (4, 6), ref.E4M3)
        shape = (4, 1) if granularity == "row" else (1,)
        stored[f"{name}.weight_scale"] = np.ones(shape, ref.F32)
    found = checkpoint.load(write(tmp_path, stored, grouped(groups)))
    got = [found.tensors[f"{name}.weight"].granularity for name in NAMES]
    assert got == [first, second]


@pytest.mark.parametrize(
    "groups, ignore, message",
    [
        ((["Linear"],), [NAMES[0]], "says that it is not quantized"),
        ((["Linear"],), [r"re:.*q_proj"], "says that it is not quantized"),
        ((["Embedding"],), [], "says that it is not quantized"),
        ((["re:.*q_proj"], ["re:.*self_attn.*"]), [], r"is in .*group_0 and in .*group_1"),
        ((["re:(a"],), [], "no regular expression"),
        ((["re:(?!lm_head).*"],), [], r"not supported, as RE2 .*\(\?!"),
    ],
)
def test_groups_that_do_not_say_what_a_weight_is(tmp_path, rng, groups, ignore, message):
    stored = {
        f"{NAMES[0]}.weight": ref.random_codes(rng, (4, 6), ref.E4M3),
        f"{NAMES[0]}.weight_scale": np.ones((4, 1), ref.F32),
    }
    folder = write(tmp_path, stored, grouped(groups, ignore))
    with pytest.raises((ValueError, NotImplementedError), match=message):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "key", [NAMES[0], "self_attn", "model.layers.0", "q_proj", "*.q_proj", "*self_attn*", "q_*"]
)
@pytest.mark.parametrize(
    "name, field", [("fp8-dynamic", "ignored_layers"), ("fbgemm", "modules_to_not_convert")]
)
def test_fp8_in_an_ignored_module_raises(tmp_path, rng, name, field, key):
    stored, _ = tensors_of(CASES[name], rng)
    folder = write(tmp_path, stored, CASES[name].quantization | {field: [key]})
    if key == "self_attn":  # Neither how a name begins nor how it ends.
        checkpoint.load(folder)
        return
    with pytest.raises(ValueError, match="_proj.weight' .* is FP8, and quantization_config says"):
        checkpoint.load(folder)


def test_a_module_is_ignored_by_its_whole_name(tmp_path, rng):
    """mlp.gate is not mlp.gate_proj, and layers.1 is not layers.10."""
    name, case = "model.layers.10.mlp.gate_proj", CASES["fp8-dynamic"]
    stored = {f"{name}.weight": ref.random_codes(rng, (4, 6), ref.E4M3)}
    stored[f"{name}.weight_scale"] = np.ones((), ref.F32)
    ignored = ["model.layers.10.mlp.gate", "model.layers.1", "proj"]
    folder = write(tmp_path, stored, case.quantization | {"ignored_layers": ignored})
    assert f"{name}.weight" in checkpoint.load(folder).activations


# --- Where it goes --------------------------------------------------------------------------------


def test_a_device(tmp_path, rng):
    stored, wanted = tensors_of(CASES["fp8-static"], rng)
    folder = write(tmp_path, stored, CASES["fp8-static"].quantization)
    device = jax.devices("cpu")[-1]
    for sharding in (
        device,
        jax.sharding.SingleDeviceSharding(device),
        lambda name, shape: device if len(shape) == 2 else None,
    ):
        found = checkpoint.load(folder, sharding=sharding)
        assert_read(found, wanted)
        assert found.tensors[f"{NAMES[0]}.weight"].data.devices() == {device}
    with pytest.raises(TypeError, match="sharding of '.*' must be a device, .* got a str"):
        checkpoint.load(folder, sharding="cpu")


def test_the_arrays_are_no_views_of_the_file(tmp_path):
    """What a CPU device may use in place is a copy, so the file may change."""
    stored = {"x": np.ones((64, 1024), ref.F32)}
    found = checkpoint.load(write(tmp_path, stored)).tensors["x"]
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    np.testing.assert_array_equal(found, stored["x"])


def in_a_process(script, **environment):
    here = str(pathlib.Path(__file__).parent)
    code = f"import sys; sys.path.append({here!r})\n" + inspect.cleandoc(script)
    return run_script(code, JAX_PLATFORMS="cpu", **environment)


def test_a_mesh(tmp_path, rng):
    """Scales are sharded along the axes they have, and whole where they have them not."""
    for name in ("fp8-block", "fbgemm", "fp8-static"):
        stored, _ = tensors_of(CASES[name], rng)
        write(tmp_path / name, stored, CASES[name].quantization)
    in_a_process(
        f"""
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from jax_fp8 import checkpoint
        import references as ref

        mesh = jax.make_mesh((4, 2), ("a", "b"))
        matrix, whole = NamedSharding(mesh, P("a", "b")), NamedSharding(mesh, P())
        for name, scale_spec in (
            ("fp8-block", P(None, None)), ("fbgemm", P("a", None)), ("fp8-static", P(None, None))
        ):
            folder = {str(tmp_path)!r} + "/" + name
            one = checkpoint.load(folder).tensors
            place = lambda name, shape: matrix if len(shape) == 2 and shape[0] else whole
            tensors = checkpoint.load(folder, sharding=place).tensors
            weight = tensors["{NAMES[0]}.weight"]
            assert weight.data.sharding.spec == P("a", "b"), weight.data.sharding
            assert weight.data.addressable_shards[0].data.shape == ({ROWS // 4}, {COLUMNS // 2})
            assert weight.scale.sharding.is_equivalent_to(NamedSharding(mesh, scale_spec), 2)
            assert len(weight.scale.devices()) == 8
            jax.tree.map(lambda a, b: ref.assert_same_bits(a, b), tensors, one)
        for place, message in (
            (lambda name, shape: NamedSharding(mesh, P(None, None, "a")), "has more axes than its"),
            (lambda name, shape: NamedSharding(mesh, P(*[None] * (len(shape) - 1), ("a", "b")))
             if name == "model.empty" else whole, "'model.empty' does not fit: "),
        ):
            try:
                checkpoint.load(folder, sharding=place)
            except ValueError as error:
                assert "load: the sharding of" in str(error) and message in str(error), error
            else:
                raise AssertionError("a sharding that does not fit was taken")
        """,
        XLA_FLAGS=with_flags("--xla_force_host_platform_device_count=8"),
    )


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    """16 files of three tensors of 2 MiB: beyond the arrays themselves, less than a file and one.

    The map and the copy of a tensor are 4 MiB, and JAX may still be letting the copy before go.
    """
    mib = 2**20
    stored = {f"x{i}": np.full((2 * mib,), i % 128, np.uint8) for i in range(48)}
    write(tmp_path, stored, files=16)
    in_a_process(
        f"""
        import resource, jax, numpy as np
        from jax_fp8 import checkpoint

        def resident():
            pages = int(open("/proc/self/statm").read().split()[1])
            return pages * resource.getpagesize()

        peak, put = 0, jax.device_put
        def watched(array, *where):
            global peak
            peak = max(peak, resident() - start - held)
            held_now = put(array, *where)
            count(array.nbytes)
            return held_now
        def count(nbytes):
            global held
            held += nbytes
        checkpoint.load({str(tmp_path)!r}, ignore=["x[1-9]*"])  # What loading takes once.
        start, held = resident(), 0
        jax.device_put = watched
        tensors = checkpoint.load({str(tmp_path)!r}).tensors
        assert len(tensors) == 48 and held == 96 * {mib}, held
        assert peak < 8 * {mib}, peak / {mib}
        """
    )


def test_the_configuration_comes_back(tmp_path):
    folder = write(tmp_path, {"x": np.ones(3, ref.F32)})
    assert checkpoint.load(folder).config == json.loads((folder / "config.json").read_text())


def test_an_old_configuration_is_called_compression_config(tmp_path, rng):
    case: Case = CASES["ct-channel"]
    stored, wanted = tensors_of(case, rng)
    folder = write(tmp_path, stored)
    (folder / "config.json").write_text(json.dumps({"compression_config": case.quantization}))
    assert_read(checkpoint.load(folder), wanted)
    both = {"compression_config": case.quantization, "quantization_config": DEEPSEEK}
    (folder / "config.json").write_text(json.dumps(both))
    with pytest.raises(ValueError, match="quantization_config and compression_config differ"):
        checkpoint.load(folder)
