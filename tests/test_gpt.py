"""The GPT of examples/gpt: its text, its model, how it goes on after a break, its table."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("optax")
pytest.importorskip("tqdm")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "examples"))
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from flax import nnx
from gpt import data, model, peer, program, recipes, train

import jax_fp8.nnx
from benchmarks import gpt as report
from benchmarks import plots, results, targets

pytestmark = pytest.mark.slow

TINY = train.PRESETS["tiny"]

# --- Text -----------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path):
    """A folder of texts, some of which are not to be read."""
    folder = tmp_path / "library"
    files = {f"module_{i}.py": f"x = {i}\n" * 40 for i in range(60)}
    files |= {"again.py": "x = 1\n" * 40, "readme.txt": "text", "empty.py": "", "data.bin": "01"}
    files |= {"site-packages/other.py": "not ours", "test/test_it.py": "left out"}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_corpus_is_each_text_once(library):
    texts = list(data.texts(library))
    assert len(texts) == len(set(texts)) == 61
    assert texts[0] == b"x = 1\n" * 40  # Of again.py, the first of the two.
    corpus = data.load(library)
    assert corpus.training.dtype == np.uint8
    both = corpus.training.tobytes() + corpus.validation.tobytes()
    assert sorted(both.split(data.END)[:-1]) == sorted(texts)
    assert corpus.facts["training_files"] + corpus.facts["validation_files"] == 61
    assert 0 < corpus.facts["validation_files"] < 12
    assert corpus.facts == data.load(library).facts


def test_a_file_is_on_one_side_whatever_else_is_there(library):
    before = data.load(library).validation.tobytes()
    (library / "another.py").write_text("y = 2\n")
    after = data.load(library).validation.tobytes()
    assert before in (after, after.replace(b"y = 2\n" + data.END, b""))


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no text to train and to validate with"):
        data.load(tmp_path)


def test_sequences_are_within_the_text_and_those_of_the_seed():
    starts = data.starts(1000, 50, 8, 64, seed=3)
    assert starts.shape == (50, 8) and starts.dtype == np.int32
    assert starts.min() >= 0 and starts.max() + 65 <= 1000
    assert np.array_equal(starts, data.starts(1000, 50, 8, 64, seed=3))
    assert not np.array_equal(starts, data.starts(1000, 50, 8, 64, seed=4))
    grid = data.grid(1000, 64, 5)
    assert len(grid) == 5 and np.diff(grid).min() >= 64 and grid.max() + 65 <= 1000
    assert len(data.grid(1000, 64, 100)) == 15
    text = jnp.arange(1000) % 256
    cut = train.windows(text.astype(jnp.uint8), jnp.array([0, 300]), 4)
    assert cut.tolist() == [[0, 1, 2, 3, 4], [44, 45, 46, 47, 48]]


# --- Model ----------------------------------------------------------------------------------------


def test_sizes_of_the_presets():
    for name, least, most in (("100m", 95e6, 105e6), ("wide", 350e6, 450e6)):
        config = train.PRESETS[name].config
        made = nnx.eval_shape(lambda config=config: model.GPT(config, nnx.Rngs(0)))
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(made, nnx.Param)))
        assert least < count < most
    wide = train.PRESETS["wide"]
    assert (wide.config.width, wide.config.layers) == (4096, 2)
    assert wide.batch * wide.config.length >= 16384
    assert train.PRESETS["100m"].steps >= 1000


def test_no_byte_knows_of_those_behind_it():
    config = model.Config(32, 32, heads=1, layers=1, dtype=jnp.float32)
    gpt = nnx.jit(lambda: model.GPT(config, nnx.Rngs(0)))()
    tokens = jax.random.randint(jax.random.key(0), (1, 16), 0, 256)
    run = nnx.jit(lambda gpt, tokens: gpt(tokens))
    logits = run(gpt, tokens)
    changed = run(gpt, tokens.at[0, 9].add(1))
    same = jnp.all(logits == changed, axis=-1)[0]
    assert same[:9].all() and not same[9:].any()


def test_positions_turn_pairs():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    turned = jax.jit(model.rotary)(x)
    norms = [jnp.linalg.norm(a.reshape(1, 5, 2, 2, 4), axis=3) for a in (x, turned)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert jnp.array_equal(turned[:, 0], x[:, 0]) and not jnp.allclose(turned[:, 1:], x[:, 1:])


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_is_of_the_blocks_alone(name):
    gpt = nnx.eval_shape(lambda: train.build(TINY, name))
    products = {
        "/".join(map(str, path)): type(node.dot_general)
        for path, node in nnx.iter_graph(gpt)
        if isinstance(node, nnx.Linear)
    }
    others = {"bf16": None, "bf16_again": None, "flax_direct": peer.DirectDotGeneral}
    kind = others.get(name, jax_fp8.nnx.DotGeneral)
    for path, product in products.items():
        converted = issubclass(product, jax_fp8.nnx.DotGeneral | peer.DirectDotGeneral)
        assert converted == (kind is not None and path != "head")
        assert not converted or product is kind
    assert len(products) == 5


def test_bf16_again_starts_from_weights_a_little_larger():
    first, again = (
        nnx.state(train.build(TINY, name), nnx.Param) for name in ("bf16", "bf16_again")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=2.0**-21), first, again)
    changed = jax.tree.map(lambda a, b: (a != b).mean(), first, again)
    assert all(share > 0.9 for share in jax.tree.leaves(changed))


def test_share_of_the_dense_layers():
    share = train.dense_share(train.PRESETS["100m"])
    assert 0.85 < share < 0.95
    longer = dataclasses.replace(
        train.PRESETS["100m"], config=dataclasses.replace(model.Config(), length=8192)
    )
    assert train.dense_share(longer) < share


@pytest.mark.parametrize("name", ["static", "flax_direct"])
def test_time_of_the_dense_layers(name, monkeypatch):
    monkeypatch.setattr(model.Config, "weights", {"out": (32, 32)})
    training = dataclasses.replace(TINY, config=model.Config(32, 32, heads=1, layers=3, length=8))
    assert train.dense_ms(training, name, repeats=1) > 0


# --- The program ----------------------------------------------------------------------------------


def fake_row(loss, ms):
    return {
        "step_ms": ms,
        "dense_ms": ms / 2,
        "training_loss": loss,
        "validation_loss": loss + 0.1,
        "validated_at": [10],
        "validation_losses": [loss + 0.1],
        "losses": [loss + 1, loss],
        "parameters": 99e6,
        "temporary_bytes": 2**30,
        "compile_s": 1.0,
    }


class Calls(list):
    """Names, and whether the layers of each were to be timed alone."""

    def __init__(self):
        super().__init__()
        self.alone = {}


@pytest.fixture
def trained(monkeypatch):
    """What is trained and what is timed again, in place of doing it."""
    calls = Calls()

    def fake(training, name, corpus, alone):
        calls.append(name)
        calls.alone[name] = alone
        if name == "blockwise" and calls.count("blockwise") == 1:
            raise RuntimeError("no such luck")
        return fake_row(1.0 if name == "bf16" else 1.004, 30.0 if name == "bf16" else 20.0)

    monkeypatch.setattr(program, "train", fake)
    monkeypatch.setattr(program, "time_steps", lambda *_: calls.append("bf16 again") or 25.0)
    monkeypatch.setattr(plots, "DRAWINGS", {})
    monkeypatch.setattr(data, "load", lambda: data.Corpus(np.zeros(9), np.zeros(9), {}))
    return calls


def test_a_run_goes_on_where_it_was_cut(trained, tmp_path, capsys):
    options = ["--preset", "tiny", "--out", str(tmp_path)]
    assert program.main([*options, "--recipes", "bf16,rowwise,blockwise"]) == 1
    assert trained == ["bf16", "rowwise", "blockwise"]
    assert "blockwise at tiny x" in capsys.readouterr().out
    more = [*options, "--recipes", "bf16,rowwise,blockwise,delayed", "--resume"]
    assert program.main(more) == 0
    assert trained[3:] == ["bf16 again", "blockwise", "delayed"]
    (path,) = tmp_path.glob("*-gpt.json")
    rows = {row["variant"]: row for row in results.read(path)["rows"]}
    assert list(rows) == ["bf16", "rowwise", "blockwise", "delayed"]
    assert not any(row.get("error") for row in rows.values())
    # Each against bf16 as it was in its own process.
    assert report.speedup(rows["rowwise"]) == 1.5 and report.speedup(rows["delayed"]) == 1.25
    assert report.step_ratio(rows, "rowwise", "delayed") == pytest.approx(1.25 / 1.5)
    assert program.main([*options, "--recipes", "rowwise"]) == 0  # Anew, and all of it.
    assert [row["variant"] for row in results.read(path)["rows"]] == ["rowwise"]
    assert program.main([*options, "--seed", "1", "--recipes", "bf16"]) == 0
    assert [row["seed"] for row in results.read(path)["rows"]] == [0, 1]


def test_options_change_the_preset(trained, tmp_path):
    options = "--preset tiny --width 512 --layers 3 --steps 7 --batch 4 --length 128 --unroll 3"
    assert program.main([*options.split(), "--recipes", "bf16", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-gpt.json")
    (row,) = results.read(path)["rows"]
    assert (row["width"], row["layers"], row["steps"], row["batch"]) == (512, 3, 7, 4)
    assert row["tokens_per_step"] == 512
    config = program._training(program._parse(["--width", "4096"])).config
    assert (config.hidden, config.heads) == (11008, 32)
    config = program._training(program._parse(["--width", "768"])).config
    assert (config.hidden, config.heads) == (2048, 12)


def test_whose_layers_are_timed_alone(trained, tmp_path):
    options = ["--preset", "tiny", "--out", str(tmp_path), "--recipes", "bf16,rowwise"]
    assert program.main(options) == 0
    assert trained.alone == {"bf16": True, "rowwise": True}
    assert program.main([*options, "--alone", "rowwise"]) == 0
    assert trained.alone == {"bf16": False, "rowwise": True}


@pytest.mark.parametrize("option", ["--recipes", "--alone"])
def test_unknown_recipes_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        program.main([option, "bf16,fp7"])
    assert "no recipe fp7" in capsys.readouterr().err


def test_it_runs_as_the_folder(tmp_path):
    command = [sys.executable, str(pathlib.Path(program.__file__).parent), "--help"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "python examples/gpt --preset wide" in said.stdout


# --- The table and the targets --------------------------------------------------------------------


def made_up(losses=(0.8, 0.803, 0.805), times=(30.0, 25.0, 26.0, 27.0)):
    """Results of both presets: bf16, rowwise, tensorwise and flax's."""
    rows = []
    for preset in ("100m", "wide"):
        problem = program.describe(preset, train.PRESETS[preset])
        factor = 1 if preset == "100m" else 0.6
        names = ("bf16", "rowwise", "tensorwise", "flax_direct")
        for name, loss, ms in zip(names, (*losses, 0.8), times, strict=True):
            ms = ms if name == "bf16" else factor * ms
            rows.append({**problem, "variant": name, **fake_row(loss, ms)})
            rows[-1]["bf16_step_ms"] = times[0]
    return {"name": "gpt", "environment": {"device": "Made Up"}, "rows": rows}


