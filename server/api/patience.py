"""How long to wait for work: until its deadline, and only while its client is there."""

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
"""Key of the `Sender` in the `extensions` of a request's scope, if our own connections serve it."""


class Sender(Protocol):
    """The sender of a request, as its connection knows it."""

    @property
    def has_sent_all(self) -> bool:
        """Whether the request has arrived completely."""

    def when_gone(self, tell: Callable[[], None] | None) -> None:
        """Sets the function to call when the client has left (soon, if it already has); None calls none."""


def client_of(scope: Mapping[str, Any]) -> Sender | None:
    """The sender of a request; None if another server than ours serves it."""
    extensions = scope.get("extensions")
    return None if extensions is None else extensions.get(CLIENT)


async def unless_client_leaves(request: Request, work: Awaitable[T]) -> T:
    """Awaits work, but cancels it as soon as the client hangs up, because nobody would read the result."""
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
        if has_left and ours.uncancel() == 0:  # otherwise something else cancels this task, too
            raise ClientGoneError("the client hung up") from None
        raise
    finally:
        is_waiting = False
        forget()


def _watch(request: Request, leave: Callable[[], None]) -> Callable[[], object]:
    """Calls a function when the client has left; returns the function that stops this."""
    client = client_of(request.scope)
    if client is not None:
        client.when_gone(leave)
        return lambda: client.when_gone(None)
    leaving = asyncio.ensure_future(_disconnected(request))  # costs a task, but works under any server
    leaving.add_done_callback(lambda leaving: None if leaving.cancelled() else leave())
    return leaving.cancel


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class at_most:
    """Cancels work that takes longer, and raises DeadlineError; an async context manager.

    Args:
        timeout_s: Longest time.
        since: When the time began, by time.monotonic(); now by default.
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
        if isinstance(error, DeadlineError):  # an engine's error names only the time that was left for it
            raise DeadlineError(f"no answer within {self._timeout_s:.3g} s", timeout_s=self._timeout_s) from None
