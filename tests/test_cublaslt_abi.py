"""ffi/cublaslt_abi.h against the real header, where one is installed."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess

import pytest

TESTS = pathlib.Path(__file__).parent
ABI = TESTS.parent / "ffi" / "cublaslt_abi.h"


def wheel_folders():
    """Folders of headers in the wheels of CUDA 13 and of CUDA 12."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    return [folder for root in roots for folder in sorted(pathlib.Path(root).glob("*/include"))]


def include_folders():
    """All folders that may hold the header of cublasLt, or one that it includes."""
    named = os.environ.get("JAX_FP8_CUBLASLT_INCLUDE")
    toolkits = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    toolkits = [pathlib.Path(root) / "include" for root in (*toolkits, "/usr/local/cuda") if root]
    folders = [*([pathlib.Path(named)] if named else []), *wheel_folders(), *toolkits]
    return [folder for folder in folders if folder.is_dir()]


def compile_against(folders, root=TESTS.parent):
    """Compiles the assertions with the header of ours that is in `root`."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    includes = [f"-I{folder}" for folder in (root, *folders)]
    source = str(TESTS / "cublaslt_abi.cc")
    return subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", *includes, source], capture_output=True, text=True
    )


@pytest.fixture
def folders():
    """Where the headers are; the first one has that of cublasLt."""
    if not ABI.exists():
        pytest.skip("the sources are not beside the tests")
    folders = include_folders()
    holders = [folder for folder in folders if (folder / "cublasLt.h").exists()]
    if not holders:
        pytest.skip(f"no cublasLt.h in {[str(folder) for folder in folders]}")
    rest = [folder for folder in folders if folder != holders[0]]
    if not any((folder / "driver_types.h").exists() for folder in folders):
        pytest.skip(f"no headers of the CUDA runtime beside {holders[0]}/cublasLt.h")
    return [holders[0], *rest]


def test_the_real_header_says_the_same(folders):
    done = compile_against(folders)
    assert done.returncode == 0, done.stderr


def test_every_wrong_value_is_found(folders, tmp_path):
    text = ABI.read_text()
    constant = re.compile(r"\b(k[A-Z]\w+) = (\d+)")
    names = [match[1] for match in constant.finditer(text)]
    assert len(names) > 30
    (tmp_path / "ffi").mkdir()
    (tmp_path / "ffi" / ABI.name).write_text(constant.sub(r"\1 = 1\2", text))
    done = compile_against(folders, tmp_path)
    assert done.returncode != 0
    assert [name for name in names if not re.search(rf"\b{name}\b", done.stderr)] == []
