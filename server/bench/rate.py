"""The highest rate of a Poisson load with the 99th percentile of latency under a bound and no failures.

Source: the Server scenario of MLPerf Inference (Reddi et al., ISCA 2020), whose metric this is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from server.intervals import wilson

ALLOWED = 0.01  # largest share of requests over the bound, by the definition of p99
MOST_RUNS, ENOUGH = 3, 400  # for one rate: with 381 requests or more, none over the bound is significant at 95 %
TOLERANCE = 0.03
GROWTH = 1.5
LEAST = 1 / 32  # of the first rate: a lower rate fails for other reasons than the load


@dataclass(frozen=True, slots=True)
class Probe:
    """The result of a rate.

    Attributes:
        sent: Requests.
        over: Requests that were answered after the bound.
        unanswered: Requests that were refused or failed; one is too many.
        lagged: Whether the sender was late itself.
    """

    sent: int
    over: int
    unanswered: int
    lagged: bool = False

    def __add__(self, other: Probe) -> Probe:
        return Probe(
            self.sent + other.sent,
            self.over + other.over,
            self.unanswered + other.unanswered,
            self.lagged or other.lagged,
        )

    @property
    def passed(self) -> bool:
        """Whether the rate keeps the bound, by these requests."""
        return self.unanswered == 0 and self.over <= ALLOWED * self.sent

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share over the bound, for independent requests."""
        return wilson(self.over, self.sent)

    @property
    def sure(self) -> bool:
        """Whether the verdict holds at 95 %."""
        low, high = self.interval
        return self.unanswered > 0 or high < ALLOWED or low > ALLOWED


@dataclass(frozen=True, slots=True)
class Found:
    """The highest rate.

    Attributes:
        per_s: The highest rate that passed; 0 if none did.
        fails_at: The lowest higher rate that failed.
        passed: The result at `per_s`; None if none passed.
        failed: The result at `fails_at`.
    """

    per_s: float
    fails_at: float
    passed: Probe | None
    failed: Probe

    @property
    def sure(self) -> bool:
        """Whether both verdicts hold at 95 %."""
        return self.failed.sure and (self.passed is None or self.passed.sure)


def find_rate(probe: Callable[[float], Probe], start: float, tell: Callable[[float, Probe], None]) -> Found:
    """Bisects between a rate that passes and one that fails, until they are 3 % apart.

    Args:
        probe: Tries a rate, per second, for a while.
        start: The first rate: about the server's capacity.
        tell: Called with every verdict.
    """
    low, passed = 0.0, None
    high, failed = math.inf, None
    per_s = start
    while failed is None or (high - low > TOLERANCE * high and high > LEAST * start):
        seen = _judge(probe, per_s)
        tell(per_s, seen)
        if seen.passed:
            low, passed = per_s, seen
        else:
            high, failed = per_s, seen
        per_s = GROWTH * low if failed is None else (low + high) / 2
    return Found(low, high, passed, failed)


def _judge(probe: Callable[[float], Probe], per_s: float) -> Probe:
    """Tries a rate until the verdict is clear. A failure needs few requests, a pass needs many."""
    seen, runs = probe(per_s), 1
    while not seen.sure and (runs < MOST_RUNS or seen.sent < ENOUGH):
        seen, runs = seen + probe(per_s), runs + 1
    return seen
