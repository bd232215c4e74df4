"""How long batches take and how many jobs arrive: estimates that follow the device and the load."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from server.recent import Recent

K = TypeVar("K", bound=Hashable)

FORGET = 0.97
"""What each new batch leaves of the weight of those before it: the last thirty or so count."""

MOST_LEARNED = 256
"""Keys whose lines were learned from batches alone: any client may name another list of `r`."""


@dataclass(slots=True)
class _Sums:
    """Weighted sums over batches of n jobs that took t seconds."""

    weight: float = 0.0
    n: float = 0.0
    n2: float = 0.0
    t: float = 0.0
    nt: float = 0.0

    def add(self, n: int, seconds: float) -> None:
        self.weight = FORGET * self.weight + 1
        self.n = FORGET * self.n + n
        self.n2 = FORGET * self.n2 + n * n
        self.t = FORGET * self.t + seconds
        self.nt = FORGET * self.nt + n * seconds

    def line(self) -> tuple[float, float]:
        """a and b of the least squares line a + b n, neither below zero."""
        spread = self.n2 * self.weight - self.n * self.n
        if spread > 1e-9 * self.n2 * self.weight:
            b = (self.nt * self.weight - self.n * self.t) / spread
            a = (self.t - b * self.n) / self.weight
            if a >= 0 and b >= 0:
                return a, b
        if spread <= 1e-9 * self.n2 * self.weight or a < 0:  # one size alone, or all of it grows with n
            return 0.0, self.nt / self.n2
        return self.t / self.weight, 0.0


class Speed(Generic[K]):
    """Seconds of a batch of n jobs, a + b n for each key.

    Where a line is known beforehand, batches that run tell by what factor the device is now off it, and that is kept
    for good; else they are all that the line is fitted to, and the key that ran longest ago is forgotten.
    """

    def __init__(self) -> None:
        self._known: dict[K, tuple[float, float]] = {}
        self._factors: dict[K, float] = {}
        self._overall = 1.0
        self._sums = Recent[K, _Sums](MOST_LEARNED)

    def expect(self, key: K, a: float, b: float) -> None:
        """Tells the line of a key as it was measured, in seconds."""
        self._known[key] = (a, b)
        self._factors.pop(key, None)
        self._sums.pop(key, None)

    def observe(self, key: K, n: int, seconds: float) -> None:
        """Learns that a batch of n took so long."""
        if key in self._known:
            a, b = self._known[key]
            factor = seconds / (a + b * n)
            self._factors[key] = _nearer(self._factors.get(key, self._overall), factor)
            self._overall = _nearer(self._overall, factor)
        else:
            sums = self._sums.get(key) or _Sums()
            sums.add(n, seconds)
            self._sums[key] = sums

    def doubt(self, key: K) -> None:
        """Forgets that a key was slower than it was measured, or all that was learned of it."""
        self._sums.pop(key, None)
        if key in self._known:
            self._factors[key] = min(1.0, self._factors.get(key, self._overall))

    def line(self, key: K) -> tuple[float, float] | None:
        """a and b in seconds, or None for a key of which nothing is known."""
        if key in self._known:
            factor = self._factors.get(key, self._overall)
            return self._known[key][0] * factor, self._known[key][1] * factor
        return self._sums[key].line() if key in self._sums else None

    def __call__(self, key: K, n: int) -> float:
        """Seconds that a batch of n is expected to take; 0 where nothing is known."""
        a, b = self.line(key) or (0.0, 0.0)
        return a + b * n


def _nearer(mean: float, value: float) -> float:
    """A moving mean over the last ten or so; one wild value, as of a stalled machine, moves it little."""
    return mean + 0.1 * (min(value, 4 * mean) - mean)


class Rate:
    """Events a second, over about the last `window_s` seconds.

    Args:
        window_s: The time in which an event's weight falls to a third.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._sum = 0.0
        self._at = -math.inf

    def add(self, now: float, count: int = 1) -> None:
        """Notes events at this time, in seconds of any clock."""
        self._sum = self._decayed(now) + count
        self._at = now

    def __call__(self, now: float) -> float:
        return self._decayed(now) / self._window_s

    def _decayed(self, now: float) -> float:
        return self._sum * math.exp((self._at - now) / self._window_s) if self._sum else 0.0
