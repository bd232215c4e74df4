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
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError("the client hung up")
    finally:
        leaving.cancel()
        working.cancel()


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
