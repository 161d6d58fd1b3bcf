"""The benchmark of several GPUs: its rows on two devices of a CPU, its targets, its paper."""

import json
import pathlib
import sys
import types

import mesh_cases
import pytest
from cases import run_script, with_flags

pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("tqdm")
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import ROOT, extrapolate, parallel, targets

RUN = """
import json, sys
sys.path.append({root!r})
from benchmarks import parallel
rows = parallel.run("smoke")
parallel.table(rows)
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_rows():
    """Each part divides its work, and has the results of one device."""
    printed = run_script(
        RUN.format(root=str(ROOT)),
        XLA_FLAGS=with_flags("--xla_force_host_platform_device_count=2"),
        JAX_PLATFORMS="cpu",
    )
    rows = json.loads(printed.splitlines()[-1])
    assert not [row for row in rows if row.get("error")]
    by_part = {}
    for row in rows:
        by_part.setdefault(row["part"], []).append(row)
    for row in rows:
        if row["devices"] == 1:
            assert row["moved"] == {}, row
    for row in by_part["MLP, tensor parallel"]:
        if row["devices"] == 2:
            assert row["off"] < 5e-3 and "all-gather f32" not in row["moved"], row
            assert row["moved"]["all-reduce f32"] == pytest.approx(1e-6 * 16 * 256 * 4)
    wide, fp8 = (row for row in by_part["MLPs, gradients, FSDP"] if row["devices"] == 2)
    # A CPU gathers FP8 as float16, and bf16 as float32.
    assert fp8["moved"]["all-gather f16"] < 0.7 * wide["moved"]["all-gather f32"]
    for row in by_part["GPT, data parallel"] + by_part["GPT, the same batch"]:
        if row["devices"] == 2:  # All gradients are summed, so the batch was divided.
            assert row["moved"]["all-reduce f32"] > 0.64 * 1e-6 * 4 * row["parameters"]
            assert row["off"] is None or row["off"] < 1e-3


ASYNCHRONOUS = """
  %sum = (f32[4]{0}, bf16[8,2]{1,0}) all-reduce-start(%a, %b), to_apply=%add
  %done = (f32[4]{0}, bf16[8,2]{1,0}) all-reduce-done(%sum)
  %one = (f8e4m3fn[4]{0}, f8e4m3fn[8]{0}) all-gather-start(%a), dimensions={0}
  %two = ((f8e4m3fn[4]{0}, f32[1]{0}), (f8e4m3fn[8]{0}, f32[2]{0})) all-gather-start(%a, %b)
  %whole = f8e4m3fn[8]{0} all-gather-done(%one)
  ROOT %part = bf16[6]{0} reduce-scatter(%c)
