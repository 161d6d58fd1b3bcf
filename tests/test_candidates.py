"""Which algorithms of cublasLt are candidates, and which wins: candidates.cc, compiled and run."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_candidates_and_races(tmp_path):
    if not (ROOT / "ffi" / "race.h").exists():
        pytest.skip("the sources are not beside the tests")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    sources = ["tests/candidates.cc", "ffi/cublaslt_candidates.cc", "ffi/cublaslt_library.cc"]
    program = str(tmp_path / "candidates")
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}", *sources]
    subprocess.run([*command, "-o", program, "-ldl"], check=True, cwd=ROOT)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
