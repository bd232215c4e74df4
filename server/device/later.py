"""What takes long to make is made later, on a thread of its own, and handed to the one thread that asks for it."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from server.recent import Recent

logger = logging.getLogger(__name__)

MOST_WAITING = 64
"""Things that wait to be made: any client may name others. The one that nobody has asked for longest is given up."""

RETRY_S, LONGEST_RETRY_S = 60.0, 3600.0
"""How long after a failure it is not tried again, which doubles with every further one: a disk that was full, or a
process that was killed, may do better, and what never works costs a try an hour."""

_MOST_FAILURES = 256

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Later(Generic[K, V]):
    """Makes what is asked for, one at a time. What was asked for last comes first: it is in use.

    Its thread touches nothing but what stands under the lock here; what it made is of whoever takes it. Call it from
    one thread.

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
        self._make, self._told, self._clock = make, told, clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: OrderedDict[K, None] = OrderedDict()
        self._has_given_up = False
        self._making: K | None = None
        self._made: dict[K, V] = {}
        self._failures = Recent[K, tuple[int, float]](_MOST_FAILURES)

    def __len__(self) -> int:
        """Things that wait, are being made, or were not taken yet."""
        with self._lock:
            return len(self._waiting) + (self._making is not None) + len(self._made)

    def ask(self, key: K) -> None:
        """Has it made in its turn; nothing where it was made and not taken, or has failed a short while ago."""
        with self._lock:
            _, not_before = self._failures.get(key, (0, -math.inf))
            if key == self._making or key in self._made or self._clock() < not_before:
                return
            self._waiting[key] = None
            self._waiting.move_to_end(key)
            if len(self._waiting) > MOST_WAITING:
                given_up, _ = self._waiting.popitem(last=False)
                self._say_given_up(given_up)
            if self._making is None:
                self._start()

    def take(self) -> dict[K, V]:
        """What was made since the last call, in its order."""
        with self._lock:
            made, self._made = self._made, {}
        return made

    def _start(self) -> None:
        """Begins with what was asked for last. Each is a task: an ending process waits for all that were begun."""
        self._making = None
        if self._waiting:
            self._making, _ = self._waiting.popitem()
            with contextlib.suppress(RuntimeError):  # the process ends, and begins nothing
                self._thread.submit(self._make_now, self._making)
        else:
            self._has_given_up = False

    def _make_now(self, key: K) -> None:
        try:
            value = self._make(key)
        except Exception:  # there is nobody to raise to
            with self._lock:
                retry_s = self._failed(key)
                self._start()
            logger.exception("making %s has failed; it is not tried again for %g s", self._told(key), retry_s)
            return
        with self._lock:
            self._failures.pop(key, None)
            self._made[key] = value
            self._start()

    def _failed(self, key: K) -> float:
        """Notes a failure; gives the seconds until the next try."""
        before, _ = self._failures.get(key, (0, 0.0))
        retry_s = min(RETRY_S * 2.0 ** min(before, 16), LONGEST_RETRY_S)
        self._failures[key] = before + 1, self._clock() + retry_s
        return retry_s

    def _say_given_up(self, key: K) -> None:
        """Says it once for each time that there are too many."""
        if not self._has_given_up:
            logger.warning(
                "more than %d wait to be made, so %s and others do no more until they are asked for again",
                MOST_WAITING,
                self._told(key),
            )
        self._has_given_up = True
