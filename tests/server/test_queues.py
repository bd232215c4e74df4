"""The queues alone, without a loop that serves: who waits, which jobs go next, and who is given up."""

from __future__ import annotations

import asyncio
from math import inf
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.batching.jobs import Asked, Batched, Job, Open
from server.batching.queues import Queues
from server.batching.speed import Speed
from server.errors import DeadlineError

BATCH = 3
KEYS, TIMES = st.sampled_from("abc"), st.floats(0.5, 20) | st.just(inf)


class Bench:
    """Queues, a clock, and what was dropped of them; no callback is called unless a test does it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, batch_timeout_s: float = 5.0) -> None:
        self.loop = loop
        loop.set_exception_handler(lambda loop, context: None)  # of errors that nobody asks for
        self.speed = Speed[str]()
        self.dropped: list[str] = []
        self.now = 100.0
        self.queues = Queues[str, int, str](
            self.speed,
            self.dropped.append,
            max_batch_size=BATCH,
            batch_timeout_s=batch_timeout_s,
            num_stages=1,
        )
        self.jobs: list[Job[str, int, str]] = []

    def add(self, key: str | Open[str], count: int, in_s: float = inf) -> Asked[str, str]:
        nothing: Any = None
        batched: Batched[str, str] = Batched([nothing] * count, nothing if isinstance(key, Open) else key)
        asked = Asked(self.loop.create_future(), lambda done: done, batched, count, self.now + in_s, [])
        open_ = key if isinstance(key, Open) else None
        asked.jobs = [Job(asked, index, index, open_, self.now, asked.deadline) for index in range(count)]
        self.jobs += asked.jobs
        self.queues.add(asked, key)
        return asked

    def ran(self, key: str, seconds: float) -> None:
        """A batch of one has just taken so long."""
        self.speed.observe(key, 1, seconds)
        self.queues.ran(key, self.now, seconds)

    def take(self, is_busy: bool = False) -> tuple[str, list[Job[str, int, str]]] | None:
        return self.queues.take(self.now, is_busy)


def taken(bench: Bench) -> tuple[str, list[Job[str, int, str]]]:
    """A batch that there must be."""
    batch = bench.take()
    assert batch is not None
    return batch


async def test_expire_gives_the_next_deadline_of_all_that_are_not_answered() -> None:
    bench = Bench(asyncio.get_running_loop())
    first, second, third = bench.add("a", 1, 10), bench.add("a", 2, 30), bench.add("b", 1, 20)
    bench.add("b", 1)  # which has none
    assert bench.queues.expire(bench.now) == first.deadline
    bench.queues.leave(first)
    assert bench.queues.expire(bench.now) == third.deadline
    taken(bench)  # what is computed still has its deadline
    assert bench.queues.expire(bench.now + 20) == second.deadline
    assert isinstance(third.future.exception(), DeadlineError)
    assert bench.queues.expire(bench.now + 30) == inf
    assert isinstance(second.future.exception(), DeadlineError) and not first.future.done()


async def test_what_is_computed_when_its_deadline_comes_is_no_drop() -> None:
    bench = Bench(asyncio.get_running_loop())
    asked = bench.add("a", BATCH + 2, 10)
    _, jobs = taken(bench)
    assert len(jobs) == BATCH and bench.queues.num_waiting == 2
    bench.queues.expire(bench.now + 10)
    assert bench.dropped == ["deadline"] * 2 and bench.queues.num_waiting == 0
    assert bench.take() is None
    for job in jobs:  # it comes all the same, and is too late
        job.answer("late", BATCH, 0.0, 1.0)
    assert isinstance(asked.future.exception(), DeadlineError)


async def test_an_answered_request_leaves_nothing_to_expire() -> None:
    bench = Bench(asyncio.get_running_loop())
    asked = bench.add("a", 1, 10)
    (job,) = taken(bench)[1]
    job.answer("fine", 1, 0.5, 0.25)
    assert asked.future.result() == Batched(["fine"], "a", 1, 0.5, 0.25)
    bench.queues.leave(asked)
    assert bench.queues.expire(bench.now + 20) == inf and bench.dropped == []


async def test_results_stand_where_their_payloads_stood_in_whatever_order_they_come() -> None:
    bench = Bench(asyncio.get_running_loop())
    asked = bench.add("a", 5)
    jobs = taken(bench)[1] + taken(bench)[1]
    for number, place in enumerate((3, 0, 4, 2, 1), start=1):
        assert not asked.future.done()
        jobs[place].answer(f"of {place}", number, 0.0, 0.0)
    assert asked.future.result().results == [f"of {place}" for place in range(5)]


async def test_a_batch_before_it_counts_against_a_deadline() -> None:
    for is_busy in (False, True):
        bench = Bench(asyncio.get_running_loop())
        bench.ran("a", 2.0)
        asked = bench.add("a", 1, 3)
        assert (bench.take(is_busy) is None) == is_busy
        assert asked.future.done() == is_busy and bench.dropped == ["deadline"] * is_busy


async def test_one_late_job_costs_its_whole_request_and_its_mates_nothing() -> None:
    bench = Bench(asyncio.get_running_loop())
    bench.ran("a", 2.0)
    late, mate = bench.add("a", 5, 1), bench.add("a", 1)
    key, jobs = taken(bench)
    assert key == "a" and [job.asked for job in jobs] == [mate]
    assert isinstance(late.future.exception(), DeadlineError) and bench.dropped == ["deadline"] * 5


async def test_a_job_is_due_so_early_that_it_is_answered_in_time() -> None:
    for stage_s, first in ((0.0, "fuller"), (2.0, "fuller"), (4.0, "near")):
        bench = Bench(asyncio.get_running_loop(), batch_timeout_s=1e6)
        bench.queues.stage_s = stage_s
        bench.add("near", 1, 7)
        bench.add("fuller", 2, 1000)
        assert taken(bench)[0] == first


@pytest.mark.parametrize("age", [4.0, 6.0])
async def test_an_aged_job_is_due_whatever_its_deadline(age: float) -> None:
    bench = Bench(asyncio.get_running_loop(), batch_timeout_s=5.0)
    bench.add("old", 1)
    bench.now += age
    bench.add("fuller", 2)
    assert taken(bench)[0] == ("fuller" if age < 5 else "old")


async def test_the_note_is_of_the_moment_when_the_job_leaves_the_queue() -> None:
    bench, moment = Bench(asyncio.get_running_loop()), ["queued"]
    asked = bench.add(Open("g", lambda key: True, lambda load: "a", lambda key: (key, moment[0])), 1)
    moment[0] = "taken"
    (job,) = taken(bench)[1]
    moment[0] = "answered"
    job.answer("x", 1, 0.0, 0.0)
    assert asked.future.result().note == ("a", "taken") and asked.future.result().key == "a"


class Waiting(RuleBasedStateMachine):
    """Whatever comes, goes, ages and is taken: the books are right, and every job leaves once."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(asyncio.new_event_loop())
        self.asked: list[Asked[str, str]] = []
        self.taken: list[Job[str, int, str]] = []

    def teardown(self) -> None:
        self.bench.loop.close()

    @rule(key=KEYS, count=st.integers(1, 5), in_s=TIMES)
    def comes(self, key: str, count: int, in_s: float) -> None:
        self.asked.append(self.bench.add(key, count, in_s))

    @rule(keys=st.sets(KEYS, min_size=1), in_s=TIMES)
    def comes_open(self, keys: set[str], in_s: float) -> None:
        choice = Open("group", lambda key: key in keys, lambda load: min(keys), lambda key: key)
        self.asked.append(self.bench.add(choice, 1, in_s))

    @rule(is_busy=st.booleans())
    def a_batch_is_taken(self, is_busy: bool) -> None:
        taken = self.bench.take(is_busy)
        if taken is None:
            assert self.bench.queues.num_waiting == 0
            return
        key, jobs = taken
        assert 1 <= len(jobs) <= BATCH
        for job in jobs:
            assert job not in self.taken and not job.is_queued and not job.asked.future.done()
            in_time = job.deadline >= self.bench.now + (1 + is_busy) * self.bench.speed(key, len(jobs))
            assert in_time or len(jobs) == 1  # which is a try
            assert job.open.allows(key) if job.open else job.asked.batched.key == key
            assert job.asked.batched.key == key
        self.taken += jobs

    @rule(seconds=st.floats(0.01, 8))
    def time_passes(self, seconds: float) -> None:
        self.bench.now += seconds

    @rule()
    def deadlines_come(self) -> None:
        nearest = self.bench.queues.expire(self.bench.now)
        assert nearest > self.bench.now
        open_ = [asked.deadline for asked in self.asked if not asked.future.done()]
        assert nearest == min(open_, default=inf)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def one_is_cancelled(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.asked))
        if asked.future.cancel():
            self.bench.queues.leave(asked)

    @precondition(lambda self: any(not job.asked.future.done() for job in self.taken))
    @rule(data=st.data())
    def one_is_answered(self, data: st.DataObject) -> None:
        unanswered = [job for job in self.taken if job.asked.batched.results[job.index] is None]
        if unanswered:
            job = data.draw(st.sampled_from(unanswered))
            job.answer(f"{job.asked.batched.key}:{job.payload}", 1, 0.0, 0.0)
            if job.asked.future.done():
                self.bench.queues.leave(job.asked)

    @rule(key=KEYS, seconds=st.floats(0.01, 3))
    def a_speed_is_learned(self, key: str, seconds: float) -> None:
        self.bench.ran(key, seconds)

    @invariant()
    def the_books_are_right(self) -> None:
        jobs = self.bench.jobs
        queued = [job for job in jobs if job.is_queued]
        assert self.bench.queues.num_waiting == len(queued) == len(self.bench.queues.load(self.bench.now).left_s)
        assert len(jobs) == len(queued) + len(self.taken) + len(self.bench.dropped)

    @invariant()
    def an_answer_is_whole(self) -> None:
        for asked in self.asked:
            if asked.future.done() and not asked.future.cancelled() and not asked.future.exception():
                results = asked.batched.results
                assert results == [f"{asked.batched.key}:{index}" for index in range(len(results))]


Waiting.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestWaiting = Waiting.TestCase
