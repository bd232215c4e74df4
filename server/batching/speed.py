"""How long batches take and how many jobs arrive: estimates that follow the device and the load.

Times on a shared machine have outliers: a stall makes one batch a hundred times longer. One batch that is far off what
was expected moves an estimate by little. Two in a row, both too long or both too short, replace it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from server.recent import Recent

K = TypeVar("K", bound=Hashable)

FORGET = 0.97
"""The factor by which each new batch lowers the weight of earlier ones: about the last thirty count."""

MOST_LEARNED = 256
"""Keys whose lines were learned from batches alone: any client may name another list of `r`."""

LONGEST, SHORTEST = 4.0, 0.5
"""Times what was expected: beyond these a batch is far off."""

FADE_S = 5.0
"""While batches of other keys run and none of a key, its own factor fades in this time to that of all keys."""


class Mean:
    """A moving mean of times, or of factors, that one outlier hardly moves.

    Args:
        gain: The weight of each new number.
        value: Where it starts; None where the first number is the start.

    Attributes:
        value: The mean; 0 before the first number.
    """

    __slots__ = ("_far", "_gain", "value")

    def __init__(self, gain: float, value: float | None = None) -> None:
        self._gain = gain
        self.value = value or 0.0
        self._far: tuple[bool, float] | None = None

    def doubt(self) -> None:
        """Marks the mean as old: the next number replaces it, if that is far smaller."""
        self._far = False, 0.0

    def add(self, number: float) -> None:
        """Moves the mean towards a number."""
        mean, before, self._far = self.value, self._far, None
        if mean == 0:
            self.value = number
            return
        longest, shortest = LONGEST * mean, SHORTEST * mean
        if not shortest <= number <= longest:
            is_long = number > longest
            self._far = is_long, number
            if before is not None and before[0] == is_long:
                self.value = min(before[1], number) if is_long else max(before[1], number)
                return
        self.value = mean + self._gain * (min(number, longest) - mean)


@dataclass(slots=True)
class _Line:
    """The least squares line through batches of n jobs that took t seconds, as weighted sums.

    Beyond the sizes that were seen a line is a guess. So a batch is too long where it took far more than batches of its
    size or larger ones, and too short where it took far less than batches of its size or smaller ones.
    """

    weight: float = 0.0
    n: float = 0.0
    n2: float = 0.0
    t: float = 0.0
    nt: float = 0.0
    far: tuple[bool, tuple[tuple[int, float], ...]] | None = None

    def doubt(self) -> None:
        """Marks the line as old: the next batch replaces all before it, if it takes far less time than expected."""
        self.far = False, ()

    def add(self, n: int, seconds: float) -> None:
        """Learns of a batch."""
        if not self.weight:
            return self._count(n, seconds)
        (a, b), usual = self.line(), self.n / self.weight
        longest, shortest = LONGEST * (a + b * max(n, usual)), SHORTEST * (a + b * min(n, usual))
        before, self.far = self.far, None
        if not shortest <= seconds <= longest:
            self.far = seconds > longest, ((n, seconds),)
            if before is not None and before[0] == self.far[0]:
                self.weight = self.n = self.n2 = self.t = self.nt = 0.0
                for batch in before[1]:
                    self._count(*batch)
                return self._count(n, seconds)
        self._count(n, min(seconds, longest))

    def _count(self, n: int, seconds: float) -> None:
        self.weight = FORGET * self.weight + 1
        self.n = FORGET * self.n + n
        self.n2 = FORGET * self.n2 + n * n
        self.t = FORGET * self.t + seconds
        self.nt = FORGET * self.nt + n * seconds

    def line(self) -> tuple[float, float]:
        """a and b of the line a + b n, neither below zero."""
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

    If a line was measured before, batches show by what factor the device differs from it now. Such lines are kept.
    Other lines are fitted to the batches alone, and the one of the key that ran longest ago is forgotten.

    A slower backend may compute a key until its own backend is ready (the fallback). The two have lines of their own.

    Args:
        clock: Monotonic seconds.
        is_fallback: Whether the fallback computes a key at this moment.

    Attributes:
        is_fallback: As given.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        is_fallback: Callable[[K], bool] = lambda key: False,
    ) -> None:
        self._clock, self.is_fallback = clock, is_fallback
        self._known: dict[K, tuple[float, float]] = {}
        self._factors: dict[K, tuple[Mean, float]] = {}  # and when the last batch of the key ran
        self._overall = Mean(0.1, 1.0)
        self._latest: K | None = None  # the known key whose batch ran last
        self._learned = Recent[K, _Line](MOST_LEARNED)
        self._fallbacks = Recent[K, _Line](MOST_LEARNED)

    def expect(self, key: K, a: float, b: float) -> None:
        """Sets the measured line of a key, in seconds."""
        self._known[key] = (a, b)
        self._factors.pop(key, None)
        self._learned.pop(key, None)

    def forget(self, is_gone: Callable[[K], bool]) -> None:
        """Forgets keys that are no longer used."""
        for of_key in (self._known, self._factors, self._learned, self._fallbacks):
            for key in [key for key in of_key if is_gone(key)]:
                del of_key[key]

    def observe(self, key: K, n: int, seconds: float, was_fallback: bool = False) -> None:
        """Learns the time of a batch of n, computed by the key's own backend or by the fallback."""
        if was_fallback:
            _learn(self._fallbacks, key, n, seconds)
        elif key in self._known:
            a, b = self._known[key]
            factor = seconds / (a + b * n)
            own = self._own_factor(key)
            own.value = self._factor(key)
            own.add(factor)
            self._factors[key] = own, self._clock()
            self._overall.add(factor)
            self._latest = key
        else:
            _learn(self._learned, key, n, seconds)

    def doubt(self, key: K) -> None:
        """Marks the estimate of a key as old: the next batch replaces it, if that takes far less time than expected."""
        if self.is_fallback(key):
            if key in self._fallbacks:
                self._fallbacks[key].doubt()
        elif key in self._known:
            self._own_factor(key).doubt()
        elif key in self._learned:
            self._learned[key].doubt()

    def line(self, key: K) -> tuple[float, float] | None:
        """a and b in seconds for the backend that computes the key now, or None if unknown."""
        if self.is_fallback(key) and key in self._fallbacks:
            return self._fallbacks[key].line()
        return self.own_line(key)

    def own_line(self, key: K) -> tuple[float, float] | None:
        """a and b in seconds for the key's own backend, even if the fallback computes it now; None if unknown."""
        if key in self._known:
            factor = self._factor(key)
            return self._known[key][0] * factor, self._known[key][1] * factor
        return self._learned[key].line() if key in self._learned else None

    def __call__(self, key: K, n: int) -> float:
        """Seconds that a batch of n is expected to take; 0 where nothing is known."""
        a, b = self.line(key) or (0.0, 0.0)
        return a + b * n

    def _own_factor(self, key: K) -> Mean:
        return self._factors.setdefault(key, (Mean(0.1), -math.inf))[0]

    def _factor(self, key: K) -> float:
        """By how much the device is off the known line of a key at this moment."""
        own, at = self._factors.get(key, (self._overall, -math.inf))
        if key == self._latest and at > -math.inf:  # no key has anything newer
            return own.value
        overall = self._overall.value
        return overall + (own.value - overall) * math.exp((at - self._clock()) / FADE_S)


def _learn(lines: Recent[K, _Line], key: K, n: int, seconds: float) -> None:
    line = lines.get(key) or _Line()
    line.add(n, seconds)
    lines[key] = line


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
