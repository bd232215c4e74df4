"""Counts of recent uses, so that an item in frequent use is not dropped for one with a few uses."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

HALVED_AFTER = 1024
"""Uses after which all counts are halved. So old uses count less, and at most twice as many keys are counted."""


class Uses(Generic[K]):
    """Counts uses of keys, which clients choose freely."""

    def __init__(self) -> None:
        self._counts: dict[K, int] = {}
        self._since = 0

    def __len__(self) -> int:
        return len(self._counts)

    def note(self, key: K) -> int:
        """Counts one more use; returns the count."""
        self._since += 1
        if self._since >= HALVED_AFTER:
            self._since = 0
            self._counts = {each: count // 2 for each, count in self._counts.items() if count > 1}
        self._counts[key] = count = self._counts.get(key, 0) + 1
        return count

    def of(self, key: K) -> int:
        """The recent uses of a key."""
        return self._counts.get(key, 0)

    def least(self, keys: Iterable[K]) -> K:
        """The least used of some keys; of several, the first."""
        return min(keys, key=self.of)