@pytest.mark.parametrize(
    "changed, count",
    [
        ({}, 0),
        ({"losses": (0.8, 0.806, 0.805)}, 2),
        ({"losses": (0.8, 0.803, 0.812)}, 2),
        ({"times": (24.0, 25.0, 26.0, 27.0)}, 2),
        ({"times": (30.0, 25.0, 28.0, 27.0)}, 2),
        ({"times": (50.0, 25.0, 26.0, 20.0)}, 4),
    ],
)
def test_targets(changed, count):
    found = made_up(**changed)
    verdicts = targets.check(found, report.KEYS)
    others = ("blockwise", "delayed", "static", "weight_only")  # They need only be there.
    assert [v.what.split(", ")[-1] for v in verdicts if v.figure is None] == [
        f"{name}: steps" for name in others
    ]
    found["rows"] += [{**found["rows"][0], "variant": name} for name in others]
    verdicts = targets.check(found, report.KEYS)
    missed = [str(verdict) for verdict in verdicts if not verdict.passed]
    assert len(verdicts) == 2 * 2 + 2 * 2 + 2 * 2 + 7 and len(missed) == count, missed


def test_what_was_not_run_misses_its_targets():
    verdicts = targets.check({"name": "gpt", "rows": []}, report.KEYS)
    assert len(verdicts) == 19 and not any(verdict.passed for verdict in verdicts)


def test_table_and_picture(tmp_path):
    found = made_up()
    found["rows"].append({**found["rows"][0], "variant": "static", "step_ms": None, "error": "no"})
    text = report.table(found["rows"])
    title, table, failed = text.split("\n\n", 2)
    assert "99M parameters, 14 layers of width 768, steps of 16384 bytes" in title
    assert len(table.splitlines()) == 2 + 8
    (line,) = [line for line in table.splitlines() if "100m" in line and "rowwise" in line]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    losses = ["0.8030", "0.9030", "+0.33 %"]
    assert cells == ["100m", "1000", "0", "rowwise", *losses, "25", "1.20", "12.5 (50 %)", "1.00"]
    assert "static at 100m" in failed
    path = plots.draw(found, tmp_path / "gpt.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(found)) == found
