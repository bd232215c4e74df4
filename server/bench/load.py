"""Loads: open loops, whose requests do not wait for the server, and closed loops, whose clients wait for answers."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.bench.answer import HttpAnswer
from server.bench.client import BrokenError, Connections

PAUSE_S = 0.1  # without it, a waiting client would send as fast as it can when nobody answers
TICK_S = 0.01

Watch = Callable[["Reply"], None]
Read = Callable[[HttpAnswer], Any]


@dataclass(frozen=True, slots=True)
class Request:
    """A request: a body for an endpoint, with its query."""

    path: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of one request.

    Attributes:
        number: Which of the requests it was.
        status: HTTP status; 0 without an answer.
        seconds: Until its answer, from the time when it was due; or from its sending if it was not due at a time.
        late_s: From the due time until the request was sent. It is the sender's fault, and part of `seconds`.
        said: The result of `read` for status 200; the message of any other answer.
    """

    number: int
    status: int
    seconds: float
    late_s: float
    said: Any


@dataclass(frozen=True, slots=True)
class Run:
    """A finished load.

    Attributes:
        seconds: From the start until the last answer.
        lateness_s: Samples of the sender's lateness; one for each request in an open loop.
    """

    replies: list[Reply]
    seconds: float
    lateness_s: list[float]


def poisson(per_s: float, seconds: float, seed: int) -> Iterator[float]:
    """Due times of independent requests."""
    numbers, now = random.Random(seed), 0.0
    while (now := now + numbers.expovariate(per_s)) < seconds:
        yield now


def mean_r(answer: HttpAnswer) -> float | None:
    """The `r` of an answer, averaged over blocks; None if the server names none."""
    return _mean(answer.header(b"x-r"))


@functools.lru_cache(256)
def _mean(schedule: str) -> float | None:
    numbers = schedule.split(",")
    return sum(map(int, numbers)) / len(numbers) if numbers[0] else None


def ignore(reply: Reply) -> None:
    """Ignores a reply."""


async def open_loop(
    client: Connections,
    requests: Sequence[Request],
    due: Iterable[float],
    *,
    read: Read = mean_r,
    watch: Watch = ignore,
) -> Run:
    """Sends a request at each due time, in seconds from now, on as many connections as necessary.

    Args:
        client: The server.
        requests: Used in turn.
        due: Increasing times.
        read: What to keep of an answer.
        watch: Called with each reply.
    """
    start = time.perf_counter()
    replies: list[Reply] = []

    async def send(number: int, at: float) -> None:
        late_s = time.perf_counter() - start - at
        status, said = await _ask(client, requests[number], read)
        replies.append(Reply(number, status, time.perf_counter() - start - at, late_s, said))
        watch(replies[-1])

    async with asyncio.TaskGroup() as group:
        for number, at in enumerate(due):
            # Also when it is already late, because answers must be read meanwhile.
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            group.create_task(send(number % len(requests), at))
    return Run(replies, time.perf_counter() - start, [reply.late_s for reply in replies])


async def closed_loop(
    client: Connections,
    requests: Sequence[Request],
    clients: int,
    seconds: float,
    *,
    read: Read = mean_r,
    watch: Watch = ignore,
) -> Run:
    """Runs clients with one request at a time each. A client that is refused pauses for a moment.

    Args:
        client: The server.
        requests: Used in turn.
        clients: Number of clients.
        seconds: Time after which no more is sent.
        read: What to keep of an answer.
        watch: Called with each reply.
    """
    start = time.perf_counter()
    replies: list[Reply] = []
    turns = itertools.cycle(range(len(requests)))

    async def ask_again_and_again() -> None:
        while (sent := time.perf_counter()) < start + seconds:
            number = next(turns)
            status, said = await _ask(client, requests[number], read)
            replies.append(Reply(number, status, time.perf_counter() - sent, 0.0, said))
            watch(replies[-1])
            if status != 200:
                await asyncio.sleep(PAUSE_S)

    lateness: list[float] = []
    ticking = asyncio.create_task(_tick(lateness))
    try:
        await asyncio.gather(*(ask_again_and_again() for _ in range(clients)))
    finally:
        ticking.cancel()
    return Run(replies, time.perf_counter() - start, lateness)


async def _ask(client: Connections, request: Request, read: Read) -> tuple[int, Any]:
    try:
        answer = await client.post(request.path, request.body)
    except BrokenError as error:
        return 0, str(error)
    return answer.status, read(answer) if answer.status == 200 else message_of(answer)


def message_of(answer: HttpAnswer) -> str:
    """The message of an error answer: from our error body, else the start of the body."""
    try:
        return str(json.loads(answer.body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.body[:200].decode("utf-8", "replace")


async def _tick(lateness: list[float]) -> None:
    """Samples the lateness of this event loop."""
    while True:
        due = time.perf_counter() + TICK_S
        await asyncio.sleep(TICK_S)
        lateness.append(time.perf_counter() - due)
