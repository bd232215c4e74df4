"""The batcher alone, with a fake device: what is batched, in which order, and who is answered what."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.batching.batcher import Batcher
from server.batching.jobs import Batched, Open
from server.batching.policy import Load
from server.calibration.simulator import _in_virtual_time
from server.errors import DeadlineError, EngineError, QueueFullError, UnavailableError
from tests.server.conftest import until

FOREVER = 1e6
Answer = Batched[str, str]


class Device:
    """A fake engine: answers `key:payload` once its gate is open, and notes its batches."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.batches: list[tuple[str, list[int]]] = []
        self.failures: list[Exception] = []
        self.lost_answers = 0
        self.dropped: list[str] = []
        self.ran: list[tuple[str, int]] = []
        self.during_batch: Callable[[], None] = lambda: None
        self.now = 1000.0
        self.bad: set[int] = set()

    async def run_batch(self, key: str, payloads: Sequence[int]) -> list[str]:
        self.batches.append((key, list(payloads)))
        await self.gate.wait()
        self.during_batch()
        if self.failures:
            raise self.failures.pop()
        if bad := self.bad & set(payloads):
            raise ValueError(f"bad: {sorted(bad)}")
        answers = [f"{key}:{payload}" for payload in payloads]
        return answers[self.lost_answers :]

    def batch_ran(self, key: str, waits_s: Sequence[float], run_s: float) -> None:
        self.ran.append((key, len(waits_s)))

    def job_dropped(self, reason: str) -> None:
        self.dropped.append(reason)


class Bench:
    """A batcher, its device, and shorthands to drive both."""

    def __init__(self, device: Device, batcher: Batcher[str, int, str], loop: asyncio.Task[None]) -> None:
        self.device, self.batcher, self.loop = device, batcher, loop

    def send(self, key: str | Open[str], *payloads: int, in_s: float = FOREVER) -> asyncio.Future[Answer]:
        """A request, to be answered within so many seconds of the device's clock."""
        return self.batcher.submit(key, payloads, self.device.now + in_s, lambda batched: batched)

    async def keep_busy(self, key: str = "busy") -> asyncio.Future[Answer]:
        """Occupies the device until its gate is opened."""
        self.device.gate.clear()
        batches = len(self.device.batches)
        busy = self.send(key, 0)
        await until(lambda: len(self.device.batches) > batches)
        return busy

    async def learn(self, key: str, seconds: float) -> None:
        """Lets a batch of one job take so long."""
        busy = await self.keep_busy(key)
        self.device.now += seconds
        self.device.gate.set()
        await busy

    async def probe(self) -> None:
        """Does nothing between batches."""
        await self.batcher.between_batches(nothing)


async def nothing() -> None:
    """What a device does that is asked whether it works."""


@asynccontextmanager
async def bench(*, batch: int = 4, queue: int = 100, batch_timeout_s: float = FOREVER) -> AsyncIterator[Bench]:
    """A started batcher whose clock is `device.now`: no age grows unless a test says so."""
    device = Device()
    batcher = Batcher[str, int, str](
        device.run_batch,
        max_batch_size=batch,
        max_queue_size=queue,
        batch_timeout_s=batch_timeout_s,
        observer=device,
        clock=lambda: device.now,
    )
    loop = batcher.start()
    try:
        yield Bench(device, batcher, loop)
        assert not loop.done() or batcher._closed or loop.cancelled(), "the batch loop must live"
    finally:
        device.gate.set()
        if not loop.done():
            await batcher.close()


async def test_an_idle_device_takes_a_lone_job_at_once() -> None:
    async with bench(batch=64) as it:
        answer = await it.send("a", 1)
        assert answer == Answer(["a:1"], "a", batch_size=1)


async def test_jobs_that_arrive_together_fill_a_batch() -> None:
    async with bench(batch=4) as it:
        answers = await asyncio.gather(*(it.send("a", payload) for payload in range(4)))
        assert it.device.batches == [("a", [0, 1, 2, 3])]
        assert [answer.batch_size for answer in answers] == [4] * 4


async def test_jobs_collect_while_the_device_is_busy_and_then_share_a_batch() -> None:
    async with bench() as it:
        await it.keep_busy()
        tasks = [it.send("a", payload) for payload in range(3)]
        assert it.batcher.num_waiting == 3
        it.device.gate.set()
        assert [answer.batch_size for answer in await asyncio.gather(*tasks)] == [3, 3, 3]
        assert it.device.batches == [("busy", [0]), ("a", [0, 1, 2])]
        assert it.device.ran == [("busy", 1), ("a", 3)]


