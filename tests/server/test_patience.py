"""How long work is waited for: the client's stay, under our own connections and under any server, and the deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import Request
from starlette.types import Message

from server.api.patience import CLIENT, at_most, unless_client_leaves
from server.errors import ClientGoneError, DeadlineError
from tests.server.conftest import until


class Caller:
    """A client that leaves when the test says so, as a connection of ours or as ASGI alone tells of it."""

    has_sent_all = True

    def __init__(self, ours: bool) -> None:
        self._gone = asyncio.Event()
        self.tell: Callable[[], None] | None = None
        extensions = {"extensions": {CLIENT: self}} if ours else {}
        self.request = Request({"type": "http", "headers": [], **extensions}, self._receive)

    def when_gone(self, tell: Callable[[], None] | None) -> None:
        self.tell = tell

    async def _receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def leave(self) -> None:
        self._gone.set()
        if self.tell is not None:
            self.tell()


@pytest.fixture(params=[True, False], ids=["our connection", "any server"])
async def caller(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param)


class Work:
    """Waits, and notes how it ended."""

    def __init__(self) -> None:
        self.has_begun, self.was_withdrawn = False, False
        self.may_end = asyncio.Event()

    async def __call__(self) -> str:
        self.has_begun = True
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.was_withdrawn = True
            raise
        return "done"


async def test_work_of_a_client_that_stays_is_done(caller: Caller) -> None:
    work = Work()
    waiting = asyncio.ensure_future(unless_client_leaves(caller.request, work()))
    await until(lambda: work.has_begun)
    work.may_end.set()
    assert await waiting == "done"
    assert caller.tell is None
    caller.leave()  # nobody minds any more
    await asyncio.sleep(0)


async def test_work_of_a_client_that_leaves_is_withdrawn(caller: Caller) -> None:
    work = Work()
    waiting = asyncio.ensure_future(unless_client_leaves(caller.request, work()))
    await until(lambda: work.has_begun)
    caller.leave()
    with pytest.raises(ClientGoneError):
        await waiting
    assert work.was_withdrawn and caller.tell is None


async def test_who_withdraws_the_work_otherwise_is_not_told_that_the_client_left(caller: Caller) -> None:
    work = Work()
    waiting = asyncio.ensure_future(unless_client_leaves(caller.request, work()))
    await until(lambda: work.has_begun)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.was_withdrawn


async def test_a_deadline_counts_from_when_it_is_said_to() -> None:
    async with at_most(60):
        await asyncio.sleep(0)
    with pytest.raises(DeadlineError, match=r"no answer within 60 s"):
        async with at_most(60, since=time.monotonic() - 61):
            await asyncio.Event().wait()
    with pytest.raises(DeadlineError, match=r"no answer within 0\.001 s"):
        async with at_most(0.001):
            await asyncio.Event().wait()


async def test_a_deadline_that_somebody_else_found_is_told_in_the_clients_own_time() -> None:
    with pytest.raises(DeadlineError, match=r"no answer within 30 s") as late:
        async with at_most(30.0):
            raise DeadlineError("no answer within 0.0034 s", timeout_s=0.0034)
    assert late.value.details == {"timeout_s": 30.0}


async def test_other_errors_are_left_alone() -> None:
    error: Any
    for error in (ValueError("x"), TimeoutError("of something else")):
        with pytest.raises(type(error)) as raised:
            async with at_most(60):
                raise error
        assert raised.value is error
