"""Which cublasLt is taken: stand-ins of several versions, found on the library path."""

import pathlib
import re
import subprocess

import pytest
from cases import run_script

from jax_fp8._src import ffi

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def stand_in(tmp_path):
    """Builds a library that is found as cublasLt: of a version, and perhaps without a function."""
    if ffi._cublaslt_candidates():
        pytest.skip("a real cublasLt is installed, and comes first")

    def build(version, without=None):
        names = re.findall(r"\(\*(\w+)\)\(", (ROOT / "ffi" / "cublaslt_abi.h").read_text())
        assert "Matmul" in names and "GetVersion" in names
        source = [f"unsigned long cublasLtGetVersion(void) {{ return {version}; }}"]
        source += [
            f"int cublasLt{name}(void) {{ return 15; }}"
            for name in names
            if name not in ("GetVersion", without)
        ]
        (tmp_path / "cublaslt.c").write_text("\n".join(source))
        library = tmp_path / "libcublasLt.so.13"
        command = ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "cublaslt.c")]
        subprocess.run(command, check=True)
        return run_script(
            """
            from jax_fp8._src import ffi
            try:
                print(ffi.cublaslt_version())
            except RuntimeError as error:
                print(error)
            """,
            LD_LIBRARY_PATH=str(tmp_path),
        )

    return build


def test_an_old_cublaslt_is_refused_by_name(stand_in):
    assert re.search(r"cublasLt 12\.8\.3 is too old.* 12\.9\.1 or newer", stand_in(120803))


@pytest.mark.parametrize("version, name", [(120901, "12.9.1"), (131004, "13.10.4")])
def test_a_supported_cublaslt_is_taken(stand_in, version, name):
    assert stand_in(version).strip() == name


def test_a_cublaslt_that_lacks_a_function_is_refused(stand_in):
    printed = stand_in(130100, without="MatmulAlgoCheck")
    assert printed.strip() == "the loaded cublasLt lacks cublasLtMatmulAlgoCheck"
