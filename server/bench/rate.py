"""The highest rate of a Poisson load that keeps the 99th percentile of latency under a bound, and nothing fails.

Source: the Server scenario of MLPerf Inference (Reddi et al., ISCA 2020), whose metric this is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from server.intervals import wilson

ALLOWED = 0.01  # of the requests may take longer than the bound: that is what p99 means
MOST_RUNS, ENOUGH = 3, 400  # of one rate: from 381 requests on, none over the bound is a verdict at 95 %
TOLERANCE = 0.03
GROWTH = 1.5
LEAST = 1 / 32  # of the first rate: what fails there fails for other reasons than the load


@dataclass(frozen=True, slots=True)
class Probe:
    """What a rate came to.

    Attributes:
        sent: Requests.
        over: Those of them that were answered after the bound.
        unanswered: Those that were refused or failed; one is too many.
        lagged: The sender was late itself.
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
        """Whether the rate keeps the bound, as far as these requests say."""
        return self.unanswered == 0 and self.over <= ALLOWED * self.sent

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share over the bound, as if requests were independent."""
        return wilson(self.over, self.sent)

    @property
    def sure(self) -> bool:
        """Whether the verdict holds at 95 %."""
        low, high = self.interval
        return self.unanswered > 0 or high < ALLOWED or low > ALLOWED


@dataclass(frozen=True, slots=True)
class Found:
    """Where the highest rate lies.

    Attributes:
        per_s: The highest rate that passed; 0 where none did.
        fails_at: The lowest rate above it that did not pass.
        passed: What was seen at `per_s`, None where nothing passed.
        failed: What was seen at `fails_at`.
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
    """Bisects between a rate that passes and one that does not, until they are 3 % apart.

    Args:
        probe: Tries a rate, per second, for a while.
        start: Where to begin: about what the server can do.
        tell: Hears of every verdict.
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
    """Tries a rate for as long as the verdict is a near thing: few requests are enough to fail, not to pass."""
    seen, runs = probe(per_s), 1
    while not seen.sure and (runs < MOST_RUNS or seen.sent < ENOUGH):
        seen, runs = seen + probe(per_s), runs + 1
    return seen
