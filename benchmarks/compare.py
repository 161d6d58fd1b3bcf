"""Two files of results: what has become slower, or less exact, than it was."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

from benchmarks import tables


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure that both files have.

    Attributes:
      what: the benchmark, the problem, the variant and the figure.
      before: the figure, or its ratio to the reference's in the same file.
      after: likewise.
    """

    what: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """Above 1 it has got worse: every figure is better when it is less."""
        return self.after / self.before

    def __str__(self) -> str:
        return f"{self.what}: {self.before:.4g} -> {self.after:.4g} ({self.ratio:.3f}x)"


def changes(old: dict[str, Any], new: dict[str, Any], benchmark: ModuleType) -> list[Change]:
    """The figures of both files, side by side.

    A time is compared as its ratio to that of the benchmark's REFERENCE at the same problem in
    the same file, where there is one: cards, and the heat of one card, differ from run to run.

    Args:
      old: results, as ``results.read`` gives them.
      new: likewise.
      benchmark: the module that wrote them, for its KEYS, its REFERENCE and its FIGURES (``us``
        where it names none).

    Raises:
      ValueError: for results of two benchmarks, or of two formats.
    """
    for key in ("name", "format"):
        if old.get(key) != new.get(key):
            raise ValueError(f"the {key} differs: {old.get(key)!r} and {new.get(key)!r}")
    before, after = (tables.groups(results["rows"], benchmark.KEYS) for results in (old, new))
    reference = getattr(benchmark, "REFERENCE", "")
    found = []
    for problem in before.keys() & after.keys():
        for variant in before[problem].keys() & after[problem].keys() - {reference}:
            for figure in getattr(benchmark, "FIGURES", ("us",)):
                values = [group[problem] for group in (before, after)]
                bases = [tables.value(group, reference, figure) for group in values]
                times = [tables.value(group, variant, figure) for group in values]
                if not (times[0] and times[1]):
                    continue
                if bases[0] and bases[1]:
                    times = [time / base for time, base in zip(times, bases, strict=True)]
                size = " x ".join(map(str, problem))
                found.append(Change(f"{old['name']}, {variant} at {size}, {figure}", *times))
    return sorted(found, key=lambda change: -change.ratio)


def lost(old: dict[str, Any], new: dict[str, Any], benchmark: ModuleType) -> list[str]:
    """What was measured, and now fails or is missing.

    Files of other shapes are compared at those problems that both have.
    """
    before, after = (tables.groups(results["rows"], benchmark.KEYS) for results in (old, new))
    figure = getattr(benchmark, "FIGURES", ("us",))[0]
    same = old.get("shapes") == new.get("shapes")
    return [
        f"{old['name']}, {variant} at {' x '.join(map(str, problem))}: no figure any more"
        for problem, group in before.items()
        if same or problem in after
        for variant in group
        if tables.value(group, variant, figure) is not None
        and tables.value(after.get(problem, {}), variant, figure) is None
    ]
