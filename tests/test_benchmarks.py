"""The machinery of benchmarks/; its figures are for a GPU and a person to judge."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

import jax_fp8

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as program
from benchmarks import accuracy, gemm, heuristic, plots, quantize, results, tables, targets, timing

PNG = b"\x89PNG\r\n\x1a\n"


def made_up(first=1.0, bf16=2.0, naive=25.0):
    """Results as of a GPU on which FP8 takes 100 us for everything."""
    rows = []
    for m, n, k in gemm.SHAPES["all"]:
        times = {"bf16": 100 * bf16, "f16": 190.0, "cublaslt": 100.0, "cpp_first": 100 / first}
        times["naive"] = 100 * naive if (m, n, k) == gemm.CUBE else None
        for variant, us in times.items():
            row = {"m": m, "n": n, "k": k, "variant": variant, "us": us}
            if us:
                row |= {"tflop_per_s": 2e-6 * m * n * k / us, "gb_per_s": 1e-3 * (m + n) * k / us}
            rows.append(row)
    return {"name": "gemm", "environment": {"device": "Made Up"}, "rows": rows}


def naive(x, w):
    return jax_fp8.scaled_matmul(x, w, implementation="naive")


def test_chain_is_serial_in_the_compiled_program():
    x = jax_fp8.quantize(jnp.ones((2, 16)))
    # A copy for each call: XLA's CPU compiler may drop the barriers, and then merge equal calls.
    rotated = [(jax_fp8.quantize(jnp.full((3, 16), 1.0 + i)),) for i in range(5)]
    lowered = jax.jit(timing.chain(naive, 5)).lower((x,), rotated)
    # Between each call and the one before there is a barrier ...
    assert lowered.as_text("hlo").count("opt-barrier(") == 4
    compiled = lowered.compile()
    text = compiled.as_text()
    # ... and nothing but the calls is in between.
    assert text.count("custom-call(") == 5
    assert "is_scheduled=true" in text and " copy(" not in text and " call(" not in text
    assert [float(y[0, 0]) for y in compiled((x,), rotated)] == [16.0, 32.0, 48.0, 64.0, 80.0]


def test_each_call_of_a_chain_waits_for_the_one_before():
    jaxpr = jax.make_jaxpr(timing.chain(lambda x, w: x * w, 4))((1.0,), [(2.0,), (3.0,)])
    made, barriers = None, 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "optimization_barrier":
            barriers += 1
            assert made in equation.invars
            behind = set(equation.outvars)
        else:
            assert barriers == 0 or behind.issuperset(equation.invars)
            (made,) = equation.outvars
    assert barriers == 3


def test_calls_and_copies():
    assert timing.calls_for(10 * timing.SLOW_US) == 1
    assert timing.calls_for(timing.CHAIN_US) == 1
    assert timing.calls_for(1e-3) >= 2
    assert timing.copies_for(1 << 40, 8) == 1 + (not timing.on_gpu())
    assert timing.copies_for(1, 8) <= 16


def test_options_that_xla_does_not_know_are_dropped():
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    with pytest.warns(UserWarning, match="no option xla_of_another_time"):
        compiled = timing.compile_with(lowered, {"xla_of_another_time": True, **timing.SERIAL})
    assert compiled(1.0) == 2.0


def test_gemm_runs_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.setitem(gemm.SHAPES, "smoke", ((1, 32, 64), (16, 32, 64)))
    rows = gemm.run("smoke", names=("bf16", "naive"), native=False)
    assert len(rows) == 2 * len(gemm.SHAPES["smoke"])
    assert all(row["us"] > 0 and row["tflop_per_s"] > 0 for row in rows), rows
    assert {row["variant"] for row in rows if "dispatch_us" in row} == {"bf16", "naive"}
    assert all(row["ran"] == "jax_fp8_scaled_matmul" for row in rows if row["variant"] == "naive")
    path = results.write("gemm", rows, gemm.table, tmp_path)
    read = results.read(path)
    assert read["rows"] == rows
    assert read["environment"]["device"] == jax.devices()[0].device_kind
    assert path.with_suffix(".md").read_text() == gemm.table(rows) + "\n"
    assert program.main(["plot", str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(PNG)


def test_quantize_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(quantize.SHAPES, "smoke", ((3, 64),))
    monkeypatch.setattr(
        quantize, "VARIANTS", {name: quantize.VARIANTS[name] for name in ("copy", "tensor_static")}
    )
    assert program.main(["quantize", "--shapes", "smoke", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-quantize.json")
    rows = results.read(path)["rows"]
    assert [row["variant"] for row in rows] == ["copy", "tensor_static"]
    assert all(row["us"] > 0 and row["gb_per_s"] > 0 for row in rows), rows
    assert path.with_suffix(".png").read_bytes().startswith(PNG)


def test_one_variant_that_fails_loses_no_other(monkeypatch):
    def broken(x, w):
        raise RuntimeError("no such luck\nand more")

    variants = (gemm.VARIANTS[0], gemm.Variant("decode", "fp8", broken, "fp8", "any"))
    monkeypatch.setattr(gemm, "VARIANTS", variants)
    monkeypatch.setitem(gemm.SHAPES, "smoke", ((2, 16, 16),))
    with pytest.warns(UserWarning, match="dispatch of decode"):
        rows = gemm.run("smoke", native=False)
    assert rows[0]["us"] > 0
    assert rows[1]["us"] is None and rows[1]["error"] == "RuntimeError: no such luck"
    assert "decode at 2 x 16 x 16: RuntimeError" in gemm.table(rows)


def test_work():
    nbytes, flop = gemm.work((2, 3, 5), "bf16")
    assert (nbytes, flop) == (2 * (10 + 15) + 2 * 6, 60)
    assert gemm.work((2, 3, 5), "fp8_row")[0] == 10 + 15 + 2 * 6


def test_table_shows_what_is_absent_as_a_dash():
    text = gemm.table(made_up()["rows"])
    header, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert "FP8 cublaslt" in header and "best of 8 (C++)" in header
    cells = dict(
        zip(
            [cell.strip() for cell in header.split("|")],
            [cell.strip() for cell in lines[0].split("|")],
            strict=True,
        )
    )
    assert cells["M"] == "1" and cells["N x K"] == "6144 x 4096"
    assert cells["FP8 naive"] == cells["decode"] == cells["over naive"] == "-"
    assert cells["bf16"] == "200" and cells["over bf16"] == "2.00"
    assert tables.number(None) == "-" and tables.number(1234.5) == "1234"


def test_targets_met():
    verdicts = targets.check(made_up())
    assert len(verdicts) == len(targets.TARGETS) + len(gemm.SHAPES["all"])
    assert all(verdict.passed for verdict in verdicts)
    assert str(verdicts[0]).startswith("PASS  8192 x 28672 x 4096") and "2.000" in str(verdicts[0])


@pytest.mark.parametrize(
    "figures, missed",
    [
        ({"bf16": 1.79}, 3),
        ({"bf16": 1.64}, 4),
        ({"naive": 19.9}, 1),
        ({"first": 1.04}, len(gemm.SHAPES["all"])),
    ],
)
def test_targets_missed(figures, missed, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(made_up(**figures)))
    before = path.read_text()
    assert program.main(["check", str(path)]) == 1
    assert capsys.readouterr().out.count("MISS  ") == missed
    assert path.read_text() == before


def test_a_figure_that_is_missing_is_a_miss():
    nothing = {"name": "gemm", "environment": {}, "rows": []}
    assert [str(verdict)[:4] for verdict in targets.check(nothing)] == ["MISS"] * 5


def test_what_is_unknown_is_refused():
    with pytest.raises(ValueError, match="unknown among fp7"):
        gemm.run("smoke", names=("fp7",))
    with pytest.raises(ValueError, match="for the GEMM"):
        targets.check({**made_up(), "name": "quantize"})
    with pytest.raises(SystemExit):
        program.main(["check"])


def test_picture_of_the_gemm(tmp_path):
    path = plots.draw(made_up(), tmp_path / "gemm.png")
    assert path.read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="no picture of 'else'"):
        plots.draw({**made_up(), "name": "else"}, path)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "else.json").write_text("{}")
    with pytest.raises(ValueError, match="no file of results"):
        results.read(tmp_path / "else.json")


def test_native_program_that_cannot_be_built_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "no-nvcc"))
    with pytest.raises(heuristic.Unavailable, match="no-nvcc"):
        list(heuristic.run([(1, 16, 16, 2, 2)]))


@pytest.mark.gpu
def test_cublaslt_from_cpp():
    try:
        heuristic.find_nvcc()
    except heuristic.Unavailable as error:
        pytest.skip(str(error))
    (row,) = heuristic.run([(16, 256, 512, 4, 2)])
    assert 0 < row["cpp_best"]["us"] <= row["cpp_first"]["us"]


def test_accuracy_runs(tmp_path):
    assert program.main(["accuracy", "--shapes", "smoke", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-accuracy.json")
    rows = results.read(path)["rows"]
    assert {(row["k"], row["data"]) for row in rows} == {
        (k, data) for k in accuracy.K["smoke"] for data in accuracy.DATA
    }
    # The additions of K float32 values.
    assert all(0 < row["rms_error_over_rms"] < row["k"] * 2.0**-24 for row in rows)
    assert path.with_suffix(".png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", program.BENCHMARKS)
def test_the_tables_of_the_readme_are_those_of_the_results(name, tmp_path):
    (path,) = results.FOLDER.glob(f"*-{name}.json")
    readme = program.ROOT / "README.md"
    again = tmp_path / "README.md"
    again.write_text(readme.read_text())
    results.into_readme(name, program.BENCHMARKS[name].table(results.read(path)["rows"]), again)
    assert again.read_text() == readme.read_text()


def test_a_readme_without_marks_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="no marks <!-- begin gemm -->"):
        results.into_readme("gemm", "title", readme)
