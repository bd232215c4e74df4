"""The number and timing of retries. Pure: the caller has the clock, the random numbers and the sleep."""

from __future__ import annotations

from dataclasses import dataclass
from email.utils import parsedate_to_datetime

_FIRST_S = 0.1
_DOUBLINGS = 6


@dataclass(frozen=True, slots=True)
class Retries:
    """Retries when a server is full, restarts or hangs up.

    Attributes:
        count: Tries after the first; 0 for none.
        budget_s: Seconds after the start of a call within which a try may begin; a shorter `deadline_ms` limits it
            further. If the next wait would end later, the call fails at once.
    """

    count: int = 5
    budget_s: float = 30.0

    def wait_s(self, tries: int, elapsed_s: float, asked_s: float | None, chance: float) -> float | None:
        """Seconds to wait before the next try; None if there is none.

        Callers that were refused together must not return together: after the server's own delay, each waits a random
        part of 0.1 s, 0.2 s, 0.4 s and so on up to 6.4 s.

        Args:
            tries: Failed tries, from 1.
            elapsed_s: Seconds since the first one began.
            asked_s: The server's `Retry-After`.
            chance: A random number, 0 to 1.
        """
        if tries > self.count:
            return None
        wait_s = (asked_s or 0.0) + chance * _FIRST_S * 2 ** min(tries - 1, _DOUBLINGS)
        return wait_s if elapsed_s + wait_s < self.budget_s else None


def retry_after_s(said: str | None, now: float) -> float | None:
    """Parses a `Retry-After`, seconds or a date (RFC 9110, section 10.2.3); `now` is in seconds since 1970."""
    said = (said or "").strip()
    if said.isascii() and said.isdigit():
        return float(said)
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - now)
    except (ValueError, OverflowError):
        return None
