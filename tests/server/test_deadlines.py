"""One timer for many deadlines: each is kept at its time, in virtual time, and the event loop keeps the next alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.calibration.simulator import _in_virtual_time
from server.deadlines import Deadlines


class Alarms:
    """What is to end at given times, by a clock that may lag behind the event loop's; notes when it did."""

    def __init__(self, lag_s: float = 0.0) -> None:
        loop = asyncio.get_running_loop()
        self.clock: Callable[[], float] = lambda: loop.time() - lag_s
        self.pending: list[float] = []
        self.ended: list[tuple[float, float]] = []
        self.num_calls = 0
        self.deadlines = Deadlines(self.expire, self.clock)

    def add(self, deadline: float) -> None:
        self.pending.append(deadline)
        self.deadlines.watch(deadline)

    def expire(self, now: float) -> float:
        self.num_calls += 1
        self.ended += [(each, now) for each in sorted(self.pending) if each <= now]
        self.pending = [each for each in self.pending if each > now]
        return min(self.pending, default=inf)


TIMES, LAGS = st.integers(0, 6400).map(lambda n: n / 64), st.integers(0, 320).map(lambda n: n / 64)  # sums are exact


@given(st.lists(st.tuples(TIMES, TIMES), max_size=20), LAGS)
def test_each_deadline_is_kept_at_its_time(told: Sequence[tuple[float, float]], lag: float) -> None:
    async def live() -> Alarms:
        alarms = Alarms(lag)

        async def tell(at: float, in_s: float) -> None:
            await asyncio.sleep(at)
            alarms.add(alarms.clock() + in_s)

        await asyncio.gather(*(tell(*each) for each in told))
        await asyncio.sleep(1000)
        return alarms

    alarms = _in_virtual_time(live())
    assert len(alarms.ended) == len(told) and alarms.pending == []
    assert all(deadline == ended_at for deadline, ended_at in alarms.ended)


def test_the_event_loop_keeps_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def live() -> None:
        loop, timers = asyncio.get_running_loop(), []
        call_later = loop.call_later

        def noted(delay: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
            timers.append(call_later(delay, callback, *args))
            return timers[-1]

        alarms = Alarms()
        monkeypatch.setattr(loop, "call_later", noted)
        for deadline in (50.0, 60.0, 40.0, 55.0, 40.0, 45.0):
            alarms.add(deadline)
        waiting = [timer for timer in timers if not timer.cancelled()]
        assert [timer.when() for timer in waiting] == [40.0] and len(timers) == 2  # a later deadline needs none

    _in_virtual_time(live())


def test_what_is_over_before_its_deadline_costs_one_look() -> None:
    """Requests that are answered in time: ten a second, each with ten seconds, and the timer of one is enough."""

    async def live() -> int:
        alarms = Alarms()
        for _ in range(1000):
            alarms.add(alarms.clock() + 10)
            await asyncio.sleep(0.1)
            alarms.pending.pop()
        return alarms.num_calls

    assert _in_virtual_time(live()) <= 11


def test_a_deadline_that_has_passed_is_kept_in_the_next_turn_and_not_within_the_call() -> None:
    async def live() -> None:
        alarms = Alarms()
        await asyncio.sleep(5)
        alarms.add(3.0)
        assert alarms.ended == []
        await asyncio.sleep(0.001)
        ((deadline, ended_at),) = alarms.ended
        assert deadline == 3.0 and ended_at == pytest.approx(5.0)

    _in_virtual_time(live())


def test_without_a_deadline_there_is_no_timer() -> None:
    async def live() -> None:
        alarms = Alarms()
        alarms.add(inf)
        await asyncio.sleep(1e6)
        assert alarms.num_calls == 0
        alarms.add(2e6)
        await asyncio.sleep(1e6)
        assert [deadline for deadline, _ in alarms.ended] == [2e6] and alarms.pending == [inf]

    _in_virtual_time(live())


def test_after_close_nothing_is_called_until_it_is_told_anew() -> None:
    async def live() -> None:
        alarms = Alarms()
        alarms.deadlines.close()  # of nothing
        alarms.add(3.0)
        alarms.deadlines.close()
        await asyncio.sleep(10)
        assert alarms.num_calls == 0
        alarms.add(20.0)  # later than the one that was forgotten
        await asyncio.sleep(20)
        assert [deadline for deadline, _ in alarms.ended] == [3.0, 20.0]

    _in_virtual_time(live())
