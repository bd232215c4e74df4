"""Simulates a setting of the dial under a load, by the server's own batcher and policy, in virtual time.

Only the device is simulated: a batch takes the time of the curve. So the result is that of the server, except for the
time of HTTP and decoding.
"""

from __future__ import annotations

import asyncio
import selectors
import statistics
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from server.batching.auto import AutoDial
from server.batching.batcher import Batcher
from server.batching.policy import Rung
from server.dial import AutoR, Schedule
from server.errors import ServerError
from server.types import BatchKey

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Served:
    """A request that was answered in time.

    Attributes:
        latency_s: From its arrival to its answer.
        schedule: Its schedule.
        agreement: Expected agreement with r=0; None if unknown.
    """

    latency_s: float
    schedule: Schedule
    agreement: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a load.

    Attributes:
        goodput: Share of the requests that were answered in time.
        p99_s: 99th percentile of latency; 0 without answers.
        agreement: Mean expected agreement of the answers with r=0; None if a step's is unknown.
        mean_r: Mean `r` of the answers.
        turns: Number of times that the dial moved between batches.
    """

    goodput: float
    p99_s: float
    agreement: float | None
    mean_r: float
    turns: int


def simulate(
    steps: Sequence[Rung],
    arrivals: Iterable[float],
    deadline_s: float,
    setting: Schedule | AutoR,
    *,
    max_batch_size: int = 32,
    max_queue_size: int = 256,
) -> Outcome:
    """Serves a load and summarises the result; see `replay` for the arguments."""
    served, order = replay(
        steps, arrivals, deadline_s, setting, max_batch_size=max_batch_size, max_queue_size=max_queue_size
    )
    answers = [answer for answer in served if answer is not None]
    latencies = sorted(answer.latency_s for answer in answers)
    known = [answer.agreement for answer in answers if answer.agreement is not None]
    return Outcome(
        goodput=len(answers) / len(served),
        p99_s=latencies[int(0.99 * (len(latencies) - 1))] if latencies else 0.0,
        agreement=statistics.mean(known) if known and len(known) == len(answers) else None,
        mean_r=statistics.mean(statistics.mean(answer.schedule) for answer in answers) if answers else 0.0,
        turns=sum(before != after for before, after in zip(order, order[1:], strict=False)),
    )


def replay(
    steps: Sequence[Rung],
    arrivals: Iterable[float],
    deadline_s: float,
    setting: Schedule | AutoR,
    *,
    max_batch_size: int = 32,
    max_queue_size: int = 256,
) -> tuple[list[Served | None], list[Schedule]]:
    """Serves a load, request by request.

    Args:
        steps: The ladder, r=0 first; a batch takes the time of its step.
        arrivals: Arrival time of each request, in seconds, ascending.
        deadline_s: Seconds in which each must be answered.
        setting: A schedule of the ladder for all requests, or the bounds of `auto`.
        max_batch_size: Most images in a batch.
        max_queue_size: Most images waiting.

    Returns:
        The result of each request, None if it was not answered; and the schedule of each batch.
    """
    return _in_virtual_time(_serve(steps, list(arrivals), deadline_s, setting, max_batch_size, max_queue_size))


async def _serve(
    steps: Sequence[Rung],
    arrivals: Sequence[float],
    deadline_s: float,
    setting: Schedule | AutoR,
    max_batch_size: int,
    max_queue_size: int,
) -> tuple[list[Served | None], list[Schedule]]:
    loop = asyncio.get_running_loop()
    cost = {step.schedule: step for step in steps}
    order: list[Schedule] = []

    async def run_batch(key: BatchKey, jobs: Sequence[None]) -> Sequence[None]:
        order.append(key.schedule)
        await asyncio.sleep(cost[key.schedule].batch_s(len(jobs)))
        return jobs

    batcher = Batcher[BatchKey, None, None](
        run_batch,
        max_batch_size=max_batch_size,
        max_queue_size=max_queue_size,
        batch_timeout_s=0.1,
        clock=loop.time,
    )
    auto = AutoDial(lambda schedule: BatchKey("simulated", schedule, (0, 0)), steps, batcher.speed, loop.time)
    key = auto.open(setting) if isinstance(setting, AutoR) else BatchKey("simulated", setting, (0, 0))
    batcher.start()

    async def request(at: float) -> Served | None:
        await asyncio.sleep(at - loop.time())
        try:
            schedule = await batcher.submit(key, [None], loop.time() + deadline_s, lambda done: done.key.schedule)
        except ServerError:
            return None
        return Served(loop.time() - at, schedule, cost[schedule].agreement if max(schedule) else 1.0)

    served = await asyncio.gather(*map(request, arrivals))
    await batcher.close()
    return served, order


def _in_virtual_time(work: Coroutine[Any, Any, T]) -> T:
    """Runs work in virtual time: waits return at once, and advance the loop's clock."""
    loop = _VirtualLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


class _Leap(selectors.DefaultSelector):
    """A selector that never waits, but reports the time for which it should have."""

    def __init__(self, waited: Callable[[float], None]) -> None:
        super().__init__()
        self._waited = waited

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._waited(timeout or 0.0)
        return super().select(0)


class _VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next due event."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Leap(self._leap))

    def time(self) -> float:
        return self._now

    def _leap(self, seconds: float) -> None:
        self._now += seconds
