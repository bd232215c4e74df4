"""How long work is waited for: not past its time, and not after its client has left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, TypeVar

from fastapi import Request

from server.errors import ClientGoneError, DeadlineError

T = TypeVar("T")

CLIENT = "tome.client"
"""Among the `extensions` of a request's scope, where our own connections serve it: its `Sender`."""


class Sender(Protocol):
    """Who sends a request, as their connection knows them."""

    @property
    def has_sent_all(self) -> bool:
        """Whether nothing of the request is still to come."""

    def when_gone(self, tell: Callable[[], None] | None) -> None:
        """Calls a function when they have left, soon where they have already; or, with None, calls none any more."""


def client_of(scope: Mapping[str, Any]) -> Sender | None:
    """Who sends a request; None where another server than ours serves it."""
    extensions = scope.get("extensions")
    return None if extensions is None else extensions.get(CLIENT)


async def unless_client_leaves(request: Request, work: Awaitable[T]) -> T:
    """Waits for work that is withdrawn as soon as the client hangs up: nobody would read its result."""
    ours = asyncio.current_task()
    assert ours is not None
    is_waiting, has_left = True, False

    def leave() -> None:
        nonlocal has_left
        if is_waiting:
            has_left = True
            ours.cancel()

    forget = _watch(request, leave)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and ours.uncancel() == 0:  # else somebody else wants this to end, too
            raise ClientGoneError("the client hung up") from None
        raise
    finally:
        is_waiting = False
        forget()


def _watch(request: Request, leave: Callable[[], None]) -> Callable[[], object]:
    """Calls a function when the client has left; gives what ends that."""
    client = client_of(request.scope)
    if client is not None:
        client.when_gone(leave)
        return lambda: client.when_gone(None)
    leaving = asyncio.ensure_future(_disconnected(request))  # costs a task, but holds under any server
    leaving.add_done_callback(lambda leaving: None if leaving.cancelled() else leave())
    return leaving.cancel


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class at_most:
    """Withdraws what takes longer, and raises DeadlineError.

    Args:
        timeout_s: How long it may take.
        since: When it began, by time.monotonic(); now where it is not said.
    """

    def __init__(self, timeout_s: float, since: float | None = None) -> None:
        left_s = timeout_s if since is None else since + timeout_s - time.monotonic()
        self._timeout_s, self._timeout = timeout_s, asyncio.timeout(left_s)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            error = DeadlineError("")
        if isinstance(error, DeadlineError):  # an engine's names what was left when it came there
            raise DeadlineError(f"no answer within {self._timeout_s:.3g} s", timeout_s=self._timeout_s) from None
