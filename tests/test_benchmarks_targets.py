"""Targets and regressions, on results that are made up."""

import json
import pathlib
import sys

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as program
from benchmarks import (
    accuracy,
    compare,
    gemm,
    mlp,
    peers,
    registry,
    results,
    targets,
    weight_only,
)

BENCHMARKS = registry.benchmarks()


# --- Targets --------------------------------------------------------------------------------------


def rows_of(key, problem, **times):
    return [
        {**dict(zip(key, problem, strict=True)), "variant": name, **({"us": us} if us else {})}
        for name, us in times.items()
    ]


def made_up(name, **changed):
    """Results that meet every target, but for the times of the variants given."""
    module, rows = BENCHMARKS[name], []
    if name == "gemm":
        for problem in gemm.SHAPES["all"]:
            times = dict(bf16=200.0, fp8=100.0, fp8_row=101.0, cpp_best=100.0, cpp_row_best=101.0)
            rows += rows_of(module.KEYS, problem, **{**times, **changed})
    elif name == "quantize":
        for shape in BENCHMARKS["quantize"].SHAPES["all"]:
            times = dict(copy=2.5, tensor=2.8, row=2.1, tensor_static=2.0)
            rows += rows_of(module.KEYS, shape, **{**times, **changed})
    elif name == "peers":
        for problem in peers.SHAPES["all"]:
            times = dict(bf16=5e3, row=1010.0, tensor=1005.0, bare_row=1000.0, bare_tensor=1000.0)
            times |= dict(xla_raw=1500.0, torch_row=1100.0)
            rows += rows_of(module.KEYS, problem, **{**times, **changed})
    elif name == "mlp":
        for m in mlp.SHAPES["all"]:
            times = dict(bf16=100.0, rowwise=50.0, static=50.0)
            some = rows_of(module.KEYS, (m,), **{**times, **changed})
            rows += [{**row, "weights_bytes": 176.2e6} for row in some]
    elif name == "weight_only":
        for n, k in weight_only.LAYERS["all"]:
            us = 1.1 * targets.memory_us(n * k)
            rows += rows_of(module.KEYS, (1, n, k), **{"weight_only": us, **changed})
    else:
        for variant in ("bf16", "tensorwise", "rowwise", "weight_only"):
            row = {"n": 64, "variant": variant, "host_us": 0.1, "handler_calls": 0}
            rows.append({**row, **changed} if variant == "rowwise" else row)
    return {
        "name": name,
        "format": results.FORMAT,
        "environment": {"device": "NVIDIA H200"},
        "rows": rows,
    }


def missed(name, **changed):
    verdicts = targets.check(made_up(name, **changed), BENCHMARKS[name].KEYS)
    assert verdicts
    return [str(verdict) for verdict in verdicts if not verdict.passed]


#: Those of training, gpt, decoder and parallel are in tests of their own.
ELSEWHERE = ("compile", "fused", "training", "gpt", "decoder", "parallel")


@pytest.mark.parametrize("name", [name for name in targets.CHECKS if name not in ELSEWHERE])
def test_targets_met(name):
    assert missed(name) == []


def test_what_is_in_two_products_has_the_targets():
    said = missed("mlp", rowwise=60.0, rowwise_around=50.0)
    assert not said  # made_up has it for all M.
    said = missed("mlp", rowwise_around=60.0, static_around=60.0)
    assert sum("bf16 over rowwise, all in its two products:" in line for line in said) == 5
    assert sum("bf16 over static, all in its two products:" in line for line in said) == 1


@pytest.mark.parametrize("ours, passed", [(700.0, True), (701.0, False), (None, False)])
def test_target_of_the_compilation(ours, passed):
    (shape,) = BENCHMARKS["compile"].SHAPES["all"]
    for name in ("matmul", "quantize_matmul"):
        times = {"bf16": 200.0, "matmul": 200.0, "quantize_matmul": 200.0, name: ours}
        rows = [
            {**dict(zip("mnk", shape, strict=True)), "variant": variant, "until_first_ms": ms}
            for variant, ms in times.items()
        ]
        verdicts = targets.check({"name": "compile", "rows": rows}, ("m", "n", "k"))
        assert {v.what.split(", ")[1].split(":")[0]: v.passed for v in verdicts} == {
            "matmul": True,
            "quantize_matmul": True,
            name: passed,
        }


