"""What ncu's report says of a kernel, and a stand-in for ncu."""

import pathlib
import sys

import pytest

pytest.importorskip("tqdm")
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import counters, server


def report(**changed):
    """Of one kernel, as far as it is read."""
    values = {
        "Duration": ("us", "10.14"),
        "DRAM Throughput": ("%", "34.66"),
        "Elapsed Cycles": ("cycle", "19,826"),
        "Issue Slots Busy": ("%", "50.43"),
        "Achieved Occupancy": ("%", "44.73"),
        "Warp Cycles Per Issued Instruction": ("cycle", "10.90"),
        "Registers Per Thread": ("register/thread", "1,064"),
        **changed,
    }
    lines = [f"    {name:40} {unit:>12} {value:>12}" for name, (unit, value) in values.items()]
    return "\n".join(
        ["  a_kernel (528, 1, 1)x(256, 1, 1)", "    OPT   DRAM Throughput is low", *lines]
    )


def test_a_report_is_read():
    assert counters.parse(report()) == {
        "us": 10.14,
        "memory_percent": 34.66,
        "issue_percent": 50.43,
        "warps_percent": 44.73,
        "cycles": 10.90,
        "registers": 1064.0,
    }
    assert counters.parse(report(Duration=("ms", "1.5")))["us"] == 1500.0
    last = counters.parse(report() + "\n" + report(Duration=("ns", "900")))
    assert last["us"] == pytest.approx(0.9)


def test_what_is_not_in_a_report_is_an_error():
    with pytest.raises(RuntimeError, match="ncu says nothing of 'Duration'"):
        counters.parse("==ERROR== no permission")


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """Puts a script in ncu's place."""

    def put(script):
        program = tmp_path / "ncu"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(counters.timing, "on_gpu", lambda: True)
        monkeypatch.setattr(counters, "_find_ncu", lambda: str(program))

    return put


def test_each_case_is_given_to_ncu(ncu, tmp_path):
    (tmp_path / "report").write_text(report())
    ncu(f'cd {tmp_path}; echo "$*" >> calls; echo "$XLA_FLAGS" > flags; cat report')
    rows = counters.run("all")
    assert [row["work"] for row in rows] == list(counters.cases("all"))
    assert all(row["us"] == 10.14 for row in rows)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.endswith(row["work"]) for call, row in zip(calls, rows, strict=True))
    assert all(f"regex:{row['variant']} " in call for call, row in zip(calls, rows, strict=True))
    assert "--xla_gpu_enable_command_buffer=" in (tmp_path / "flags").read_text()
    assert counters.table(rows).count(" 10.1 |") == len(rows)


def test_a_failure_loses_no_other(ncu):
    ncu('case "$*" in *gelu*) echo no such counter; exit 3;; esac; echo nothing')
    rows = counters.run("all")
    assert all(row["us"] is None for row in rows)
    errors = {row["work"].split()[0]: row["error"] for row in rows}
    assert errors["gelu"] == "RuntimeError: ncu: no such counter"
    assert errors["rms_norm"].startswith("RuntimeError: ncu says nothing of 'Duration'")


def test_without_ncu(monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda *_, **__: None)
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    with pytest.raises(server.Unavailable, match="no ncu: put Nsight Compute's on PATH"):
        counters._find_ncu()
