"""Files that are broken or lie: an error of a declared kind, or the right tensors; nothing else."""

import json
import time

import numpy as np
import pytest
import references as ref
from checkpoint_cases import (
    CASES,
    DECLARED,
    NAMES,
    args,
    compressed,
    refuses,
    tensors_of,
    torchao,
    write,
    write_index,
)

import jax_fp8
from jax_fp8 import checkpoint

pytest.importorskip("safetensors")

INDEX = "model.safetensors.index.json"


# --- Files ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, rng):
    stored, _ = tensors_of(CASES["fp8-block"], rng)
    return write(tmp_path / "good", stored, CASES["fp8-block"].quantization, files=3)


def weight_map(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_what_is_missing(folder, tmp_path):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.rename(tmp_path / shard.name)
    refuses(folder, FileNotFoundError, f"{shard.name} is missing")
    (folder / "config.json").unlink()
    refuses(folder, FileNotFoundError, "config.json is missing")
    refuses(folder / "nowhere", FileNotFoundError, "nowhere is no folder")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_nothing_is_unpickled(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    refuses(tmp_path, FileNotFoundError, "has neither model.safetensors nor .*index.json$")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refuses(tmp_path, FileNotFoundError, f"nothing is unpickled, so {name} cannot be read")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / name).read_bytes())
    refuses(tmp_path, ValueError, "is no safetensors file")


def test_an_index_that_lies(folder):
    good = weight_map(folder)
    name, *others = good
    other = next(file for file in good.values() if file != good[name])
    for changed, message in (
        (good | {"ghost": good[name]}, r"do not hold ghost \(in "),
        (good | {name: other}, f"do not hold {name} "),
        ({key: good[key] for key in others}, f"does not list '{name}'"),
        (good | {name: "../" + good[name]}, "must be in a .safetensors file of the same folder"),
        (good | {name: "/etc/passwd"}, "of the same folder, got '/etc/passwd'"),
        (good | {name: "..\\x.safetensors"}, "of the same folder"),
        (good | {name: "pytorch_model.bin"}, "must be in a .safetensors file"),
        (good | {name: 3}, "must be in a .safetensors file"),
        ([], "weight_map must be an object"),
        (None, "weight_map is missing"),
    ):
        write_index(folder, changed)
        refuses(folder, ValueError, message)


def test_a_tensor_in_two_files(folder):
    first, second, _ = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    refuses(folder, ValueError, f"is in {first.name} and in {second.name}")


def test_a_file_beside_the_index(folder):
    first = min(folder.glob("*.safetensors"))
    (folder / "model.safetensors").write_bytes(first.read_bytes())
    refuses(folder, ValueError, "has both model.safetensors and an index without it")


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "not valid JSON"),
        (b"[]", "must hold a JSON object, got list"),
        (b'{"a": 1, "a": 1}', "the key 'a' appears twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", INDEX, "hf_quant_config.json"])
def test_broken_json(folder, file, text, message):
    (folder / file).write_bytes(text)
    refuses(folder, ValueError, f"{file}.*{message}")


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        raw({}, length=2**63),
        raw({}, length=10**8 + 1),
        raw(b"{" * 1000),
        raw([]),
        raw({"x": entry()}),
        raw({"x": entry()}, bytes(7)),
        raw({"x": entry()}, bytes(9)),
        raw({"x": entry(offsets=(0, 4))}, bytes(8)),
        raw({"x": entry(offsets=(8, 0))}, bytes(8)),
        raw({"x": entry(offsets=(-8, 0))}, bytes(8)),
        raw({"x": entry(offsets=(2**64 - 8, 2**64))}, bytes(8)),
        raw({"x": entry(offsets=(8, 16))}, bytes(16)),
        raw({"x": entry(), "y": entry()}, bytes(8)),
        raw({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)),
        raw({"x": entry(shape=(2**32, 2**32))}, bytes(8)),
        raw({"x": entry(shape=(-2,))}, bytes(8)),
        raw({"x": entry(shape=(2.0,))}, bytes(8)),
        raw({"x": entry("F33")}, bytes(8)),
        raw({"x": entry("F4", (16,))}, bytes(8)),
        raw({"x": entry("C64", (1,))}, bytes(8)),
        raw({"x": entry("F8_E4M3FNUZ", (8,))}, bytes(8)),
        raw({"x": entry(shape=(2**63, 0), offsets=(0, 0))}),
        raw({"x": entry(shape=(1,) * 65, offsets=(0, 4))}, bytes(4)),
        raw(
            b'{"x":' + json.dumps(entry()).encode() + b',"x":' + json.dumps(entry()).encode() + b"}"
        ),
        raw({"__metadata__": {"a": 1}, "x": entry()}, bytes(8)),
    ],
)
def test_headers_that_lie(tmp_path, content):
    write(tmp_path, {"x": np.ones(2, ref.F32)})
    (tmp_path / "model.safetensors").write_bytes(content)
    refuses(tmp_path, DECLARED, "")