@pytest.mark.parametrize("name", ["gemm", "quantize", "peers", "fused", "compile"])
def test_a_shape_that_was_not_measured_is_a_miss(name):
    module = BENCHMARKS[name]
    verdicts = targets.check({"name": name, "rows": []}, module.KEYS)
    assert verdicts and not any(verdict.passed for verdict in verdicts)
    said = " ".join(verdict.what for verdict in verdicts)
    if name == "fused":
        assert all(f"{p} {m} x {n}" in said for p, m, n in module.SHAPES["all"] if m * n >= 8e6)
    elif name != "quantize":
        assert all(" x ".join(map(str, shape)) in said for shape in module.SHAPES["all"])


@pytest.mark.parametrize(
    "name, changed, count",
    [
        ("gemm", {"fp8": 103.5}, len(gemm.SHAPES["all"])),
        ("gemm", {"fp8_row": 105.0}, sum(p[0] > 64 for p in gemm.SHAPES["all"])),
        (
            "gemm",
            {"fp8_row": 121.0, "cpp_row_best": 121.0},
            sum(p[0] <= 64 for p in gemm.SHAPES["all"]),
        ),
        ("gemm", {"cpp_best": None}, len(gemm.SHAPES["all"])),
        ("quantize", {"tensor": 3.3}, 2 + 4),
        ("quantize", {"tensor": 2.9}, 2),
        ("quantize", {"row": 2.21}, 4),
        ("peers", {"row": 1045.0}, 1),
        ("peers", {"row": 1501.0, "bare_row": 1500.0}, len(peers.SHAPES["all"])),
        ("peers", {"tensor": 1300.0}, 3),
        ("peers", {"torch_row": 1009.0}, len(peers.SHAPES["all"])),
        ("mlp", {"rowwise": 56.0}, 4),
        ("mlp", {"static": 54.0}, 1),
        ("mlp", {"rowwise": 58.1, "bf16": 200.0}, 2),
        ("weight_only", {"weight_only": 40.0}, 2),
        ("host", {"handler_calls": 1}, 1),
        ("host", {"host_us": 0.7}, 1),
    ],
)
def test_targets_missed(name, changed, count):
    assert len(missed(name, **changed)) == count


def test_targets_of_the_fused_producers():
    def over(producer, name, nbytes, us, rows=2048):
        row = {"producer": producer, "rows": rows, "columns": 4096, "variant": name, "us": us}
        row["gb_per_s"] = 1e-3 * nbytes / us
        verdicts = targets.check({"name": "fused", "rows": [row]}, ("producer", "rows", "columns"))
        of_this = [v for v in verdicts if v.what.startswith(f"{producer} {rows} x ")]
        return {v.what.split(", ")[1]: v.figure for v in of_this}

    elements = 2048 * 4096
    copy_us = targets.memory_us(3 * elements)
    assert over("rms_norm", "row", 3 * elements, copy_us + 2)["row"] == pytest.approx(1)
    assert over("rms_norm", "row", 3 * elements, copy_us + 2)["tensor"] is None
    assert over("rms_norm", "tensor", 3 * elements, 5 / 3 * copy_us + 2)["tensor"] == pytest.approx(
        1
    )
    assert over("swiglu", "tensor", 5 * elements, 3 * copy_us + 2)["tensor"] == pytest.approx(1)
    assert over("rms_norm", "row", 3 * elements, 1.0, rows=16) == {}


def test_a_card_is_held_to_its_own_memory():
    row = {"m": 1, "n": 28672, "k": 4096, "variant": "weight_only"}
    row["us"] = targets.memory_us(28672 * 4096, "NVIDIA H100 80GB HBM3")
    figures = {}
    for card in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "another"):
        found = {"name": "weight_only", "environment": {"device": card}, "rows": [row]}
        figures[card] = targets.check(found, weight_only.KEYS)[0].figure
    assert figures["NVIDIA H100 80GB HBM3"] == pytest.approx(1)
    assert figures["NVIDIA H200"] == pytest.approx(4.255 / 2.973)
    assert figures["another"] is None


