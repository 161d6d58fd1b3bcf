"""The machinery of benchmarks/; its figures are for a GPU and a person to judge."""

import pathlib
import re
import sys

import jax
import pytest

import jax_fp8

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as program
from benchmarks import (
    accuracy,
    fused,
    gemm,
    host,
    mlp,
    operands,
    parallel,
    peers,
    plots,
    registry,
    results,
    roofline,
    tables,
    targets,
    timing,
    weight_only,
)

pytestmark = pytest.mark.slow

PNG = b"\x89PNG\r\n\x1a\n"
BENCHMARKS = registry.benchmarks()


def naive(x, w):
    return jax_fp8.scaled_matmul(x, w, implementation="naive")


# --- Each benchmark -------------------------------------------------------------------------------


def run(name, out, *more):
    """The rows and the path that the program writes."""
    assert program.main(["--only", name, "--shapes", "smoke", "--out", str(out), *more]) == 0
    (path,) = out.glob(f"*-{name}.json")
    return results.read(path)["rows"], path


def measured(rows):
    """The variants that have a time; the others must say why not."""
    assert all(row["us"] > 0 if row.get("us") is not None else row["error"] for row in rows), rows
    return {row["variant"] for row in rows if row.get("us") is not None}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_and_comes_back(name, tmp_path, monkeypatch):
    if name == "gemm":  # A large product with the naive kernel takes its time on a CPU.
        monkeypatch.setitem(gemm.SHAPES, "smoke", ((1, 32, 64), (16, 32, 64)))
    if name == "counters":  # Nsight Compute is not everywhere.
        monkeypatch.setattr(timing, "on_gpu", lambda: False)
    if name == "parallel":  # test_benchmarks_parallel.py has its GPT, too.
        monkeypatch.setitem(parallel.SHAPES, "smoke", ("tiny", 16, 16, None))
    rows, path = run(name, tmp_path)
    module = BENCHMARKS[name]
    figure = getattr(module, "FIGURES", ("us",))[0]
    assert any(row.get(figure) is not None for row in rows)
    groups = tables.groups(rows, module.KEYS)
    assert sum(map(len, groups.values())) == len(rows), "KEYS do not tell the problems apart"
    found = results.read(path)
    assert found["environment"]["device"] == jax.devices()[0].device_kind
    assert (found["format"], found["shapes"]) == (results.FORMAT, "smoke")
    assert path.with_suffix(".md").read_text() == module.table(rows) + "\n"
    assert "|---" in path.with_suffix(".md").read_text()
    drawn = path.with_suffix(".png")
    assert drawn.exists() == (name in plots.DRAWINGS)
    if drawn.exists():
        assert drawn.read_bytes().startswith(PNG)
    targets.check(found, module.KEYS)  # It may be missed here, but can be told.


def test_gemm_times_its_variants(tmp_path):
    rows, _ = run("gemm", tmp_path)
    assert {"bf16", "fp8", "fp8_row", "fp8_block", "naive"} <= measured(rows)
    assert {row["m"] for row in rows if row["variant"] == "fp8_block"} == {256}
    assert all(row["tflop_per_s"] > 0 and row["gb_per_s"] > 0 for row in rows if row.get("us"))
    at = {row["variant"] for row in rows if (row["m"], row["n"], row["k"]) == gemm.OTHERS_AT[0]}
    assert "naive" in at
    naives = [row for row in rows if row["variant"] == "naive"]
    assert all(row["ran"] == "jax_fp8_scaled_matmul" for row in naives)
    assert all(row["plans"] == ["naive"] for row in naives)


def test_peers_compute_the_product():
    rows = peers.run("smoke")
    assert {"bf16", "row", "tensor", "bare_row", "xla_raw", "xla_raw_row"} <= measured(rows)
    # E4M3 has 3 bits of mantissa: half an ulp is at most 2^-4 of a value, and errors average.
    assert all(row["rms_error"] < 2**-4 for row in rows if row.get("us"))
    assert all(
        row["rms_error"] > 2**-8 for row in rows if row.get("us") and row["variant"] != "bf16"
    )
    if not timing.on_gpu():
        xla = [row for row in rows if row["variant"].startswith("xla")]
        assert xla and not any(row["fp8"] for row in xla if row.get("us"))
        assert {row["variant"] for row in xla if row.get("error")} <= {"xla_raw_preset"}


