"""A limit on the memory that several tasks use at once. They take turns."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Turns:
    """Shared memory and places, first come, first served; for one event loop.

    Args:
        memory: Bytes for all tasks.
        places: Most tasks at once.
    """

    def __init__(self, memory: int, places: int) -> None:
        self._memory, self._places = memory, places
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def turn(self, memory: int) -> AsyncIterator[None]:
        """Holds a place and this much memory, which must not exceed the whole."""
        await self._take(memory)
        try:
            yield
        finally:
            self._give_back(memory)

    async def _take(self, memory: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((memory, turn))
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting = deque(waiting for waiting in self._waiting if waiting[1] is not turn)
                self._next()  # smaller ones may have waited behind it
            else:
                self._give_back(memory)  # its turn came at the same moment
            raise

    def _give_back(self, memory: int) -> None:
        self._memory += memory
        self._places += 1
        self._next()

    def _next(self) -> None:
        while self._waiting and self._places and self._waiting[0][0] <= self._memory:
            memory, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._memory -= memory
                self._places -= 1
                turn.set_result(None)
