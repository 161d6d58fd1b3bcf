"""`jax-fp8 info`: that it works where things are missing, and that it says what the code does."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jax_fp8
from jax_fp8.__main__ import main
from jax_fp8._src import scaled_matmul as scaled_matmul_module
from jax_fp8._src.info import choose, format_info, info


def product_implementations(granularity="tensor"):
    """What the journal says of one product that was left to the library."""
    x = jax_fp8.quantize(jnp.ones((16, 64)), granularity=granularity)
    w = jax_fp8.quantize(jnp.ones((32, 64)), granularity=granularity)
    jax.clear_caches()  # What is left to XLA is reported when it is traced.
    jax_fp8.clear_plans()
    jax_fp8.scaled_matmul(x, w).block_until_ready()
    ran = [plan for plan in jax_fp8.plans() if plan["operation"] == "scaled_matmul"]
    return {p["implementation"] for p in ran if p["when"] == "run"} or {
        p["implementation"] for p in ran
    }


def test_info_is_json_and_names_versions_and_this_machine():
    found = json.loads(json.dumps(info()))
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["jax-fp8"] == jax_fp8.__version__
    assert found["ffi_api"]["error"] is None
    assert [int(part) for part in found["ffi_api"]["compiled"].split(".")] >= [0, 3]
    assert len(found["devices"]) >= len(jax.local_devices())
    assert (found["cublaslt"]["version"] is None) != (found["cublaslt"]["error"] is None)


def test_what_it_says_of_the_first_device_is_what_runs_there():
    device = info()["devices"][0]
    assert product_implementations() == {device["scaled_matmul"]["implementation"]}


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_what_it_says_of_a_capability_is_what_the_handler_chooses(capability, monkeypatch):
    monkeypatch.setattr(scaled_matmul_module, "_forced_capability", capability)
    said = choose("cuda", capability)["scaled_matmul"]["implementation"]
    assert product_implementations() == {said}
    assert product_implementations("row") == {said}


@pytest.mark.parametrize(
    ("platform", "capability", "implementation"),
    [
        ("cpu", None, "xla"),
        ("cuda", 70, "naive"),
        ("cuda", 75, "decode"),
        ("cuda", 86, "decode"),
        ("cuda", 89, "cublaslt"),
        ("cuda", 90, "cublaslt"),
        ("cuda", 120, "cublaslt"),
        ("cuda", None, None),
        ("tpu", None, None),
    ],
)
def test_choice(platform, capability, implementation):
    chosen = choose(platform, capability)
    assert chosen["scaled_matmul"]["implementation"] == implementation
    assert all(choice["why"] for choice in chosen.values())


def test_choice_says_where_row_scales_are_applied():
    rows = {c: choose("cuda", c)["scaled_matmul"]["why"] for c in (89, 90, 100)}
    assert "second kernel" in rows[89] and "second kernel" in rows[100]
    assert "inside the GEMM" in rows[90]


def test_choice_without_cublaslt_is_a_failure_with_its_reason_and_a_way_out():
    product = choose("cuda", 90, cublaslt_error="cublasLt was not found")["scaled_matmul"]
    assert product["implementation"] is None
    assert "cublasLt was not found" in product["why"]
    assert "decode" in product["note"]
    # Devices that never go to cublasLt do not miss it.
    assert choose("cuda", 80, "cublasLt was not found") == choose("cuda", 80)


def test_choice_with_a_driver_too_old_for_the_kernels():
    chosen = choose("cuda", None, kernel_error="CUDA driver version is insufficient")
    assert chosen["quantize"]["implementation"] is None
    assert "CUDA driver version is insufficient" in chosen["quantize"]["why"]


def test_command_prints_what_format_info_makes(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert text == format_info(info()) + "\n"
    assert f"jaxlib       {jax.lib.__version__}" in text
    assert "scaled_matmul" in text and "FFI API" in text
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(info()))


def test_module_runs_and_says_so_where_jax_finds_no_device(tmp_path):
    def run(**environment):
        return subprocess.run(
            [sys.executable, "-m", "jax_fp8", "info"],
            env={**os.environ, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    works = run(JAX_PLATFORMS="cpu")
    assert works.returncode == 0, works.stderr
    assert "cpu:0" in works.stdout
    fails = run(JAX_PLATFORMS="nonsense")
    assert fails.returncode == 0, fails.stderr
    assert "JAX has no devices" in fails.stdout and "nonsense" in fails.stdout


def test_command_without_a_subcommand_shows_how_to_use_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "info" in capsys.readouterr().err
