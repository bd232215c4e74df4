"""One timer for many deadlines: the event loop holds only the nearest one."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable


class Deadlines:
    """Calls a function at the nearest of its deadlines.

    Args:
        expire: Ends what is due at a time and returns the next deadline; infinity if there is none.
        clock: The clock of the deadlines, in seconds.
    """

    def __init__(self, expire: Callable[[float], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._expire, self._clock = expire, clock
        self._next = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, deadline: float) -> None:
        """Adds a deadline."""
        if deadline >= self._next:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._next = deadline
        self._timer = asyncio.get_running_loop().call_later(max(0.0, deadline - self._clock()), self._due)

    def close(self) -> None:
        """Forgets all deadlines."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._next = None, math.inf

    def _due(self) -> None:
        self._timer, self._next = None, math.inf
        self.watch(self._expire(self._clock()))