"""


def test_asynchronous_collectives_count_once_and_by_their_results():
    """Of a gather's start the operands stand before the results; of a sum's they do not."""
    program = types.SimpleNamespace(as_text=lambda: ASYNCHRONOUS)
    results = {
        "all-reduce f32": [4],
        "all-reduce bf16": [16],
        "all-gather f8e4m3fn": [8, 8],
        "all-gather f32": [2],
        "reduce-scatter bf16": [6],
    }
    assert mesh_cases.moved(program) == results
    width = {"f32": 4, "bf16": 2, "f8e4m3fn": 1}
    in_mb = {key: 1e-6 * sum(n) * width[key.split()[1]] for key, n in results.items()}
    assert parallel._example().moved(ASYNCHRONOUS) == pytest.approx(in_mb)


def made_up(two=0.5, tokens=1.9, gathered=0.5):
    rows = []

    def add(part, rows_, devices, variant, us, **more):
        key = {"part": part, "problem": "p", "rows": rows_, "devices": devices}
        figures = {"us": us, "mb": 1.0, "moved": {}, "off": None}
        rows.append({**key, "variant": variant, **figures, **more})

    for variant in ("bf16", "rowwise", "rowwise, FP8 weights"):
        add("MLP, tensor parallel", 64, 1, variant, 100.0)
        moved = {"all-reduce bf16": 64.0}
        add("MLP, tensor parallel", 64, 2, variant, 100.0 * two, off=1e-3, moved=moved)
    for variant, share in (("bf16", 1.0), ("rowwise", gathered)):
        moved = {"all-gather bf16": 100.0 * share, "reduce-scatter bf16": 35.0}
        moved["all-reduce s32"] = 10.0
        add("MLPs, gradients, FSDP", 128, 1, variant, 200.0, layers=2)
        add("MLPs, gradients, FSDP", 128, 2, variant, 120.0, moved=moved, layers=2)
        add("GPT, data parallel", 64, 1, variant, 100.0)
        moved = {"all-reduce f32": 300.0}
        add("GPT, data parallel", 128, 2, variant, 200.0 / tokens, moved=moved)
    add("collective", 1 << 30, 2, "all-reduce", (1 << 30) / 3e5)  # 300 GB/s each way.
    return rows


@pytest.mark.parametrize(
    "changed, missed", [({}, 0), ({"two": 0.6}, 2), ({"tokens": 1.8}, 1), ({"gathered": 0.6}, 1)]
)
def test_targets(changed, missed):
    results = {"name": "parallel", "rows": made_up(**changed)}
    verdicts = targets.check(results, parallel.KEYS)
    assert len(verdicts) == 6 and sum(not verdict.passed for verdict in verdicts) == missed


def test_what_was_not_run_misses_its_targets():
    verdicts = targets.check({"name": "parallel", "rows": []}, parallel.KEYS)
    assert len(verdicts) == 6 and not any(verdict.passed for verdict in verdicts)


def test_paper():
    rows = made_up()
    assert extrapolate.link_rate(rows) == pytest.approx(3e11)
    said, table = extrapolate.parts(rows)
    assert "300 GB/s" in said and "45 GB/s" in said
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    by_name = {tuple(line[:2]): line[2:] for line in lines}
    # 100 us over 8, and 2 * 7 / 8 of 64 MB at 300 GB/s.
    compute, us, share, _ = by_name["MLP, tensor parallel on 8", "rowwise"]
    sum_us = 1.75 * 64e6 / 300e3
    assert compute == "0.0125" and us == f"{(12.5 + sum_us) / 1e3:.3g}"
    assert share == f"{100 * 12.5 / (12.5 + sum_us):.0f} %"
    # 100 us; 300 MB in the host, then an eighth over 128 hosts.
    inside, outside = 1.75 * 300e6 / 300e3, 2 * 127 / 128 * 37.5e6 / 45e3
    _, us, _, hidden = by_name["GPT, data parallel on 1024", "bf16"]
    assert us == f"{(100 + inside + outside) / 1e3:.3g}"
    assert hidden == f"{100 * 100 / (inside + outside):.0f} %"
    # Half a batch each; the weights' 50 MB and the gradients' 80 from 8, then 10 over 128 hosts.
    inside, outside = 0.875 * 130e6 / 300e3, 2 * 127 / 128 * 10e6 / 45e3
    _, us, _, hidden = by_name["MLPs, gradients, on 1024", "rowwise"]
    assert us == f"{(50 + inside + outside) / 1e3:.3g}"
    assert hidden == f"{100 * 50 / max(inside, outside, 50):.0f} %"


def test_table():
    title, table, *_ = parallel.table(made_up()).split("\n\n")
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    (line,) = [x for x in lines if x[:4] == ["MLP, tensor parallel, p", "64", "2", "rowwise"]]
    assert line[4:7] == ["0.05", "1.00", "2.00"] and line[-1] == "all-reduce bf16 64"
    (line,) = [x for x in lines if x[:4] == ["GPT, data parallel, p", "128", "2", "rowwise"]]
    assert line[6] == "1.90"
