"""Kernels against the ceilings that were measured: what share of the possible they reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

#: Multiplied in 16 bits; every other product that has a rate is of FP8.
_16BIT = ("bf16", "f16", "decode", "weight_only")
#: References and repetitions: they are drawn as ceilings or not at all.
_LEFT_OUT = ("copy", "naive", "f16", "cublaslt")


@dataclasses.dataclass(frozen=True)
class Point:
    """A kernel at a shape.

    Attributes:
      kernel: the benchmark and the variant.
      unit: whose ceiling it has, "fp8" or "bf16".
      gb_per_s: of the fewest bytes it must move.
      tflop_per_s: None where it only moves.
    """

    kernel: str
    unit: str
    gb_per_s: float
    tflop_per_s: float | None

    @property
    def intensity(self) -> float:
        """Operations a byte: TFLOP/s over GB/s is thousands of them."""
        assert self.tflop_per_s is not None
        return 1e3 * self.tflop_per_s / self.gb_per_s


def points(found: dict[str, dict[str, Any]]) -> list[Point]:
    """Every row of the results, by name, that states a rate."""
    return [
        Point(
            f"{name} {row['variant']}",
            "bf16" if row["variant"] in _16BIT else "fp8",
            row["gb_per_s"],
            row.get("tflop_per_s"),
        )
        for name, results in found.items()
        for row in results["rows"]
        if name != "ceilings" and row.get("gb_per_s") and row["variant"] not in _LEFT_OUT
    ]


def ceilings(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The best rates measured: "copy" in GB/s, "fp8" and "bf16" in TFLOP/s, where there are any.

    A product's ceiling is the best of ``ceilings.run`` and of all other products: the largest is
    not the fastest, for it is the hottest.
    """
    limits: dict[str, float] = {}
    for row in found["ceilings"]["rows"] if "ceilings" in found else []:
        if rate := row.get("gb_per_s" if row["variant"] == "copy" else "tflop_per_s"):
            limits[row["variant"]] = rate
    for point in points(found):
        if point.tflop_per_s and point.unit in limits:
            limits[point.unit] = max(limits[point.unit], point.tflop_per_s)
    return limits


def by_kernel(found: Iterable[Point]) -> dict[str, list[Point]]:
    """Kernel -> its points, in the order in which they come."""
    groups: dict[str, list[Point]] = {}
    for point in found:
        groups.setdefault(point.kernel, []).append(point)
    return groups


def share(point: Point, limits: dict[str, float]) -> float:
    """Of the rate that memory and tensor cores, whichever binds, would allow."""
    of_memory = point.gb_per_s / limits["copy"]
    if point.tflop_per_s is None or point.unit not in limits:
        return of_memory
    return max(of_memory, point.tflop_per_s / limits[point.unit])