async def test_no_batch_is_larger_than_max_batch_size_and_the_oldest_go_first() -> None:
    async with bench(batch=4) as it:
        await it.keep_busy()
        tasks = [it.send("a", payload) for payload in range(10)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert [payloads for _, payloads in it.device.batches[1:]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_the_fullest_key_goes_first_while_no_job_is_old() -> None:
    async with bench(batch_timeout_s=1.0) as it:
        await it.keep_busy()
        tasks = [it.send("rare", 0), it.send("common", 1), it.send("common", 2)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert [key for key, _ in it.device.batches] == ["busy", "common", "rare"]


async def test_timeout_an_aged_jobs_key_goes_before_a_fuller_one() -> None:
    async with bench(batch_timeout_s=1.0) as it:
        await it.keep_busy()
        rare = it.send("rare", 0)
        it.device.now += 1.5
        tasks = [it.send("common", payload) for payload in range(3)]
        it.device.gate.set()
        assert (await rare).wait_s == 1.5
        await asyncio.gather(*tasks)
        assert [key for key, _ in it.device.batches] == ["busy", "rare", "common"]


async def test_a_rare_key_does_not_starve_under_a_flood_of_another() -> None:
    async with bench(batch=2, batch_timeout_s=1.0) as it:
        flood = [await it.keep_busy("flood")]
        rare = it.send("rare", 0)

        def during_batch() -> None:
            it.device.now += 0.3
            if len(it.device.batches) < 40:
                flood.extend(it.send("flood", payload) for payload in range(3))  # more than a batch can take

        during_batch()
        it.device.during_batch = during_batch
        it.device.gate.set()
        await rare
        await until(lambda: len(it.device.batches) > 40)
        keys = [key for key, _ in it.device.batches]
        # Its turn comes with its age of 1 s, after about three batches of 0.3 s, and not before fuller batches went.
        assert 3 <= keys.index("rare") <= 5


async def test_a_job_near_its_deadline_goes_first() -> None:
    async with bench() as it:
        await it.learn("urgent", 2.0)
        await it.keep_busy()
        tasks = [it.send("common", 1), it.send("common", 2), it.send("urgent", 3, in_s=3.0)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert [key for key, _ in it.device.batches[-2:]] == ["urgent", "common"]


async def test_within_a_key_the_nearest_deadline_goes_first() -> None:
    async with bench(batch=1) as it:
        await it.keep_busy()
        tasks = [it.send("a", 1, in_s=500.0), it.send("a", 2, in_s=100.0)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert it.device.batches[1:] == [("a", [2]), ("a", [1])]


async def test_a_client_gone_before_the_run_is_not_computed() -> None:
    async with bench() as it:
        await it.keep_busy()
        gone, stays = it.send("a", 1), it.send("a", 2)
        gone.cancel()
        await asyncio.sleep(0)
        assert it.batcher.num_waiting == 1
        it.device.gate.set()
        assert (await stays).batch_size == 1
        assert it.device.batches[1:] == [("a", [2])]
        assert it.device.dropped == ["cancelled"]


async def test_a_client_gone_during_the_run_leaves_the_others_their_answers() -> None:
    async with bench() as it:
        it.device.gate.clear()
        tasks = [it.send("a", payload) for payload in range(3)]
        await until(lambda: len(it.device.batches) == 1)
        tasks[1].cancel()
        it.device.gate.set()
        assert [(await tasks[index]).results for index in (0, 2)] == [["a:0"], ["a:2"]]
        assert (await it.send("a", 9)).results == ["a:9"]
        assert it.device.dropped == []


async def test_an_engine_that_raises_fails_its_batch_and_the_next_one_works() -> None:
    async with bench() as it:
        it.device.failures = [RuntimeError("the device burns")] * 3  # for both jobs, then for each alone
        failed = await asyncio.gather(it.send("a", 1), it.send("a", 2), return_exceptions=True)
        assert [type(error) for error in failed] == [EngineError, EngineError]
        assert "the device burns" in str(failed[0])
        assert (await it.send("a", 3)).results == ["a:3"]


async def test_a_job_that_fails_alone_is_parted_from_its_batch_mates() -> None:
    async with bench(batch=8) as it:
        it.device.bad = {3}
        outcomes = await asyncio.gather(*(it.send("a", payload) for payload in range(8)), return_exceptions=True)
        assert isinstance(outcomes[3], EngineError) and "bad: [3]" in str(outcomes[3])
        assert [(each.results, each.batch_size) for each in outcomes if isinstance(each, Batched)] == [
            ([f"a:{payload}"], 8) for payload in range(8) if payload != 3
        ]
        assert it.device.ran == [("a", 7)]  # one batch of which so many were answered
        assert it.batcher.speed.line("a") is None  # and whose time says nothing


async def test_an_engine_that_raises_a_server_error_is_quoted() -> None:
    async with bench() as it:
        it.device.failures = [UnavailableError("out of memory", retry_after_s=3)]
        with pytest.raises(UnavailableError, match="out of memory"):
            await it.send("a", 1)


async def test_a_wrong_number_of_answers_fails_the_batch_and_the_next_one_works() -> None:
    async with bench() as it:
        it.device.lost_answers = 1
        failed = await asyncio.gather(it.send("a", 1), it.send("a", 2), return_exceptions=True)
        assert [type(error) for error in failed] == [EngineError, EngineError]
        assert "0 answers to 1 images" in str(failed[0])
        it.device.lost_answers = 0
        assert (await it.send("a", 3)).results == ["a:3"]


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async with bench(queue=2) as it:
        await it.learn("busy", 4.0)
        await it.keep_busy()
        tasks = [it.send("a", 1), it.send("a", 2)]
        with pytest.raises(QueueFullError, match="at most 2") as refusal:
            it.send("a", 3)
        assert refusal.value.retry_after_s == pytest.approx(2 * 4.0)
        assert it.batcher.num_waiting == 2
        it.device.gate.set()
        await asyncio.gather(*tasks)


async def test_all_payloads_of_a_request_need_room() -> None:
    async with bench(queue=5) as it:
        await it.keep_busy()
        tasks = [it.send("a", 1, 2, 3)]
        for payloads in ((4, 5, 6), range(4, 100)):
            with pytest.raises(QueueFullError, match="^3 images wait already; at most 5 may"):
                it.send("b", *payloads)
        assert it.batcher.num_waiting == 3  # of what was refused nothing waits
        tasks.append(it.send("b", 4, 5))
        with pytest.raises(QueueFullError):
            it.send("b", 6)
        it.device.gate.set()
        assert [each.results for each in await asyncio.gather(*tasks)] == [["a:1", "a:2", "a:3"], ["b:4", "b:5"]]


async def test_what_is_refused_came_all_the_same() -> None:
    async with bench(queue=1) as it:
        await it.keep_busy()
        before = it.batcher.load().arrivals_per_s
        with pytest.raises(QueueFullError):
            it.send("a", 1, 2, 3)
        assert it.batcher.load().arrivals_per_s == pytest.approx(4 * before)


async def test_a_cancelled_job_makes_room_in_a_full_queue_at_once() -> None:
    async with bench(queue=1) as it:
        await it.keep_busy()
        it.send("a", 1).cancel()
        await asyncio.sleep(0)  # the next turn of the loop
        second = it.send("a", 2)
        it.device.gate.set()
        assert (await second).results == ["a:2"]


async def test_a_deadline_that_passes_in_the_queue_is_an_error_and_nothing_is_computed() -> None:
    async with bench() as it:
        await it.keep_busy()
        late, patient = it.send("a", 1, in_s=50.0), it.send("a", 2)
        it.device.now += 60.0
        it.device.gate.set()
        with pytest.raises(DeadlineError):
            await late
        assert (await patient).results == ["a:2"]
        assert it.device.batches[1:] == [("a", [2])]
        assert it.device.dropped == ["deadline"]


async def test_a_deadline_ends_the_wait_while_the_device_is_busy() -> None:
    async with bench() as it:
        await it.keep_busy()
        late = it.send("a", 1, in_s=0.01)
        it.device.now += 0.01
        with pytest.raises(DeadlineError, match="no answer within 0.01 s") as error:
            await late
        assert error.value.details == {"timeout_s": pytest.approx(0.01)}
        assert it.batcher.num_waiting == 0 and it.device.dropped == ["deadline"]


async def test_a_deadline_that_passes_during_the_run_is_an_error_and_the_others_are_answered() -> None:
    async with bench() as it:
        it.device.gate.clear()
        late, patient = it.send("a", 1, in_s=0.01), it.send("a", 2)
        await until(lambda: len(it.device.batches) == 1)
        it.device.now += 0.01
        with pytest.raises(DeadlineError):
            await late
        assert it.device.batches == [("a", [1, 2])] and not patient.done()
        it.device.gate.set()
        assert (await patient).results == ["a:2"]
        assert it.device.dropped == []  # it was computed, if in vain


async def test_by_its_own_clock_no_deadline_is_there_before_its_time() -> None:
    async with bench() as it:
        busy = await it.keep_busy()
        early = it.send("a", 1, in_s=0.001)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(early), 0.02)  # of another clock: the batcher's stands still
        it.device.gate.set()
        assert (await busy).results == ["busy:0"] and (await early).results == ["a:1"]


def test_every_deadline_is_kept_at_its_time_in_the_queue_and_during_the_run() -> None:
    """In virtual time: batches of at most two take 10 s each, and nothing is known of that beforehand."""
    ended: dict[int, tuple[float, str]] = {}

    async def serve() -> None:
        loop = asyncio.get_running_loop()

        async def run_batch(key: str, payloads: Sequence[int]) -> list[int]:
            await asyncio.sleep(10)
            return list(payloads)

        batcher = Batcher[str, int, int](
            run_batch, max_batch_size=2, max_queue_size=100, batch_timeout_s=FOREVER, clock=loop.time
        )
        batcher.start()

        async def request(number: int, deadline: float) -> None:
            try:
                await batcher.submit("a", [number], deadline, lambda batched: batched)
            except DeadlineError:
                ended[number] = loop.time(), "late"
            else:
                ended[number] = loop.time(), "answered"

        await asyncio.gather(*(request(*each) for each in enumerate([9.0, 31.0, 3.0, 1.0, 40.0, 25.0, 10.5])))
        await batcher.close()

    _in_virtual_time(serve())
    # 2 and 3 go first and are late while they are computed; then 0 is late in the queue; 6 cannot be done by 10.5.
    assert {number: (round(at, 6), how) for number, (at, how) in ended.items()} == {
        0: (9.0, "late"),
        1: (30.0, "answered"),
        2: (3.0, "late"),
        3: (1.0, "late"),
        4: (30.0, "answered"),
        5: (20.0, "answered"),
        6: (10.0, "late"),
    }


@pytest.mark.parametrize("in_s", [0.0, -5.0])
async def test_a_request_that_comes_too_late_is_told_so(in_s: float) -> None:
    async with bench() as it:
        with pytest.raises(DeadlineError):
            await it.send("a", 1, 2, in_s=in_s)
        assert it.device.batches == [] and it.device.dropped == ["deadline"] * 2 and it.batcher.num_waiting == 0


async def test_a_request_may_have_no_deadline() -> None:
    async with bench() as it:
        for _ in range(3):  # a speed is known from the second on
            await it.keep_busy("a")
            patient = it.send("a", 1, in_s=inf)
            it.device.now += 10.0
            it.device.gate.set()
            assert (await patient).results == ["a:1"]


async def test_close_answers_everyone_who_waits() -> None:
    async with bench(batch=2) as it:
        tasks = [await it.keep_busy()] + [it.send(key, 1) for key in ("a", "b", "c")]
        closing = asyncio.create_task(it.batcher.close())
        await asyncio.sleep(0)
        it.device.gate.set()
        await closing
        assert [task.result().results for task in tasks] == [["busy:0"], ["a:1"], ["b:1"], ["c:1"]]


async def test_an_observer_that_fails_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench() as it:

        def fail(*event: object) -> None:
            raise OSError("the disk is full")

        monkeypatch.setattr(it.device, "batch_ran", fail)
        for payload in range(3):
            assert (await it.send("a", payload)).results == [f"a:{payload}"]


async def test_a_job_after_close_is_refused() -> None:
    async with bench() as it:
        await it.batcher.close()
        with pytest.raises(UnavailableError) as refusal:
            it.send("a", 1)
        assert refusal.value.retry_after_s
        with pytest.raises(UnavailableError):
            await it.probe()


STEP = st.sampled_from(["send", "send", "send", "turn", "open", "close", "cancel", "age", "probe"])
STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), STEP), max_size=60)


@settings(max_examples=60)
@given(steps=STEPS, batch=st.integers(1, 5), bad=st.sets(st.integers(0, 240), max_size=20))
async def test_keys_never_mix_and_each_answer_belongs_to_its_payloads(
    steps: list[tuple[str, int, str]], batch: int, bad: set[int]
) -> None:
    async with bench(batch=batch, batch_timeout_s=2.0) as it:
        it.device.bad = bad
        sent: list[tuple[str, range, asyncio.Future[Answer]]] = []
        probes: list[asyncio.Task[None]] = []
        cancelled: set[asyncio.Future[Answer]] = set()
        for number, (key, count, step) in enumerate(steps):
            if step == "send":
                payloads = range(4 * number, 4 * number + count)
                sent.append((key, payloads, it.send(key, *payloads)))
            elif step == "turn":
                await asyncio.sleep(0)
            elif step in ("open", "close"):
                (it.device.gate.set if step == "open" else it.device.gate.clear)()
            elif step == "age":
                it.device.now += 1.0
            elif step == "probe":
                probes.append(asyncio.create_task(it.probe()))
            elif sent:
                _, _, future = sent[number % len(sent)]
                if future.cancel():
                    cancelled.add(future)
        it.device.gate.set()
        answers = await asyncio.gather(*(future for *_, future in sent), return_exceptions=True)
        await asyncio.gather(*probes)
        for (key, payloads, future), answer in zip(sent, answers, strict=True):
            if future in cancelled:
                assert isinstance(answer, asyncio.CancelledError)
            elif bad & set(payloads):
                assert isinstance(answer, EngineError)
            elif isinstance(answer, EngineError):  # as many fail beside it as make an error everybody's
                assert len(bad) >= 3
            else:
                assert isinstance(answer, Batched) and answer.results == [f"{key}:{each}" for each in payloads]
        key_of = {payload: key for key, payloads, _ in sent for payload in payloads}
        for key, computed in it.device.batches:
            assert {key_of[payload] for payload in computed} == {key}
            assert len(computed) <= batch and len(set(computed)) == len(computed)
        if not bad:  # else some are tried again in parts
            all_computed = [payload for _, computed in it.device.batches for payload in computed]
            assert len(set(all_computed)) == len(all_computed)
        assert it.batcher.num_waiting == 0


# Requests of several payloads.


async def test_a_request_over_several_batches_is_answered_once_and_in_order() -> None:
    async with bench(batch=4) as it:
        await it.keep_busy()
        finished: list[Answer] = []

        def finish(batched: Answer) -> tuple[str, ...]:
            finished.append(batched)
            return tuple(batched.results)

        mates = [it.send("a", 100, in_s=100.0), it.send("a", 101, in_s=200.0)]
        many = it.batcher.submit("a", range(8), it.device.now + FOREVER, finish)
        assert it.batcher.num_waiting == 10
        seconds = iter([0.5, 3.0, 1.0, 2.0])

        def during_batch() -> None:
            it.device.now += next(seconds)

        it.device.during_batch = during_batch
        it.device.gate.set()
        assert await many == tuple(f"a:{payload}" for payload in range(8))
        assert it.device.batches[1:] == [("a", [100, 101, 0, 1]), ("a", [2, 3, 4, 5]), ("a", [6, 7])]
        (batched,) = finished
        assert (batched.key, batched.batch_size) == ("a", 4)
        assert (batched.wait_s, batched.run_s) == (4.5, 3.0)  # of the last in the queue, and of the slowest batch
        assert [(await mate).results for mate in mates] == [["a:100"], ["a:101"]]
        assert it.device.ran == [("busy", 1), ("a", 4), ("a", 4), ("a", 2)]


async def test_one_payload_that_fails_fails_its_request_and_the_rest_is_not_computed() -> None:
    async with bench(batch=2) as it:
        await it.keep_busy()
        it.device.bad = {1}
        failing, other = it.send("a", 0, 1, 2, 3, 4), it.send("b", 5)
        assert it.batcher.num_waiting == 6
        it.device.gate.set()
        with pytest.raises(EngineError, match=r"bad: \[1\]"):
            await failing
        assert (await other).results == ["b:5"]
        assert it.device.batches[1:] == [("a", [0, 1]), ("a", [0]), ("a", [1]), ("b", [5])]
        assert it.device.dropped == ["cancelled"] * 3 and it.batcher.num_waiting == 0


async def test_the_batch_mates_of_a_request_that_failed_are_answered() -> None:
    async with bench(batch=8) as it:
        await it.keep_busy()
        it.device.bad = {1}
        requests = [it.send("a", 0, 1), it.send("a", 2, 3), it.send("a", 4)]
        it.device.gate.set()
        failed, *others = await asyncio.gather(*requests, return_exceptions=True)
        assert isinstance(failed, EngineError)
        assert [each.results for each in others if isinstance(each, Batched)] == [["a:2", "a:3"], ["a:4"]]


async def test_a_cancelled_request_withdraws_what_still_waits_of_it() -> None:
    async with bench(batch=2) as it:
        it.device.gate.clear()
        gone = it.send("a", 0, 1, 2, 3)
        await until(lambda: len(it.device.batches) == 1)
        stays = it.send("a", 4)
        assert it.batcher.num_waiting == 3
        gone.cancel()
        await asyncio.sleep(0)
        assert it.batcher.num_waiting == 1 and it.device.dropped == ["cancelled"] * 2
        it.device.gate.set()
        assert (await stays).results == ["a:4"]
        assert it.device.batches == [("a", [0, 1]), ("a", [4])]


async def test_a_request_whose_first_batch_was_late_is_given_up_as_a_whole() -> None:
    async with bench(batch=2) as it:
        it.device.gate.clear()
        late, other = it.send("a", 0, 1, 2, 3, in_s=5.0), it.send("b", 4)
        await until(lambda: len(it.device.batches) == 1)
        it.device.now += 6.0
        it.device.gate.set()
        with pytest.raises(DeadlineError, match="within 5 s"):
            await late
        assert (await other).results == ["b:4"]
        assert it.device.batches == [("a", [0, 1]), ("b", [4])]
        assert it.device.dropped == ["deadline"] * 2 and it.batcher.num_waiting == 0


async def test_an_answer_that_cannot_be_made_of_the_results_is_its_requests_error() -> None:
    async with bench() as it:

        def finish(batched: Answer) -> str:
            raise ValueError("no class is the likeliest")

        await it.keep_busy()
        failing, mate = it.batcher.submit("a", [1], it.device.now + 1, finish), it.send("a", 2)
        it.device.gate.set()
        with pytest.raises(EngineError, match="no class is the likeliest"):
            await failing
        assert (await mate).results == ["a:2"] and (await it.send("a", 3)).results == ["a:3"]


async def test_a_request_of_nothing_is_a_mistake_of_its_caller() -> None:
    async with bench() as it:
        with pytest.raises(AssertionError):
            it.send("a")
        assert (await it.send("a", 1)).results == ["a:1"]


# Between batches: health checks.


async def test_a_probe_is_answered_between_batches_before_all_that_waits() -> None:
    async with bench(batch=1, queue=2) as it:
        await it.keep_busy()
        tasks = [it.send("a", 1), it.send("a", 2)]  # the queue is full
        order: list[object] = []

        async def probe() -> None:
            order.append(len(it.device.batches))

        probing = [asyncio.create_task(it.batcher.between_batches(probe)) for _ in range(2)]
        await asyncio.sleep(0)
        assert it.batcher.num_waiting == 2 and not order
        it.device.gate.set()
        await asyncio.gather(*probing, *tasks)
        assert order == [1, 1]  # after the batch that ran, and before both others


async def test_a_probe_under_load_waits_for_one_batch_alone() -> None:
    async with bench(batch=1) as it:
        waits: list[int] = []

        async def probe() -> None:
            before = len(it.device.batches)
            await it.probe()
            waits.append(len(it.device.batches) - before)

        probes: list[asyncio.Task[None]] = []

        def during_batch() -> None:
            if len(it.device.batches) <= 20:  # never is the queue empty while a probe comes
                it.send("a", len(it.device.batches)), it.send("b", 0)
                probes.append(asyncio.create_task(probe()))

        it.device.during_batch = during_batch
        await it.send("a", 0)
        await until(lambda: len(probes) == 20 and it.batcher.num_waiting == 0)
        await asyncio.gather(*probes)
        assert len(waits) == 20 and max(waits) <= 1


async def test_a_probe_is_no_job() -> None:
    async with bench(queue=10) as it:
        await it.learn("a", 1.0)
        await it.keep_busy("a")
        waiting = [it.send("a", payload) for payload in range(3)]

        before = it.batcher.load()
        looks: list[object] = []

        async def look() -> None:
            line = it.batcher.speed.line("a")
            looks.append(
                (it.batcher.load(), it.batcher.num_waiting, line, list(it.device.ran), list(it.device.dropped))
            )

        probing = [asyncio.create_task(it.batcher.between_batches(look)) for _ in range(10)]
        await asyncio.sleep(0)
        assert it.batcher.load() == before and it.batcher.num_waiting == 3
        it.device.gate.set()
        await asyncio.gather(*probing, *waiting)
        assert looks == [(before, 3, (0.0, pytest.approx(1.0)), [("a", 1)], [])] * 10
        assert it.device.ran == [("a", 1), ("a", 1), ("a", 3)]
        assert it.device.batches == [("a", [0]), ("a", [0]), ("a", [0, 1, 2])]


async def test_probes_do_not_make_the_batcher_think_that_batches_are_short() -> None:
    async with bench(queue=3) as it:
        await it.learn("a", 1.0)
        for _ in range(10):
            await it.probe()
        await it.keep_busy("b")
        tasks = [it.send("c", 1), it.send("c", 2), it.send("a", 3, in_s=2.9)]
        with pytest.raises(QueueFullError) as refusal:
            it.send("a", 4)
        assert refusal.value.retry_after_s == pytest.approx(3 * 1.0)
        it.device.now += 1.0
        it.device.gate.set()
        await asyncio.gather(*tasks)
        # It is due 2 s before its deadline, since a batch takes a second: now, before what is fuller.
        assert [key for key, _ in it.device.batches] == ["a", "b", "a", "c"]


async def test_a_probe_that_fails_is_its_callers_alone() -> None:
    async with bench() as it:

        async def fail() -> None:
            raise UnavailableError("the device works no more")

        outcomes = await asyncio.gather(
            it.batcher.between_batches(fail), it.probe(), it.send("a", 1), return_exceptions=True
        )
        assert isinstance(outcomes[0], UnavailableError) and outcomes[1] is None
        assert isinstance(outcomes[2], Batched)
        await it.probe()


async def test_a_probe_that_comes_while_another_is_answered_is_answered_too() -> None:
    async with bench() as it:
        gate, began = asyncio.Event(), asyncio.Event()

        async def slow() -> None:
            began.set()
            await gate.wait()

        first = asyncio.create_task(it.batcher.between_batches(slow))
        await began.wait()
        second = asyncio.create_task(it.probe())  # the batcher was idle, and will be again
        await asyncio.sleep(0)
        job = it.send("a", 1)
        job.cancel()
        gate.set()
        await asyncio.gather(first, second)


async def test_probes_without_end_starve_no_batch() -> None:
    async with bench() as it:
        await it.keep_busy()
        waiting, probes = it.send("a", 1), set[asyncio.Task[None]]()

        async def ask_again() -> None:
            if not waiting.done() and len(probes) < 1000:
                probes.add(asyncio.create_task(it.batcher.between_batches(ask_again)))
                await asyncio.sleep(0)

        probes.add(asyncio.create_task(it.batcher.between_batches(ask_again)))
        await asyncio.sleep(0)
        it.device.gate.set()
        assert (await waiting).results == ["a:1"] and len(probes) < 10
        await asyncio.gather(*probes)


async def test_a_probe_that_nobody_waits_for_is_not_made() -> None:
    async with bench() as it:
        await it.keep_busy()
        made = []

        async def probe() -> None:
            made.append(1)

        gone, stays = (asyncio.create_task(it.batcher.between_batches(probe)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        it.device.gate.set()
        await stays
        assert made == [1]


async def test_a_batcher_that_is_stopped_tells_all_who_wait_between_batches() -> None:
    async with bench() as it:
        began = asyncio.Event()

        async def hang() -> None:
            began.set()
            await asyncio.Event().wait()

        probing = [asyncio.create_task(it.batcher.between_batches(hang)) for _ in range(3)]
        await began.wait()
        it.loop.cancel()
        outcomes = await asyncio.gather(*probing, return_exceptions=True)
        assert [type(each) for each in outcomes] == [UnavailableError] * 3


# Jobs that leave their key open.


def open_to(
    *keys: str, choice: str = "", loads: list[Load] | None = None, note: Callable[[str], object] | None = None
) -> Open[str]:
    """Of one group; wants a key, or the first that it allows."""

    def choose(load: Load) -> str:
        if loads is not None:
            loads.append(load)
        return choice or keys[0]

    return Open("group", lambda key: key in keys, choose, note or (lambda key: None))


async def test_open_jobs_share_a_batch_under_the_key_chosen_when_it_is_formed() -> None:
    async with bench() as it:
        await it.keep_busy()
        loads: list[Load] = []
        tasks = [it.send(open_to("a", "b", choice="b", loads=loads), payload, in_s=100) for payload in range(3)]
        it.device.now += 1
        it.device.gate.set()
        answers = await asyncio.gather(*tasks)
        assert it.device.batches[1:] == [("b", [0, 1, 2])]
        assert {answer.key for answer in answers} == {"b"}
        assert [load.left_s for load in loads] == [[99, 99, 99]] and loads[0].max_batch_size == 4
        assert loads[0].arrivals_per_s > 0


async def test_open_jobs_fill_up_the_batch_of_a_key_that_they_allow() -> None:
    async with bench() as it:
        await it.keep_busy()
        fixed = [it.send("a", payload) for payload in (1, 2, 3)]
        allowed, not_allowed = it.send(open_to("b", "a"), 4), it.send(open_to("b"), 5)
        it.device.gate.set()
        assert [answer.key for answer in await asyncio.gather(*fixed, allowed, not_allowed)] == ["a"] * 4 + ["b"]
        assert it.device.batches[1:] == [("a", [1, 2, 3, 4]), ("b", [5])]


async def test_jobs_of_a_key_come_before_open_ones_that_fill_it_up() -> None:
    async with bench(batch=2) as it:
        await it.keep_busy()
        tasks = [it.send(open_to("b", "a"), 1)]
        tasks += [it.send("a", payload) for payload in (2, 3)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert it.device.batches[1:] == [("a", [2, 3]), ("b", [1])]


async def test_a_batch_that_an_open_job_leads_is_filled_up_by_its_key() -> None:
    async with bench(batch_timeout_s=5) as it:
        await it.keep_busy()
        tasks = [it.send(open_to("b", "a"), 1)]
        it.device.now += 6  # it is due before any other
        tasks += [it.send(key, payload) for key, payload in (("a", 2), ("b", 3), ("b", 4))]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert it.device.batches[1:] == [("b", [1, 3, 4]), ("a", [2])]


async def test_an_explicit_key_is_never_changed() -> None:
    async with bench(batch=3) as it:
        await it.keep_busy()
        tasks = [it.send(key, payload) for payload, key in enumerate("abcabcabc")]
        tasks += [it.send(open_to("a", "b", "c"), 9 + number) for number in range(5)]
        it.device.gate.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.key for answer in answers[:9]] == list("abcabcabc")
        assert [answer.results for answer in answers] == [
            [f"{answer.key}:{payload}"] for payload, answer in enumerate(answers)
        ]


async def test_what_cannot_be_done_in_time_is_given_up_before_it_is_computed() -> None:
    async with bench() as it:
        await it.learn("a", 2.0)
        busy = await it.keep_busy()
        late, in_time = it.send("a", 1, in_s=1), it.send("a", 2, in_s=100)
        it.device.gate.set()
        await busy
        with pytest.raises(DeadlineError):
            await late  # it would take 2 s
        assert (await in_time).batch_size == 1
        assert it.device.batches[2:] == [("a", [2])] and it.device.dropped == ["deadline"]


async def test_a_batch_is_no_larger_than_its_deadline_allows() -> None:
    async with bench() as it:
        it.batcher.speed.expect("a", 0.0, 2.0)
        await it.keep_busy()
        tasks = [it.send("a", payload, in_s=14) for payload in range(4)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert [payloads for _, payloads in it.device.batches[1:]] == [[0, 1], [2, 3]]  # 4 of 14 s each


async def test_the_note_of_a_key_is_made_when_the_batch_is_formed() -> None:
    async with bench(batch=2) as it:
        await it.keep_busy()
        moment = ["first"]

        def note(key: str) -> str:
            return f"{key} at the {moment[0]} batch"

        tasks = [it.send(open_to("a", note=note), payload) for payload in range(3)]
        it.device.during_batch = lambda: moment.__setitem__(0, "second" if len(it.device.batches) == 2 else moment[0])
        it.device.gate.set()
        notes = [answer.note for answer in await asyncio.gather(*tasks)]
        assert notes == ["a at the first batch"] * 2 + ["a at the second batch"]
        assert (await it.send("a", 9)).note is None  # of a request that names its key


async def test_an_open_request_has_one_payload() -> None:
    async with bench() as it:
        with pytest.raises(AssertionError, match="two keys"):
            it.send(open_to("a", "b"), 1, 2)
        assert it.batcher.num_waiting == 0 and (await it.send(open_to("a"), 1)).results == ["a:1"]


async def test_an_answered_request_leaves_nothing_behind_without_the_collector() -> None:
    class Payload(float):
        """What can be watched."""

    async with bench() as it:
        gone = []
        gc.disable()
        try:
            for number in range(5):
                payload: Any = Payload(number)
                gone.append(weakref.ref(payload))
                task = it.send("a", payload)
                del payload
                await task
                del task
            it.device.batches.clear()
            await asyncio.sleep(0)
            assert [watched() for watched in gone] == [None] * 5
        finally:
            gc.enable()


async def test_a_slow_moment_is_not_remembered_for_ever() -> None:
    async with bench(batch=1) as it:
        it.device.during_batch = lambda: setattr(it.device, "now", it.device.now + 10.0)
        for payload in range(3):
            await it.send("a", payload)
        it.device.during_batch = lambda: None  # it is as fast as ever, but nobody has seen it
        with pytest.raises(DeadlineError):
            await it.send("a", 3, in_s=2.0)
        it.device.now += 1.0
        assert (await it.send("a", 4, in_s=2.0)).results == ["a:4"]
        assert (await it.send("a", 5, in_s=2.0)).results == ["a:5"]


async def test_an_estimate_that_batches_confirm_is_believed() -> None:
    async with bench(batch=1) as it:
        it.device.during_batch = lambda: setattr(it.device, "now", it.device.now + 10.0)
        for payload in range(3):
            await it.send("a", payload)
        for payload in range(3):  # it ran just now: whoever cannot wait for it is told so at once
            with pytest.raises(DeadlineError):
                await it.send("a", payload, in_s=2.0)
        assert len(it.device.batches) == 3


@pytest.mark.parametrize(("within_s", "others", "is_tried"), [(5.5, 0, True), (4.5, 0, False), (5.5, 1, False)])
async def test_a_device_with_nothing_else_to_do_tries_what_half_of_the_estimate_allows(
    within_s: float, others: int, is_tried: bool
) -> None:
    async with bench(batch=1) as it:
        await it.learn("a", 10.0)
        waiting = [it.send("b", payload) for payload in range(others)]
        (outcome,) = await asyncio.gather(it.send("a", 1, in_s=within_s), return_exceptions=True)
        assert isinstance(outcome, Batched) == is_tried and isinstance(outcome, DeadlineError) != is_tried
        await asyncio.gather(*waiting)


async def test_a_request_of_which_several_jobs_are_late_is_given_up_once_and_the_loop_lives() -> None:
    async with bench(batch=4) as it:
        await it.learn("a", 2.0)
        late = it.batcher.submit("a", [1, 2, 3], it.device.now + 0.9, lambda batched: batched)
        with pytest.raises(DeadlineError):
            await late
        assert it.device.dropped == ["deadline"] * 3
        assert (await it.send("a", 4)).results == ["a:4"]


async def test_a_choice_that_fails_or_is_not_allowed_fails_its_request_alone() -> None:
    def fail(of: object) -> Any:
        raise ValueError("no rung")

    broken = [
        Open("g", lambda key: key == "b", fail, lambda key: None),
        Open("g", fail, lambda load: "a", lambda key: None),
        Open("g", lambda key: True, lambda load: "a", fail),
        Open("g", lambda key: key == "b", lambda load: "a", lambda key: None),
    ]
    for each in broken:
        async with bench() as it:
            await it.keep_busy()
            failing, mates = it.send(each, 1), [it.send("a", 2), it.send("a", 3), it.send(open_to("a"), 4)]
            it.device.gate.set()
            assert [answer.results for answer in await asyncio.gather(*mates)] == [["a:2"], ["a:3"], ["a:4"]]
            with pytest.raises(EngineError, match="the choice of r"):
                await failing
            assert it.batcher.num_waiting == 0
