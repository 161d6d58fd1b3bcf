"""Runs the benchmarks; draws results, checks them, or puts their tables into the README."""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
import traceback

from benchmarks import ROOT, accuracy, gemm, plots, quantize, results, targets, timing

BENCHMARKS = {"gemm": gemm, "quantize": quantize, "accuracy": accuracy}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "command",
        nargs="?",
        default="all",
        choices=[*BENCHMARKS, "all", "plot", "check", "readme"],
        help="a benchmark, all of them, or what to do with FILE",
    )
    parser.add_argument(
        "file", nargs="?", type=pathlib.Path, help="results, for plot, check and readme"
    )
    parser.add_argument("--shapes", choices=sorted(gemm.SHAPES), default="all")
    parser.add_argument(
        "--variants",
        help="of the GEMM, with commas: " + ",".join(variant.name for variant in gemm.VARIANTS),
    )
    parser.add_argument("--out", type=pathlib.Path, default=results.FOLDER, metavar="DIR")
    parsed = parser.parse_args(arguments)
    if (parsed.command in ("plot", "check", "readme")) != (parsed.file is not None):
        parser.error("plot, check and readme take a FILE, and nothing else does")
    return parsed


def _check(file: pathlib.Path) -> int:
    verdicts = targets.check(results.read(file))
    print(*verdicts, sep="\n")
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def _run(name: str, options: argparse.Namespace) -> None:
    start = time.monotonic()
    more = {}
    if name == "gemm" and options.variants:
        more["names"] = options.variants.split(",")
    benchmark = BENCHMARKS[name]
    rows = benchmark.run(options.shapes, **more)
    path = results.write(name, rows, benchmark.table, options.out)
    print(f"\n{benchmark.table(rows)}\n\n{name}: {time.monotonic() - start:.0f} s, {path}\n")
    plots.draw(results.read(path), path.with_suffix(".png"))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 when a benchmark fails or a target is missed."""
    options = _parse(arguments)
    if options.command == "check":
        return _check(options.file)
    if options.command == "readme":
        found = results.read(options.file)
        table = BENCHMARKS[found["name"]].table(found["rows"])
        results.into_readme(found["name"], table, ROOT / "README.md")
        return 0
    if options.command == "plot":
        print(plots.draw(results.read(options.file), options.file.with_suffix(".png")))
        return 0
    if not timing.on_gpu() and options.shapes != "smoke":
        print("These shapes need a GPU, and JAX has none here; try --shapes smoke", file=sys.stderr)
        return 2
    failed = 0
    for name in BENCHMARKS if options.command == "all" else [options.command]:
        try:
            _run(name, options)
        except Exception:  # The other benchmarks still run.
            traceback.print_exc()
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