def test_the_peer_by_preset_names_its_algorithm():
    """A CPU refuses it, so that it is seen in what a GPU would compile."""
    (peer,) = (peer for peer in peers.PEERS if peer.name == "xla_raw_preset")
    x = operands.normal(0, (16, 64))
    ahead = peer.prepare(operands.normal(1, (32, 64)))
    lowered = jax.jit(peer.call).trace(x, *ahead).lower(lowering_platforms=("cuda",))
    (line,) = (line for line in lowered.as_text().splitlines() if "dot_general" in line)
    assert "allow_imprecise_accumulation = true" in line
    assert line.count("f8E4M3FN>") == 2 and "accumulation_type = f32" in line
    assert peer.name in peers.OTHERS


@pytest.mark.parametrize("producer", fused.WIDE_BYTES)
def test_a_fused_producer_is_what_it_is_compared_with(producer):
    columns = 256 * (2 if producer == "swiglu" else 1)
    count = 2 if producer.endswith("residual") else 1
    arrays = [operands.normal(i, (3, columns)) for i in range(count)]
    weight, scale = operands.normal(2, (256,)), jax.numpy.ones((1, 1))
    ours = fused._fused(producer, "row", False)(weight, scale, *arrays)
    theirs = fused._unfused(producer)(weight, scale, *arrays)
    if count == 2:
        assert (ours[1] == theirs[1]).all()
        ours, theirs = ours[0], theirs[0]
    ours, theirs = jax_fp8.dequantize(ours), jax_fp8.dequantize(theirs)
    # The other rounds to bf16 in between, so that a code in 16 is another: off by an eighth.
    assert operands.rms_error(ours, theirs) < 2**-5


def test_blocks_of_the_mlp_agree_with_bf16():
    rows = mlp.run("smoke")
    assert {"bf16", "unfused"} <= measured(rows)
    for row in rows:
        if row.get("us") and row["variant"] != "bf16":
            assert 0 < row["rms_off_bf16"] < 0.15, row


def test_weight_only_compares(monkeypatch):
    rows = weight_only.run("smoke")
    assert {"bf16", "rowwise"} <= measured(rows)
    assert all(0 < row["rms_error"] < 2**-4 for row in rows if row.get("us"))


def test_from_which_m_rowwise_wins():
    def rows(*ratios):
        return [
            {"m": 2**i, "n": 3, "k": 5, "variant": name, "us": us}
            for i, ratio in enumerate(ratios)
            for name, us in (("weight_only", ratio), ("rowwise", 1.0))
        ]

    assert weight_only.faster_from(rows(0.5, 1.2, 0.9, 1.1, 2.0), 3, 5) == 8
    assert weight_only.faster_from(rows(2.0, 0.5), 3, 5) is None
    assert "rowwise wins from M = 2 on" in weight_only.table(rows(0.5, 1.2))


def test_host_counts_the_handlers(monkeypatch):
    monkeypatch.setattr(host, "RUNS", 3)
    monkeypatch.setitem(
        host.VARIANTS, "naive", (operands.tensor, lambda x, w: naive(jax_fp8.quantize(x), w))
    )
    rows = {row["variant"]: row for row in host.run("smoke")}
    assert rows["bf16"]["handler_calls"] == 0
    if not timing.on_gpu():  # Nothing is captured here, so each call is seen: 2 calls, 10 runs.
        assert rows["naive"]["handler_calls"] == 20


def test_accuracy_is_that_of_float32(tmp_path):
    rows, _ = run("accuracy", tmp_path)
    assert {(row["k"], row["data"]) for row in rows} == {
        (k, data) for k in accuracy.K["smoke"] for data in accuracy.DATA
    }
    # The additions of K float32 values.
    assert all(0 < row["rms_error_over_rms"] < row["k"] * 2.0**-24 for row in rows)


def test_one_variant_that_fails_loses_no_other(monkeypatch):
    def broken(x, w):
        raise RuntimeError("no such luck\nand more")

    variants = (gemm.VARIANTS[0], gemm.Variant("decode", operands.tensor, broken, "fp8", "any"))
    monkeypatch.setattr(gemm, "VARIANTS", variants)
    monkeypatch.setattr(gemm, "NATIVE", {})
    monkeypatch.setitem(gemm.SHAPES, "smoke", ((2, 16, 16),))
    rows = gemm.run("smoke")
    assert rows[0]["us"] > 0
    assert rows[1]["us"] is None and rows[1]["error"] == "RuntimeError: no such luck"
    assert "decode at 2 x 16 x 16: RuntimeError" in gemm.table(rows)


def test_work():
    nbytes, flop = gemm.work((2, 3, 5), 2)
    assert (nbytes, flop) == (2 * (10 + 15) + 2 * 6, 60)
    assert gemm.work((2, 3, 5), 1)[0] == 10 + 15 + 2 * 6