def test_the_check_speaks_and_tells_by_its_exit_code(tmp_path, capsys):
    path = tmp_path / "gemm.json"
    path.write_text(json.dumps(made_up("gemm")))
    assert program.main(["check", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("PASS  gemm 1 x 4096 x 4096, tensor") and "1.000 (at most" in said[0]
    (tmp_path / "mlp.json").write_text(json.dumps(made_up("mlp", rowwise=1e3)))
    before = path.read_text()
    assert program.main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.count("MISS  ") == 7 and "bf16 over rowwise: 0.100 (at least 1.82)" in said
    assert path.read_text() == before


def test_a_figure_that_is_missing_is_a_miss():
    verdict = targets.Verdict("it", None, 1.0)
    assert str(verdict) == "MISS  it: no figure (at most 1)"
    assert not targets.Verdict("it", None, 0.0, at_most=False).passed
    nothing = {"name": "mlp", "environment": {}, "rows": []}
    assert [str(v)[:4] for v in targets.check(nothing, mlp.KEYS)] == ["MISS"] * 8
    assert targets.check({**nothing, "name": "accuracy"}, accuracy.KEYS) == []


# --- Comparing ------------------------------------------------------------------------------------


def test_compare_lists_what_is_slower(tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, changed in ((old, {}), (new, {"fp8": 110.0})):
        folder.mkdir()
        (folder / "a-gemm.json").write_text(json.dumps(made_up("gemm", **changed)))
        (folder / "a-mlp.json").write_text(json.dumps(made_up("mlp")))
    count = len(gemm.SHAPES["all"])
    assert program.main(["compare", str(old), str(new)]) == 1
    said = capsys.readouterr().out
    assert said.count("0.5 -> 0.55 (1.100x)") == count
    assert f"{count} regressions among" in said
    assert program.main(["compare", str(old), str(new), "--tolerance", "0.11"]) == 0
    assert program.main(["compare", str(new), str(old)]) == 0
    assert program.main(["compare", str(old / "a-gemm.json"), str(new / "a-mlp.json")]) == 2
    (old / "b-gemm.json").write_text((old / "a-gemm.json").read_text())
    assert program.main(["compare", str(old), str(new)]) == 2
    assert "several results of one benchmark" in capsys.readouterr().err


def test_compare_is_of_ratios_to_the_reference():
    twice = made_up("gemm")
    for row in twice["rows"]:
        row["us"] *= 2
    found = compare.changes(made_up("gemm"), twice, gemm)
    assert found and {change.ratio for change in found} == {1.0}
    # Where the reference is missing in one of them, times are compared as they are.
    less = {**twice, "rows": [row for row in twice["rows"] if row["variant"] != "bf16"]}
    assert {c.ratio for c in compare.changes(made_up("gemm"), less, gemm)} == {2.0}


@pytest.mark.parametrize("name, error", [("peers", "rms_error"), ("mlp", "rms_off_bf16")])
def test_compare_lists_what_is_less_exact(name, error):
    def off(by):
        rows = [{**row, error: by * (row["variant"] != "bf16")} for row in made_up(name)["rows"]]
        return {**made_up(name), "rows": rows}

    worse = [c for c in compare.changes(off(0.04), off(0.06), BENCHMARKS[name]) if c.ratio > 1.01]
    assert worse and all(c.what.endswith(error) and c.ratio == pytest.approx(1.5) for c in worse)


def test_compare_tells_what_is_lost_and_what_it_cannot_compare():
    new = made_up("mlp", static=None)
    assert len(compare.lost(made_up("mlp"), new, mlp)) == len(mlp.SHAPES["all"])
    assert compare.lost(new, made_up("mlp"), mlp) == []
    # A whole problem is lost from a file of the same shapes, and not looked for in one of others.
    m = mlp.SHAPES["all"][0]
    fewer = made_up("mlp")
    fewer["rows"] = [row for row in fewer["rows"] if row["m"] != m]
    gone = compare.lost(made_up("mlp"), fewer, mlp)
    assert len(gone) == len(made_up("mlp")["rows"]) - len(fewer["rows"]) > 0
    assert all(f"at {m}:" in line for line in gone)
    assert compare.lost({**made_up("mlp"), "shapes": "other"}, fewer, mlp) == []
    with pytest.raises(ValueError, match="the name differs: 'mlp' and 'gemm'"):
        compare.changes(new, made_up("gemm"), mlp)
    with pytest.raises(ValueError, match="the format differs"):
        compare.changes(new, {**new, "format": 1}, mlp)
