"""Permits: how many images are in flight, whether those before leave time enough, and what is left under overload."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from server.api.admission import LONGEST_TURN_S, Admission
from server.batching.batcher import Batcher
from server.bench.load import poisson
from server.calibration.simulator import _in_virtual_time
from server.errors import QueueFullError, ServerError, TooLargeError

FOREVER = 1e6


@pytest.fixture
def admission() -> Admission:
    """100 places; images have been leaving it every tenth of a second."""
    now = 0.0
    admission = Admission(100, clock=lambda: now)
    with ExitStack() as last:
        last.enter_context(admission.permit(1, FOREVER))  # it never stands empty
        for _ in range(300):
            with admission.permit(1, FOREVER):
                now += 0.1
    return admission


def test_what_could_not_be_answered_in_time_is_refused_before_it_is_decoded(admission: Admission) -> None:
    with admission.permit(20, 1.0):
        with pytest.raises(QueueFullError, match=r"1\.9\d s of work; to answer within 1 s, at most 0\.7 s") as refusal:
            with admission.permit(1, 1.0):
                pass
        assert refusal.value.retry_after_s == pytest.approx(2.0 - 0.7, abs=0.1)  # until those before fit in 70 %
        with admission.permit(1, 4.0):
            assert admission.in_flight == 21
    with admission.permit(1, 0.01):  # nothing is before it
        assert admission.in_flight == 1


def test_places_are_counted_and_given_back(admission: Admission) -> None:
    with admission.permit(100, FOREVER), pytest.raises(QueueFullError):
        with admission.permit(1, FOREVER):
            pass
    with pytest.raises(TooLargeError, match="101 images; at most 100"):
        with admission.permit(101, FOREVER):
            pass
    assert admission.in_flight == 0


def test_the_refused_are_told_to_come_one_after_the_other(admission: Admission) -> None:
    told = []
    with admission.permit(100, FOREVER):
        for _ in range(250):
            with pytest.raises(QueueFullError) as refusal:
                with admission.permit(1, FOREVER):
                    pass
            told.append(refusal.value.retry_after_s or 0.0)
    # After the hundred in flight, a tenth of a second each; and none later than it makes sense to say.
    assert told[:3] == [pytest.approx(10.0 + 0.1 * index, rel=0.05) for index in range(3)]
    assert told == sorted(told) and told[100] == pytest.approx(20.0, rel=0.05) and told[-1] == LONGEST_TURN_S


def test_before_the_pace_is_known_nobody_is_refused_for_it() -> None:
    now = 0.0
    admission = Admission(100, clock=lambda: now)
    with admission.permit(31, 1.0):
        with admission.permit(1, 1.0):
            now += 1.0  # the first batch warms the device up
        with admission.permit(1, 1.0):
            assert admission.in_flight == 32


def test_after_a_stall_nobody_is_refused_for_it(admission: Admission) -> None:
    now = admission._clock()
    admission._clock = lambda: now
    for _ in range(2):
        with ExitStack() as in_flight:
            for _ in range(2):
                in_flight.enter_context(admission.permit(1, FOREVER))
            now += 30.0  # the machine stands still
        with admission.permit(1, 2.0), admission.permit(1, 2.0), admission.permit(1, 2.0):
            now += 0.1


def test_a_stall_before_the_pace_is_known_is_soon_forgotten() -> None:
    now = 0.0
    admission = Admission(100, clock=lambda: now)
    for pause_s in [60.0] * 30 + [0.1] * 6:
        with admission.permit(1, FOREVER):
            now += pause_s
        now += 5.0
    with admission.permit(2, FOREVER), admission.permit(1, 2.0):
        assert admission.in_flight == 3


@dataclass
class Run:
    """What became of an open loop of requests in virtual time: when each came, its status, its seconds."""

    replies: list[tuple[float, int, float]]
    capacity: float

    def share(self, start: float, end: float) -> float:
        """Answers to what came in a stretch, as a share of what the device can do in it."""
        ours = [status for at, status, _ in self.replies if start <= at < end]
        return ours.count(200) / (end - start) / self.capacity

    def p99_s(self, start: float, end: float) -> float:
        seconds = sorted(s for at, status, s in self.replies if status == 200 and start <= at < end)
        return seconds[int(0.99 * (len(seconds) - 1))]


def open_loop(
    load: float, deadline_s: float, a: float = 0.01, b: float = 0.03, slow: Callable[[float], float] = lambda now: 1.0
) -> Run:
    """A minute of so many times what a device can do whose batches take a + b n seconds, times `slow`."""
    capacity = 32 / (a + 32 * b)

    async def serve() -> Run:
        clock = asyncio.get_running_loop().time
        run, admission = Run([], capacity), Admission(256, clock)

        async def device(key: str, payloads: Sequence[int]) -> Sequence[int]:
            await asyncio.sleep((a + b * len(payloads)) * slow(clock()))
            return payloads

        batcher = Batcher[str, int, int](
            device, max_batch_size=32, max_queue_size=256, batch_timeout_s=0.1, clock=clock
        )
        batcher.start()

        async def client(at: float) -> None:
            await asyncio.sleep(at)
            status = 200
            try:
                with admission.permit(1, deadline_s):
                    await batcher.submit("key", [0], clock() + deadline_s, lambda batched: batched.results)
            except ServerError as error:
                status = error.status
            run.replies.append((at, status, clock() - at))

        await asyncio.gather(*(client(at) for at in poisson(load * capacity, 60, seed=0)))
        await batcher.close()
        return run

    return _in_virtual_time(serve())


@pytest.mark.parametrize(
    ("load", "deadline_s", "line"),
    [(1.5, 2, (0.01, 0.03)), *((3, s, (0.01, 0.03)) for s in (1, 2, 30)), (10, 2, (0.01, 0.03)), (3, 2, (0.1, 0.01))],
)
def test_under_overload_goodput_is_the_capacity_and_latency_does_not_creep(
    load: float, deadline_s: float, line: tuple[float, float]
) -> None:
    run = open_loop(load, deadline_s, *line)
    assert {status for _, status, _ in run.replies} <= {200, 429, 504}
    assert all(run.share(start, start + 10) >= 0.9 for start in range(0, 60, 10))
    assert run.p99_s(40, 60) <= 1.2 * run.p99_s(20, 40)
    late = sum(status == 504 for _, status, _ in run.replies)  # admitted in vain
    assert late <= 0.1 * sum(status == 200 for _, status, _ in run.replies)


def test_a_device_that_becomes_slower_still_answers_what_it_can() -> None:
    run = open_loop(3.0, 2.0, slow=lambda now: 3.0 if 20 <= now < 40 else 1.0)  # a whole batch takes the deadline
    assert run.share(25, 40) >= 0.9 / 3
    assert run.share(45, 60) >= 0.9
