"""Results on disk: JSON with the environment, and the table and picture beside it."""

from __future__ import annotations

import contextlib
import datetime
import json
import pathlib
import re
import subprocess
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import timing, turns
from jax_fp8._src.info import info

FOLDER = pathlib.Path(__file__).with_name("results")
#: Of the rows and tables: a file of another format is read, but not compared.
FORMAT = 2


def _nvidia_smi() -> str | None:
    """The driver's version and the board's power limit."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()
    return None


def environment() -> dict[str, Any]:
    """What the figures depend on: device, versions, and the method's own settings."""
    library = info()
    library["plan_choice"].pop("file")  # A path of this machine says nothing about the figures.
    return {
        "device": jax.devices()[0].device_kind,
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "nvidia_smi": _nvidia_smi(),
        "jax_fp8": library,
        "method": {
            "rotated_bytes": timing.ROTATED_BYTES,
            "chain_us": timing.CHAIN_US,
            "max_calls": timing.MAX_CALLS,
            "budget_s": turns.BUDGET_S,
            "behind_a_first_run": True,
            "lead_s": turns.LEAD_S,
        },
    }


def slug(text: str) -> str:
    """The text in lower case, with dashes for all but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def path_of(name: str, folder: pathlib.Path = FOLDER) -> pathlib.Path:
    """Where the results of a benchmark on this device are: ``<device>-<name>.json``."""
    return folder / f"{slug(jax.devices()[0].device_kind)}-{name}.json"


def write(
    name: str,
    rows: list[dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
    folder: pathlib.Path = FOLDER,
    shapes: str = "all",
    seconds: float | None = None,
) -> pathlib.Path:
    """Writes ``<device>-<name>.json``, and ``.md`` beside it; returns the path of the former.

    The rows are kept as they are; their keys state the units. The file appears whole or not at
    all.
    """
    results = {
        "name": name,
        "format": FORMAT,
        "shapes": shapes,
        "seconds": seconds,
        "environment": environment(),
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(name, folder)
    # A row a line: to be read, and compared with the one before.
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({k: v for k, v in results.items() if k != "rows"}, indent=1, default=str)
    path.with_suffix(".md").write_text(f"{table(rows)}\n")
    unfinished = path.with_suffix(".part")
    unfinished.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    return unfinished.replace(path)


def read(path: str | pathlib.Path) -> dict[str, Any]:
    """The results in a file: ``name``, ``environment`` and ``rows``."""
    results = json.loads(pathlib.Path(path).read_text())
    missing = {"name", "environment", "rows"} - results.keys()
    if missing:
        raise ValueError(f"{path} is no file of results: it lacks {', '.join(sorted(missing))}")
    return results


def pages(root: pathlib.Path) -> list[pathlib.Path]:
    """The README and what is in docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def into_pages(name: str, table: str, root: pathlib.Path) -> None:
    """Puts the title and the first table of ``table`` into the page that has the marks of ``name``.

    The marks are ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, so that no figure in a table of
    the pages is written by hand.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    for page in pages(root):
        before, mark, rest = page.read_text().partition(begin)
        _, second_mark, after = rest.partition(end)
        if mark and second_mark:
            first = "\n\n".join(table.split("\n\n")[:2]).rstrip()
            page.write_text(f"{before}{begin}\n{first}\n{end}{after}")
            return
    raise ValueError(f"no page of {root} has the marks {begin} and {end}")
