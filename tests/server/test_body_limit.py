"""Bodies while they arrive, on a clock that leaps: slow ones are cut off, and together they have a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.api.middleware import LARGEST_BODIES, LEAST_BYTES_PER_S, Front
from server.calibration.simulator import _in_virtual_time
from server.errors import ClientGoneError, ServerError, TooLargeError, TooSlowError
from tests.server.conftest import assert_is_error, grey_png, serving, until

LIMIT_S = 10
MOST = 1 << 20


async def read(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that reads the whole body."""
    while (await receive()).get("more_body"):
        pass


def outcome(pieces: Sequence[tuple[float, int]]) -> tuple[type[ServerError] | None, float]:
    """Sends pieces of a body, each so many seconds after the one before and of so many bytes; the last ends it.

    Returns:
        What was raised, and when.
    """

    async def run() -> tuple[type[ServerError] | None, float]:
        coming = iter(pieces)
        left = len(pieces)

        async def receive() -> Message:
            nonlocal left
            after_s, size = next(coming)
            await asyncio.sleep(after_s)
            left -= 1
            return {"type": "http.request", "body": bytes(size), "more_body": left > 0}

        async def send(message: Message) -> None:
            raise AssertionError("nothing is answered here")

        scope: Any = {"type": "http", "headers": []}
        try:
            await Front(read, MOST, LIMIT_S)(scope, receive, send)
        except ServerError as error:
            return type(error), asyncio.get_running_loop().time()
        return None, asyncio.get_running_loop().time()

    return _in_virtual_time(run())


def test_a_body_that_goes_on_is_waited_for() -> None:
    assert outcome([(9.0, 100_000)] * 8) == (None, 72.0)
    assert outcome([(1.0, LEAST_BYTES_PER_S)] * 200) == (None, 200.0)


def test_a_body_that_stops_is_waited_for_once_the_limit() -> None:
    assert outcome([(LIMIT_S + 1, 1)]) == (TooSlowError, LIMIT_S)
    assert outcome([(0.0, 500_000), (LIMIT_S + 1, 1)]) == (TooSlowError, LIMIT_S)  # speed once is no credit


def test_a_body_that_drips_is_waited_for_hardly_longer_than_one_that_stops() -> None:
    error, at = outcome([(1.0, 1)] * 1000)
    assert error is TooSlowError and LIMIT_S <= at < LIMIT_S + 1


def test_a_body_that_grows_too_long_or_is_cut_off_says_so() -> None:
    assert outcome([(0.0, MOST)] * 2) == (TooLargeError, 0.0)

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def run() -> None:
        scope: Any = {"type": "http", "headers": []}
        with pytest.raises(ClientGoneError):
            await Front(read, MOST, LIMIT_S)(scope, gone, _nothing)

    asyncio.run(run())


async def _nothing(message: Message) -> None:
    pass


async def test_bodies_together_are_bounded_and_make_room_when_they_are_answered() -> None:
    photo = grey_png()
    async with serving(max_body_bytes=len(photo)) as service:
        may_end = asyncio.Event()
        held = []

        async def body() -> AsyncIterator[bytes]:
            yield photo[:-1]
            held.append(1)
            await may_end.wait()
            yield photo[-1:]

        def post(content: Any) -> Awaitable[Any]:
            return service.client.post("/classify", content=content, headers={"content-type": "image/png"})

        # Each holds all but a byte; what they have together left is less than one more.
        slow = [asyncio.ensure_future(post(body())) for _ in range(LARGEST_BODIES)]
        await until(lambda: len(held) == LARGEST_BODIES)
        refused = await post(photo)
        assert "may be held at once" in assert_is_error(refused, 429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        may_end.set()
        assert [answer.status_code for answer in await asyncio.gather(*slow)] == [200] * LARGEST_BODIES
        assert (await post(photo)).status_code == 200
