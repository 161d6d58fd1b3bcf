"""Runs the benchmarks; draws results, checks and compares them, or puts them into the docs."""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from benchmarks import ROOT, compare, plots, results, targets, timing
from benchmarks.registry import benchmarks


def _by_name() -> list[str]:
    """Those that do not run unless they are asked for."""
    return [name for name, module in benchmarks().items() if getattr(module, "BY_NAME", False)]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    run = commands.add_parser("run", help="measure (this is what happens without a command)")
    for options in (parser, run):
        which = options.add_mutually_exclusive_group()
        which.add_argument("--only", metavar="NAME,...", help=", ".join(benchmarks()))
        which.add_argument("--all", action="store_true", help=f"{', '.join(_by_name())} too")
        options.add_argument("--shapes", choices=("smoke", "quick", "all"), default="all")
        options.add_argument("--resume", action="store_true", help="leave out what DIR has already")
        options.add_argument("--out", type=pathlib.Path, default=results.FOLDER, metavar="DIR")
    for name, said in {
        "plot": "draw the files again, and the roofline of all of them",
        "check": "compare them with the targets",
        "tables": "put their tables into the README and docs",
    }.items():
        command = commands.add_parser(name, help=said)
        command.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
        if name == "check":
            command.add_argument("--page", action="store_true", help="put the misses into docs")
    pair = commands.add_parser("compare", help="list what is slower than it was")
    pair.add_argument("old", type=pathlib.Path, help="a file of results, or a folder of them")
    pair.add_argument("new", type=pathlib.Path)
    pair.add_argument("--tolerance", type=float, default=0.05, help="of 1 (0.05)")
    parsed = parser.parse_args(arguments)
    if only := getattr(parsed, "only", None):
        parsed.only = only.split(",")
        if unknown := set(parsed.only) - benchmarks().keys():
            parser.error(f"no benchmark {', '.join(sorted(unknown))}")
    return parsed


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path.glob("*.json")) if path.is_dir() else [path]


def _read(paths: list[pathlib.Path]) -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
    for path in paths:
        for file in _files(path):
            yield file, results.read(file)


def _check(paths: list[pathlib.Path], page: bool) -> int:
    verdicts: dict[str, list[targets.Verdict]] = {}
    for file, found in _read(paths):
        some = targets.check(found, benchmarks()[found["name"]].KEYS)
        verdicts.setdefault(found["environment"]["device"], []).extend(some)
        print(*some, sep="\n") if some else print(f"{file.name} has no targets")
    every = [verdict for some in verdicts.values() for verdict in some]
    missed = sum(not verdict.passed for verdict in every)
    print(f"{len(every) - missed} of {len(every)} targets met")
    if page:
        results.into_pages("missed", targets.missed(verdicts), ROOT)
    return 1 if missed else 0


def _compare(old: pathlib.Path, new: pathlib.Path, tolerance: float) -> int:
    before, after = ({found["name"]: found for _, found in _read([path])} for path in (old, new))
    for path, some in ((old, before), (new, after)):
        if len(_files(path)) > len(some):
            print(f"{path} has several results of one benchmark", file=sys.stderr)
            return 2
    names = [name for name in benchmarks() if name in before and name in after]
    if not names:
        print(f"{old} and {new} have no benchmark in common", file=sys.stderr)
        return 2
    count, bad = 0, []
    for name in names:
        module = benchmarks()[name]
        changes = compare.changes(before[name], after[name], module)
        count += len(changes)
        bad += [str(change) for change in changes if change.ratio > 1 + tolerance]
        bad += compare.lost(before[name], after[name], module)
    print(*bad, sep="\n", end="\n" if bad else "")
    print(f"{len(bad)} regressions among {count} figures, beyond {100 * tolerance:g} %")
    return 1 if bad else 0


def _plot(paths: list[pathlib.Path]) -> None:
    found = dict(_read(paths))
    for file, one in found.items():
        if drawn := plots.draw(one, file.with_suffix(".png")):
            print(drawn)
    for device in sorted({one["environment"]["device"] for one in found.values()}):
        by_name = {
            one["name"]: one for one in found.values() if one["environment"]["device"] == device
        }
        path = next(iter(found)).parent / f"{results.slug(device)}-roofline.png"
        if "ceilings" in by_name and (drawn := plots.draw_roofline(by_name, path)):
            print(drawn)


def _is_done(name: str, options: argparse.Namespace) -> bool:
    path = results.path_of(name, options.out)
    if not path.exists():
        return False
    found = results.read(path)
    return (found.get("format"), found.get("shapes")) == (results.FORMAT, options.shapes)


def _run(options: argparse.Namespace) -> int:
    failed, written = 0, []
    left_out = () if options.all else _by_name()
    names = options.only or [name for name in benchmarks() if name not in left_out]
    if options.resume:
        names = [name for name in names if not _is_done(name, options)]
    for name in tqdm(names, desc="benchmarks", unit="part", position=0):
        start, module = time.monotonic(), benchmarks()[name]
        try:
            rows = module.run(options.shapes)
            seconds = round(time.monotonic() - start, 1)
            path = results.write(name, rows, module.table, options.out, options.shapes, seconds)
            written.append(path)
            print(f"\n{module.table(rows)}\n\n{name}: {seconds} s, {path}\n", flush=True)
        except Exception:  # The others still run.
            traceback.print_exc()
            failed = 1
    if written:
        _plot(
            [
                results.path_of(name, options.out)
                for name in benchmarks()
                if results.path_of(name, options.out).exists()
            ]
        )
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 when a benchmark fails, a target is missed or a figure is worse."""
    options = _parse(arguments)
    if options.command == "check":
        return _check(options.files, options.page)
    if options.command == "compare":
        return _compare(options.old, options.new, options.tolerance)
    if options.command == "plot":
        _plot(options.files)
        return 0
    if options.command == "tables":
        for file, found in _read(options.files):
            results.into_pages(found["name"], file.with_suffix(".md").read_text(), ROOT)
        return 0
    if not timing.on_gpu() and options.shapes != "smoke":
        print("These shapes need a GPU, and JAX has none here; try --shapes smoke", file=sys.stderr)
        return 2
    return _run(options)


if __name__ == "__main__":
    sys.exit(main())
