"""Makes slow things on a separate thread, and hands them to the one thread that requests them."""

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
"""Most requested things that wait, because clients name them freely. A further one must be requested again later."""

RETRY_S, LONGEST_RETRY_S = 60.0, 3600.0
"""Seconds without a new try after a failure. The time doubles with every further failure. So a full disk or a killed
process is tried again soon, and a lasting failure costs one try an hour."""

_MOST_FAILURES = 256

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Progress(NamedTuple, Generic[K]):
    """The progress of the thread.

    Attributes:
        key: The key that it makes now.
        done: Things made since the thread was last idle.
        total: Things that are made, are being made, or wait.
    """

    key: K
    done: int
    total: int


class Later(Generic[K, V]):
    """Makes one thing at a time: first the requested ones, the most requested first; then the planned ones, in order.

    A waiting thing is never dropped for another. The thread changes only state under the lock of this object. A made
    value belongs to the thread that takes it. The thread is a daemon: a process that ends does not wait for it.

    Args:
        make: Makes the value of a key, on the thread here.
        name_of: Gives the name of a key in the log.
        name: Name of the thread.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        make: Callable[[K], V],
        name_of: Callable[[K], str],
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make, self._name_of, self._name, self._clock = make, name_of, name, clock
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
        """Number of requested things that wait, the one that is made now, and those that were not taken yet."""
        with self._lock:
            return len(self._asked) + (self._making is not None and self._making not in self._made) + len(self._made)

    def ask(self, key: K) -> None:
        """Requests a thing, which is made before planned ones; does nothing if it was made, or has just failed."""
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
        """Plans things, which are made while no requested one waits."""
        with self._lock:
            self._planned |= {key: None for key in keys if not self._is_known(key) and key not in self._asked}
            self._begin()

    def then(self, made: Callable[[K], None]) -> None:
        """Sets a function to call with every finished key, on this object's thread, before the next one begins."""
        self._on_made = made

    def take(self) -> dict[K, V]:
        """The things made since the last call, in order."""
        if not self._made:  # most calls; a value that comes at this moment is taken by the next
            return {}
        with self._lock:
            made, self._made = self._made, {}
        return made

    def progress(self) -> Progress[K] | None:
        """The progress; None while the thread is idle."""
        with self._lock:
            if self._making is None:
                return None
            return Progress(self._making, self._num_done, self._num_done + 1 + len(self._asked) + len(self._planned))

    def close(self) -> None:
        """Begins nothing more. The thing that is being made continues; the caller need not wait for it."""
        with self._lock:
            self._is_closed = True
            self._asked.clear()
            self._planned.clear()
            self._on_made = lambda key: None  # it may hold a reference to this object

    def _is_known(self, key: K) -> bool:
        _, not_before = self._failures.get(key, (0, -math.inf))
        return self._is_closed or key == self._making or key in self._made or self._clock() < not_before

    def _begin(self) -> None:
        """Starts the thread if none runs and something waits; called under the lock."""
        if self.thread is None and (first := self._next()) is not None:
            self.thread = threading.Thread(target=self._work, args=(first,), name=self._name, daemon=True)
            self.thread.start()

    def _next(self) -> K | None:
        """Removes the next thing to make from the waiting ones; called under the lock."""
        self._making = None
        if self._asked:
            self._making = max(self._asked, key=self._asked.__getitem__)  # the first of equals
            del self._asked[self._making]
            self._is_full = False
        elif self._planned:
            self._making = next(iter(self._planned))
            del self._planned[self._making]
        return self._making

    def _work(self, first: K) -> None:
        """The thread's function: makes things until none waits."""
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
        except Exception:  # the thread has no caller
            with self._lock:
                retry_s = self._failed(key)
            self._say("making %s has failed; it is not tried again for %g s", self._name_of(key), retry_s)
            return
        with self._lock:
            self._failures.pop(key, None)
            self._made[key] = value
        del value
        try:
            self._on_made(key)
        except Exception:
            self._say("%s is made, but what follows on it has failed", self._name_of(key))

    def _say(self, message: str, *args: object) -> None:
        """Logs the current exception, unless this object was closed, which may be its cause."""
        if not self._is_closed:
            logger.exception(message, *args)

    def _failed(self, key: K) -> float:
        """Records a failure; returns the seconds until the next try."""
        before, _ = self._failures.get(key, (0, 0.0))
        retry_s = min(RETRY_S * 2.0 ** min(before, 16), LONGEST_RETRY_S)
        self._failures[key] = before + 1, self._clock() + retry_s
        return retry_s

    def _say_full(self, key: K) -> None:
        """Logs once, each time that the queue becomes full."""
        if not self._is_full:
            logger.warning(
                "%d wait to be made; %s and others must be asked for again", MOST_WAITING, self._name_of(key)
            )
        self._is_full = True
