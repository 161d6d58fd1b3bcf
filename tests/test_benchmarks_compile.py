"""The benchmark of compilation: its processes and its table."""

import pathlib
import sys

import pytest

pytest.importorskip("tqdm")
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import compile as benchmark


def test_one_process_and_the_table():
    shape = benchmark.SHAPES["smoke"][0]
    row = benchmark._measure(shape, "matmul", 1)
    assert row["until_first_ms"] == row["lower_ms"] + row["compile_ms"] + row["first_ms"]
    assert row["compile_ms"] > 0 and row["processes"] == 1
    bf16 = {**row, "variant": "bf16", "until_first_ms": row["until_first_ms"] - 100}
    failed = {"m": 16, "n": 64, "k": 64, "variant": "matmul_cached", "error": "broken"}
    text = benchmark.table([bf16, row, failed])
    assert "+100" in text and "matmul, algorithms known" in text


def test_a_process_that_fails_is_a_row_with_its_error(monkeypatch):
    monkeypatch.setitem(benchmark.VARIANTS, "bf16", ("unknown_name", False))
    row = benchmark._measure(benchmark.SHAPES["smoke"][0], "bf16", 1)
    assert "unknown_name" in row["error"]