# --- What only costs time or memory ---------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["(a|aa)" * 60 + "b", ".*.*.*.*.*.*b", "(a+)+b", "(a?){30}a{30}b"]
)
def test_a_pattern_that_would_take_forever(tmp_path, pattern):
    name = "a" * 3000
    stored = {f"{name}.weight": np.ones((4, 6), ref.E4M3), f"{name}.weight_scale": np.ones((4, 1))}
    stored[f"{name}.weight_scale"] = stored[f"{name}.weight_scale"].astype(ref.F32)
    group = {"targets": ["Linear"], "weights": args("channel")}
    write(
        tmp_path,
        stored,
        compressed(None, None, config_groups={"g": group}, ignore=[f"re:{pattern}"]),
    )
    start = time.perf_counter()
    found = checkpoint.load(tmp_path)
    assert time.perf_counter() - start < 5
    assert found.tensors[f"{name}.weight"].granularity == "row"


@pytest.mark.parametrize("rows", [128 * 2**20, 128 * 2**60, 128 * 10**400], ids=["20", "60", "400"])
def test_a_block_that_is_larger_than_any_weight(tmp_path, rows):
    """Its scale is that of all rows, and takes no more memory than these need."""
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [rows, 128]}
    stored = {"x.weight": np.ones((256, 256), ref.E4M3)}
    stored["x.weight_scale_inv"] = np.array([[2, 4]], ref.F32)
    found = checkpoint.load(write(tmp_path / "one", stored, quantization)).tensors["x.weight"]
    np.testing.assert_array_equal(found.scale, [[2, 4], [2, 4]])
    stored["x.weight_scale_inv"] = np.ones((0, 2), ref.F32)
    refuses(write(tmp_path / "none", stored, quantization), ValueError, "weight_scale_inv")


# --- Everything at random -------------------------------------------------------------------------


BYTES = b'0123456789-"{}[],:eE.\\ \0\xff'
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2**64,
    1e300,
    "",
    "x",
    "F32",
    "fp8",
    "tensor",
    [],
    [1],
    [128, 128],
    {},
]


def pick(rng, values):
    return values[int(rng.integers(len(values)))]


def damaged_text(rng, content):
    """Flips, overwrites, removes or repeats a few bytes, or cuts off the rest."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, some = int(rng.integers(len(content) + 1)), int(rng.integers(1, 9))
        kind = rng.integers(4) if at < len(content) else 3
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[at] = pick(rng, BYTES)
        elif kind == 2:
            content[at:at] = content[at : at + some]
        else:
            del content[at : None if some == 8 else at + some]
    return bytes(content)


def damaged_values(rng, content):
    """The same JSON with another value, name or key somewhere."""
    tree = json.loads(content)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(tree)
    node, key = pick(rng, places)
    other, value = pick(rng, places)
    kind = rng.integers(4)
    if kind == 0:
        del node[key]
    elif kind == 1:
        node[key] = pick(rng, VALUES)
    elif kind == 2:
        node[key] = other[value]
    elif isinstance(node, dict):
        node[pick(rng, ["x", "ignore", "dtype", f"{NAMES[0]}.weight"])] = node.pop(key)
    try:
        return json.dumps(tree).encode()
    except ValueError:  # What is now in itself.
        return content


def damage(rng, content):
    """Damages a file; of one with tensors, all but these, which no format protects."""
    if content[:1] == b"{":
        return pick(rng, [damaged_text, damaged_values])(rng, content)
    end = 8 + int.from_bytes(content[:8], "little")
    if rng.integers(2):
        return damaged_text(rng, content[:end]) + content[end:]
    header = damaged_values(rng, content[8:end])
    return raw(header, content[end:])


@pytest.mark.parametrize("name", ["ct-static", "fp8-block-e8m0", "modelopt", "fbgemm", "torchao"])
def test_random_damage(tmp_path, name):
    rng = np.random.default_rng(len(name))
    if name == "torchao":
        stored, metadata, wanted = torchao(rng)
        write(tmp_path, stored, {"quant_method": "torchao"}, metadata=metadata, files=2)
    else:
        case = CASES[name]
        stored, wanted = tensors_of(case, rng)
        write(tmp_path, stored, case.quantization, files=2, separate=case.separate)
    files = {file: file.read_bytes() for file in sorted(tmp_path.iterdir())}
    refused = 0
    for _ in range(200):
        file = list(files)[int(rng.integers(len(files)))]
        content = files[file]
        file.write_bytes(damage(rng, content))
        try:
            found = checkpoint.load(tmp_path)
        except DECLARED:
            refused += 1
        else:
            assert_as_stored(found, wanted)
        file.write_bytes(content)
    assert refused > 100


def assert_as_stored(found, wanted):
    """What was not refused: a name may be another now, but not what it names.

    Of a wide tensor that is its bytes: no format protects what the header says of them.
    """

    def parts(tensor):
        if isinstance(tensor, jax_fp8.ScaledArray):
            tensor = tensor.data, tensor.scale
        if not isinstance(tensor, tuple):
            return np.asarray(tensor).tobytes()
        return tuple((part.dtype, part.size, np.asarray(part).tobytes()) for part in tensor)

    known = {parts(tensor) for tensor in wanted.values()}
    assert len(found.tensors) == len(wanted)
    for name, tensor in found.tensors.items():
        assert parts(tensor) in known, name
