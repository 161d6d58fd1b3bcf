"""The benchmark of the decoder: its table and its targets, on results that are made up."""

import pathlib
import sys

import pytest

pytest.importorskip("flax")
pytest.importorskip("tqdm")
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import decoder, targets

BYTES = {"bf16": (16e9, 15e9), "rowwise": (9e9, 8e9)}
#: Of reading the weights of bf16 once.
READING_US = targets.memory_us(15e9)


def made_up(speedups=(1.75, 1.65, 1.55), bf16=1.2, narrow=9e9):
    rows = []
    problems = [("decode", 1, 64), ("decode", 16, 64), ("prefill", 1, 8192)]
    for (phase, batch, tokens), over in zip(problems, speedups, strict=True):
        for name, (total, read) in BYTES.items():
            us = bf16 * READING_US / (1 if name == "bf16" else over)
            key = {"model": "m", "phase": phase, "batch": batch, "tokens": tokens}
            total = total if name == "bf16" else narrow
            figures = {"us": us, "tokens_per_s": 1.0, "weight_bytes": total, "read_bytes": read}
            figures["reading_us"] = targets.memory_us(read)
            rows.append({**key, "variant": name, **figures})
    return rows


@pytest.mark.parametrize(
    "changed, count",
    [
        ({}, 0),
        ({"speedups": (1.65, 1.65, 1.55)}, 1),
        ({"speedups": (1.75, 1.55, 1.45)}, 2),
        ({"bf16": 1.4}, 2),
        ({"narrow": 9.5e9}, 2),
    ],
)
def test_targets(changed, count):
    verdicts = targets.check({"name": "decoder", "rows": made_up(**changed)}, decoder.KEYS)
    missed = [str(verdict) for verdict in verdicts if not verdict.passed]
    assert len(verdicts) == 3 + 2 + 2 and len(missed) == count, missed


def test_what_was_not_run_misses_its_targets():
    verdicts = targets.check({"name": "decoder", "rows": []}, decoder.KEYS)
    assert len(verdicts) == 7 and not any(verdict.passed for verdict in verdicts)


def test_table():
    rows = made_up()
    rows.append({**rows[0], "variant": "static", "us": None, "error": "no"})
    title, table, failed = decoder.table(rows).split("\n\n", 2)
    assert "m with random weights" in title and "static at" in failed
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    (fast,) = [line for line in lines if line[:3] == ["decode", "1", "rowwise"]]
    ms = 1.2 * READING_US / 1.75 / 1e3
    assert fast[3] == f"{ms:.3g}" and fast[5] == "1.75" and fast[6] == "9"
    # 8 GB of the 15 that take READING_US.
    assert fast[7] == f"{100 * (1 - 8 / 15 * 1.75 / 1.2):.0f} %"
    (prefill,) = [line for line in lines if line[:3] == ["prefill of 8192 tokens", "1", "bf16"]]
    assert prefill[5] == "1.00" and prefill[7] == "-"
