"""What takes long to make is made later, on a thread of its own, and handed to the one thread that asks for it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

from server.recent import Recent

logger = logging.getLogger(__name__)

MOST_WAITING = 64
"""Things asked for that wait: any client may name others. While so many wait, a new one must be asked for again."""

RETRY_S, LONGEST_RETRY_S = 60.0, 3600.0
"""How long after a failure it is not tried again. The time doubles with every further failure: a full disk or a killed
process may do better soon, and what never works costs one try an hour."""

_MOST_FAILURES = 256

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Progress(NamedTuple, Generic[K]):
    """How far the thread has come.

    Attributes:
        key: What it makes now.
        done: Things made since the thread last had nothing to do.
        total: These, the one of now, and those that wait.
    """

    key: K
    done: int
    total: int


class Later(Generic[K, V]):
    """Makes one thing at a time: first what was asked for, the most often asked first; then what is planned, in order.

    Nothing that waits is given up for another. The thread touches nothing but what stands under the lock here; what it
    made belongs to the thread that takes it. The thread is a daemon: a process that ends does not wait for it.

    Args:
        make: Makes the value of a key, on the thread here.
        told: What a key is called in the log.
        name: Of the thread.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        make: Callable[[K], V],
        told: Callable[[K], str],
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make, self._told, self._name, self._clock = make, told, name, clock
        self._on_made: Callable[[K], None] = lambda key: None
        self._lock = threading.Lock()
        self._asked: dict[K, int] = {}
        self._planned: dict[K, None] = {}
        self._making: K | None = None
        self._made: dict[K, V] = {}
        self._num_done = 0
        self._failures = Recent[K, tuple[int, float]](_MOST_FAILURES)
        self._is_closed = False
        self._is_full = False
        self.thread: threading.Thread | None = None

    def __len__(self) -> int:
        """Things that were asked for and wait, the one that is made now, and those that nobody has taken yet."""
        with self._lock:
            return len(self._asked) + (self._making is not None and self._making not in self._made) + len(self._made)

    def ask(self, key: K) -> None:
        """Has a thing made before what is only planned; nothing where it was made, or has failed a short while ago."""
        with self._lock:
            if self._is_known(key):
                return
            if key not in self._asked and len(self._asked) >= MOST_WAITING:
                self._say_full(key)
                return
            self._planned.pop(key, None)
            self._asked[key] = self._asked.get(key, 0) + 1
            self._begin()

    def plan(self, keys: Iterable[K]) -> None:
        """Has things made while nothing else is asked for."""
        with self._lock:
            self._planned |= {key: None for key in keys if not self._is_known(key) and key not in self._asked}
            self._begin()

    def then(self, made: Callable[[K], None]) -> None:
        """Has a function called with every key that was made, on the thread here, before the next one is begun."""
        self._on_made = made

    def take(self) -> dict[K, V]:
        """What was made since the last call, in its order."""
        if not self._made:  # most calls; a value that comes at this moment is taken by the next
            return {}
        with self._lock:
            made, self._made = self._made, {}
        return made

    def progress(self) -> Progress[K] | None:
        """How far it has come; None while there is nothing to do."""
        with self._lock:
            if self._making is None:
                return None
            return Progress(self._making, self._num_done, self._num_done + 1 + len(self._asked) + len(self._planned))

    def close(self) -> None:
        """Begins nothing more. What is being made goes on; nobody has to wait for it."""
        with self._lock:
            self._is_closed = True
            self._asked.clear()
            self._planned.clear()
            self._on_made = lambda key: None  # what it holds may hold us

    def _is_known(self, key: K) -> bool:
        _, not_before = self._failures.get(key, (0, -math.inf))
        return self._is_closed or key == self._making or key in self._made or self._clock() < not_before

    def _begin(self) -> None:
        """Starts the thread where there is none and something waits; called under the lock."""
        if self.thread is None and (first := self._next()) is not None:
            self.thread = threading.Thread(target=self._work, args=(first,), name=self._name, daemon=True)
            self.thread.start()

    def _next(self) -> K | None:
        """Takes what is made next out of those that wait; called under the lock."""
        self._making = None
        if self._asked:
            self._making = max(self._asked, key=self._asked.__getitem__)  # of equals the first
            del self._asked[self._making]
            self._is_full = False
        elif self._planned:
            self._making = next(iter(self._planned))
            del self._planned[self._making]
        return self._making

    def _work(self, first: K) -> None:
        """Makes what waits, until nothing does: what the thread runs."""
        key: K | None = first
        while key is not None:
            self._make_now(key)
            with self._lock:
                self._num_done += 1
                key = self._next()
                if key is None:
                    self._num_done, self.thread = 0, None

    def _make_now(self, key: K) -> None:
        try:
            value = self._make(key)
            with self._lock:
                self._failures.pop(key, None)
                self._made[key] = value
            del value
            self._on_made(key)
        except Exception:  # there is nobody to raise to
            if self._is_closed:
                return
            with self._lock:
                retry_s = self._failed(key)
            logger.exception("making %s has failed; it is not tried again for %g s", self._told(key), retry_s)

    def _failed(self, key: K) -> float:
        """Notes a failure; gives the seconds until the next try."""
        before, _ = self._failures.get(key, (0, 0.0))
        retry_s = min(RETRY_S * 2.0 ** min(before, 16), LONGEST_RETRY_S)
        self._failures[key] = before + 1, self._clock() + retry_s
        return retry_s

    def _say_full(self, key: K) -> None:
        """Says it once for each time that the queue is full."""
        if not self._is_full:
            logger.warning("%d wait to be made; %s and others must be asked for again", MOST_WAITING, self._told(key))
        self._is_full = True