# --- The program ----------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was_cut(tmp_path, monkeypatch, capsys):
    calls = []

    def fake(name):
        def run(shapes):
            calls.append(name)
            if name == "host":
                raise RuntimeError("no such luck")
            return [{"n": 1, "variant": "bf16", "us": 1.0}]

        return run

    for name in ("host", "accuracy"):
        monkeypatch.setattr(BENCHMARKS[name], "run", fake(name))
        monkeypatch.setattr(BENCHMARKS[name], "table", lambda rows: "title\n\n| table |")
    monkeypatch.setattr(plots, "DRAWINGS", {})
    options = ["--only", "host,accuracy", "--shapes", "smoke", "--out", str(tmp_path), "--resume"]
    assert program.main(options) == 1
    assert calls == ["host", "accuracy"] and "no such luck" in capsys.readouterr().err
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".md"]
    assert program.main(options) == 1
    assert calls == ["host", "accuracy", "host"]
    assert program.main(options[:-1]) == 1
    assert calls[3:] == ["host", "accuracy"]


@pytest.mark.parametrize(
    "options, which",
    [
        ([], {"host"}),
        (["--all"], {"host", "gpt"}),
        (["run", "--all"], {"host", "gpt"}),
        (["--only", "gpt"], {"gpt"}),
    ],
)
def test_what_takes_long_runs_when_it_is_asked_for(options, which, tmp_path, monkeypatch):
    ran = set()

    def fake(name):
        def run(shapes):
            ran.add(name)
            return [{"n": 1, "variant": "bf16", "us": 1.0}]

        return run

    monkeypatch.setattr(plots, "DRAWINGS", {})
    for name, module in BENCHMARKS.items():
        monkeypatch.setattr(module, "run", fake(name))
        monkeypatch.setattr(module, "table", lambda rows: "title\n\n| table |")
    assert program.main([*options, "--shapes", "smoke", "--out", str(tmp_path)]) == 0
    assert ran & {"host", "gpt"} == which
    if "--all" in options:
        assert ran == BENCHMARKS.keys()


def test_what_is_unknown_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown among fp7"):
        gemm.run("smoke", names=("fp7",))
    for arguments in (
        ["--only", "fp7"],
        ["--only", "gemm", "--all"],
        ["check"],
        ["compare", "one"],
        ["--shapes", "llama"],
    ):
        with pytest.raises(SystemExit):
            program.main(arguments)
    (tmp_path / "else.json").write_text("{}")
    with pytest.raises(ValueError, match="no file of results"):
        results.read(tmp_path / "else.json")


def test_every_benchmark_is_found():
    assert list(BENCHMARKS)[:2] == ["ceilings", "gemm"]
    assert {"peers", "mlp", "quantize", "weight_only", "host", "accuracy"} <= BENCHMARKS.keys()
    assert "heuristic" not in BENCHMARKS and "torch_peers" not in BENCHMARKS


# --- Tables and pictures --------------------------------------------------------------------------


def test_table_shows_what_is_absent_as_a_dash():
    times = {"bf16": 200.0, "fp8": 100.0, "cpp_best": 100.0, "fp8_row": None}
    rows = [
        {"m": m, "n": n, "k": k, "variant": name, "us": us}
        for m, n, k in gemm.SHAPES["all"]
        for name, us in times.items()
    ]
    text = gemm.table(rows)
    summary, times = (block.splitlines() for block in re.findall(r"(?:^\|.*\n?)+", text, re.M)[:2])
    header, line = ([cell.strip() for cell in at.split("|")] for at in (summary[0], summary[2]))
    cells = dict(zip(header, line, strict=True))
    assert cells["N x K"] == "4096 x 4096"
    assert cells["M = 1"] == "2.00 / -" and cells["M = 16"] == "-"
    header, line = ([cell.strip() for cell in at.split("|")] for at in (times[0], times[2]))
    cells = dict(zip(header, line, strict=True))
    assert cells["M"] == "1" and cells["FP8"] == "100" and cells["FP8, row scales"] == "-"
    assert cells["of best"] == "1.00" and cells["of best, row scales"] == "-"
    assert tables.number(None) == "-" and tables.number(1234.5) == "1234"


def test_table_of_the_gemm_has_the_columns_that_rows_have():
    problem = {"m": 256, "n": 3, "k": 5}
    rows = [{**problem, "variant": name, "us": 1.0} for name in ("bf16", "fp8")]
    assert "block scales" not in gemm.table(rows)
    text = gemm.table([*rows, {**problem, "variant": "fp8_block", "us": 2.0}])
    assert text.count("FP8, block scales |") == 2 and "Sums with block scales" in text


