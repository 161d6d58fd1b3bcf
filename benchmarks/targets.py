"""What the GEMM's figures must reach, and whether a file of results does."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks import tables


@dataclasses.dataclass(frozen=True)
class Target:
    """``slow`` takes at least ``least`` times as long as ``fast``, at (M, N, K)."""

    problem: tuple[int, int, int]
    slow: str
    fast: str
    least: float


#: For an H200.
TARGETS = (
    Target((8192, 28672, 4096), "bf16", "cublaslt", 1.8),
    Target((8192, 4096, 14336), "bf16", "cublaslt", 1.8),
    Target((8192, 8192, 8192), "bf16", "cublaslt", 1.8),
    Target((1, 28672, 4096), "bf16", "cublaslt", 1.65),
    Target((8192, 8192, 8192), "naive", "cublaslt", 20.0),
)
#: The default plan's time over that of cublasLt's first heuristic called from C++.
MOST_OF_FIRST = 1.03


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One line of the check."""

    what: str
    figure: float | None
    bound: str
    passed: bool

    def __str__(self) -> str:
        figure = "no figure" if self.figure is None else f"{self.figure:.3f}"
        return f"{'PASS' if self.passed else 'MISS'}  {self.what}: {figure} ({self.bound})"


def check(results: dict[str, Any]) -> list[Verdict]:
    """The verdicts on the results of the GEMM, as ``results.read`` gives them.

    A figure that is missing is a miss.
    """
    if results["name"] != "gemm":
        raise ValueError(
            f"the targets are for the GEMM, and these are results of {results['name']}"
        )
    by_problem = tables.groups(results["rows"], ("m", "n", "k"))
    verdicts = []
    for target in TARGETS:
        figure = tables.ratio(by_problem.get(target.problem, {}), target.slow, target.fast)
        size = " x ".join(map(str, target.problem))
        what = f"{size}, {target.fast} against {target.slow}"
        passed = figure is not None and figure >= target.least
        verdicts.append(Verdict(what, figure, f"at least {target.least}", passed))
    for problem, group in by_problem.items():
        figure = tables.ratio(group, "cublaslt", "cpp_first")
        what = f"{' x '.join(map(str, problem))}, time over that of the first heuristic from C++"
        # With one algorithm on both sides what differs is the card: its clocks under load.
        algorithms = {
            group[name].get("algorithm") for name in ("cublaslt", "cpp_first") if name in group
        }
        what += ", one algorithm" if len(algorithms) == 1 else ", two algorithms"
        passed = figure is not None and figure <= MOST_OF_FIRST
        verdicts.append(Verdict(what, figure, f"at most {MOST_OF_FIRST}", passed))
    return verdicts
