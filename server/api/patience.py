"""How long work is waited for: not past its time, and not after its client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

from fastapi import Request

from server.errors import ClientGoneError, DeadlineError

T = TypeVar("T")


async def unless_client_leaves(request: Request, work: Awaitable[T]) -> T:
    """Waits for work that is withdrawn as soon as the client hangs up: nobody would read its result."""
    ours = asyncio.current_task()
    assert ours is not None
    is_waiting, has_left = True, False

    def leave(leaving: asyncio.Future[None]) -> None:
        nonlocal has_left
        if is_waiting and not leaving.cancelled():
            has_left = True
            ours.cancel()

    leaving = asyncio.ensure_future(_disconnected(request))
    leaving.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and ours.uncancel() == 0:  # else somebody else wants this to end, too
            raise ClientGoneError("the client hung up") from None
        raise
    finally:
        is_waiting = False
        leaving.cancel()


@asynccontextmanager
async def at_most(timeout_s: float) -> AsyncIterator[None]:
    """Withdraws what takes longer, and raises DeadlineError."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise DeadlineError(f"no answer within {timeout_s:.3g} s") from None


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