ROOFLINE = {
    "ceilings": {
        "environment": {"device": "Made Up"},
        "rows": [
            {"variant": "copy", "gb_per_s": 4000.0},
            {"variant": "fp8", "tflop_per_s": 1400.0},
            {"variant": "bf16", "error": "gone"},
        ],
    },
    "gemm": {
        "rows": [
            {"variant": "fp8", "gb_per_s": 1000.0, "tflop_per_s": 1200.0},
            {"variant": "cpp_best", "gb_per_s": 1200.0, "tflop_per_s": 1500.0},
            {"variant": "bf16", "gb_per_s": 2000.0, "tflop_per_s": 700.0},
            {"variant": "naive", "gb_per_s": 1.0, "tflop_per_s": 1.0},
            {"variant": "fp8", "gb_per_s": None, "error": "gone"},
        ]
    },
    "quantize": {
        "rows": [{"variant": "row", "gb_per_s": 3000.0}, {"variant": "copy", "gb_per_s": 3200.0}]
    },
}


def test_share_of_the_ceilings():
    limits = roofline.ceilings(ROOFLINE)
    assert limits == {"copy": 4000.0, "fp8": 1500.0}
    points = {point.kernel: point for point in roofline.points(ROOFLINE)}
    assert list(points) == ["gemm fp8", "gemm cpp_best", "gemm bf16", "quantize row"]
    assert [roofline.share(p, limits) for p in points.values()] == [0.8, 1.0, 0.5, 0.75]
    assert points["gemm fp8"].intensity == 1200.0


def test_picture_of_the_roofline(tmp_path):
    path = plots.draw_roofline(ROOFLINE, tmp_path / "roofline.png")
    assert path.read_bytes().startswith(PNG)
    assert plots.draw_roofline({"gemm": ROOFLINE["gemm"]}, path) is None
    assert plots.draw({"name": "else"}, path) is None


# --- The README and docs --------------------------------------------------------------------------

PAGES = {path: path.read_text() for path in results.pages(program.ROOT) if path.exists()}
MARKED = [name for text in PAGES.values() for name in re.findall(r"<!-- begin (\w+) -->", text)]


def test_each_table_is_on_one_page():
    assert len(MARKED) == len(set(MARKED)) > 10


@pytest.mark.parametrize("name", MARKED)
def test_the_tables_of_the_pages_are_those_of_the_results(name, tmp_path):
    if name == "missed":
        pytest.skip("it is of several results")
    (path,) = results.FOLDER.glob(f"*-{name}.md")
    (tmp_path / "docs").mkdir()
    copies = {tmp_path / page.relative_to(program.ROOT): text for page, text in PAGES.items()}
    for copy, text in copies.items():
        copy.write_text(text)
    results.into_pages(name, path.read_text(), tmp_path)
    assert {copy: copy.read_text() for copy in copies} == copies


def test_the_targets_that_are_missed_are_those_of_the_results(monkeypatch, tmp_path):
    said = PAGES[program.ROOT / "docs" / "speed.md"]
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").touch()
    (tmp_path / "docs" / "speed.md").write_text(said)
    monkeypatch.setattr(program, "ROOT", tmp_path)
    program.main(["check", "--page", str(results.FOLDER)])
    assert (tmp_path / "docs" / "speed.md").read_text() == said


def test_the_readme_says_from_how_many_rows_rowwise_is_faster():
    (path,) = results.FOLDER.glob("*-weight_only.json")
    rows = results.read(path)["rows"]
    wide, narrow = (weight_only.faster_from(rows, n, 4096) for n in (28672, 4096))
    errors = [
        max(row["rms_error"] for row in rows if row["variant"] == name)
        for name in ("rowwise", "weight_only")
    ]
    text = " ".join(PAGES[program.ROOT / "README.md"].split())
    assert f"from M = {wide} on in wide layers" in text
    assert f"and from M = {narrow} on in narrow ones" in text
    first, second = (f"{100 * error:.1f} %" for error in errors)
    assert f"with an RMS error of {first} instead of {second}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page):
    """Files and headings, by the names that GitHub gives these."""
    for place, _, heading in re.findall(r"\]\((?!https?:)([^)#]*)(#?)([^)]*)\)", PAGES[page]):
        target = page.parent / place if place else page
        assert target.exists(), place
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], heading


@pytest.mark.parametrize("path", sorted(results.FOLDER.rglob("*.json")), ids=lambda path: path.stem)
def test_the_tables_of_the_results_are_those_of_their_rows(path):
    found = results.read(path)
    if found.get("format") != results.FORMAT:
        pytest.skip("measured before the tables took their form")
    table = BENCHMARKS[found["name"]].table(found["rows"])
    assert path.with_suffix(".md").read_text() == f"{table}\n"


def test_pages_without_marks_are_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(ValueError, match="has the marks <!-- begin gemm -->"):
        results.into_pages("gemm", "title", tmp_path)
