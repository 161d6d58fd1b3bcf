"""What is compared is timed by turns: a pair (n, 2n) of one and a pair of the next.

In each round in another order, so that none always follows the same one. Where arithmetic brings
the card to its limit of power, which takes a tenth of a second or so to slow it down, each runs for
a while right before its pair, without a pause: else what stands behind one, or behind something
lighter, would be the faster for it. So the card's clocks and heat are the same for all. Programs in
other processes take part: all they need is what ``Timed`` says.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

#: Seconds for a timing, of which it takes less where the pairs agree: where their median is known
#: to SETTLED of itself, two standard errors.
BUDGET_S = 0.15
SETTLED = 0.004
LEAST_PAIRS, MOST_PAIRS = 5, 40
#: Seconds for which what heats the card runs right before each of its pairs.
LEAD_S = 0.2
#: So many of these come on top of the budget.
LEADS = 10


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call, and how they were found.

    Attributes:
      us: median over pairs of ``(t(2n) - t(n)) / n``; of ``t(2n) / 2n`` where there is no GPU.
      us_min: of the fastest 2n and the fastest n.
      us_iqr: interquartile range of the pairs.
      calls: n.
      pairs: repetitions.
      leads: how many runs of both chains stood right before each pair; where the host's clock times
        a chain, none did.
    """

    us: float
    us_min: float
    us_iqr: float
    calls: int
    pairs: int
    leads: int


class Timed(Protocol):
    """What can be timed by turns with others; a program elsewhere will do."""

    calls: int

    def warm(self) -> None:
        """Runs it until its time is that of the runs to come."""

    def pair(self, leads: int = 1) -> tuple[float, float]:
        """Microseconds of n and of 2n calls, right behind ``leads`` times as many."""

    def facts(self) -> dict[str, Any]:
        """What else belongs into the row."""


class _Turns:
    """The pairs of one of those that are timed by turns."""

    def __init__(self, timed: Timed) -> None:
        self.timed = timed
        self.leads = 1
        self.pairs: list[tuple[float, float]] = []
        self.spent_s = 0.0
        self.failure: Exception | None = None

    def do(self, what: Callable[[], Any]) -> None:
        start = time.perf_counter()
        try:
            what()
        except Exception as error:  # One that fails loses no other.
            self.failure = error
        self.spent_s += time.perf_counter() - start

    def warm(self, lead_s: float) -> None:
        self.do(self.timed.warm)
        if lead_s and self.failure is None:
            self.do(lambda: self._lead(lead_s))
        self.spent_s = 0.0

    def _lead(self, lead_s: float) -> None:
        self.leads = max(1, math.ceil(1e6 * lead_s / max(1.0, sum(self.timed.pair()))))

    def take(self) -> None:
        self.do(lambda: self.pairs.append(self.timed.pair(self.leads)))

    def _each(self) -> list[float]:
        return [(long - short) / self.timed.calls for short, long in self.pairs]

    def done(self, budget_s: float) -> bool:
        if self.failure is not None:
            return True
        count = len(self.pairs)
        if count < LEAST_PAIRS:
            return False
        low, middle, high = statistics.quantiles(self._each(), n=4)
        # The standard error of a median, were the pairs normal: 1.25 x 0.74 IQR / sqrt(count).
        known = 2 * 0.93 * (high - low) / math.sqrt(count) < SETTLED * abs(middle)
        return known or count >= MOST_PAIRS or self.spent_s > budget_s

    def timing(self) -> Timing | Exception:
        if self.failure is not None:
            return self.failure
        low, middle, high = statistics.quantiles(self._each(), n=4)
        shorts, longs = zip(*self.pairs, strict=True)
        fastest = (min(longs) - min(shorts)) / self.timed.calls
        return Timing(middle, fastest, high - low, self.timed.calls, len(self.pairs), self.leads)


def by_turns(
    these: Sequence[Timed | Exception], budget_s: float = BUDGET_S, lead_s: float = 0.0
) -> list[dict[str, Any] | Exception]:
    """Times each for about ``budget_s`` after its warm-up, a pair of one and a pair of the next.

    Args:
      these: what to time; an exception, of one that could not be made, is passed on.
      budget_s: seconds for each; less is taken where its pairs agree.
      lead_s: seconds for which each runs right before each of its pairs.

    Returns:
      For each the fields of ``Timing`` and its own ``facts``, or the exception.
    """
    turns = [_Turns(timed) for timed in these if not isinstance(timed, Exception)]
    for turn in turns:
        turn.warm(lead_s)
    order = random.Random(0)
    while left := [turn for turn in turns if not turn.done(budget_s + LEADS * lead_s)]:
        for turn in order.sample(left, len(left)):
            turn.take()
    found: list[dict[str, Any] | Exception] = []
    by_timed = {id(turn.timed): turn.timing() for turn in turns}
    for timed in these:
        timing = timed if isinstance(timed, Exception) else by_timed[id(timed)]
        if isinstance(timing, Timing):
            assert not isinstance(timed, Exception)
            found.append({**dataclasses.asdict(timing), **timed.facts()})
        else:
            found.append(timing)
    return found
