"""The batcher alone, with a fake device: what is batched, in which order, and who is answered what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.batching.batcher import Answer, Batcher, Open
from server.batching.policy import Load
from server.errors import DeadlineError, EngineError, QueueFullError, UnavailableError
from tests.server.conftest import until

FOREVER = 1e6


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

    async def run_batch(self, key: str, payloads: Sequence[int]) -> list[str]:
        self.batches.append((key, list(payloads)))
        await self.gate.wait()
        self.during_batch()
        if self.failures:
            raise self.failures.pop()
        answers = [f"{key}:{payload}" for payload in payloads]
        return answers[self.lost_answers :]

    def batch_ran(self, key: str, waits_s: Sequence[float], run_s: float) -> None:
        self.ran.append((key, len(waits_s)))

    def job_dropped(self, reason: str) -> None:
        self.dropped.append(reason)


class Bench:
    """A batcher, its device, and shorthands to drive both."""

    def __init__(self, device: Device, batcher: Batcher[str, int, str]) -> None:
        self.device, self.batcher = device, batcher

    def send(self, key: str | Open[str], payload: int, timeout_s: float = FOREVER) -> asyncio.Task[Answer[str, str]]:
        return asyncio.create_task(self.batcher.submit(key, payload, timeout_s))

    async def queued(
        self, key: str | Open[str], payload: int, timeout_s: float = FOREVER
    ) -> asyncio.Task[Answer[str, str]]:
        """Sends a job to a busy device and returns once it waits in the queue."""
        waiting = self.batcher.num_waiting
        task = self.send(key, payload, timeout_s)
        await until(lambda: self.batcher.num_waiting > waiting or task.done())
        return task

    async def keep_busy(self, key: str = "busy") -> asyncio.Task[Answer[str, str]]:
        """Occupies the device until its gate is opened."""
        self.device.gate.clear()
        batches = len(self.device.batches)
        task = self.send(key, 0)
        await until(lambda: len(self.device.batches) > batches)
        return task


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
    batcher.start()
    try:
        yield Bench(device, batcher)
    finally:
        device.gate.set()
        await batcher.close()


async def test_an_idle_device_takes_a_lone_job_at_once() -> None:
    async with bench(batch=64) as it:
        answer = await it.batcher.submit("a", 1, FOREVER)
        assert (answer.result, answer.batch_size, answer.wait_s) == ("a:1", 1, 0.0)


async def test_jobs_that_arrive_together_fill_a_batch() -> None:
    async with bench(batch=4) as it:
        answers = await asyncio.gather(*(it.send("a", payload) for payload in range(4)))
        assert it.device.batches == [("a", [0, 1, 2, 3])]
        assert [answer.batch_size for answer in answers] == [4] * 4


async def test_jobs_collect_while_the_device_is_busy_and_then_share_a_batch() -> None:
    async with bench() as it:
        await it.keep_busy()
        tasks = [await it.queued("a", payload) for payload in range(3)]
        assert it.batcher.num_waiting == 3
        it.device.gate.set()
        assert [answer.batch_size for answer in await asyncio.gather(*tasks)] == [3, 3, 3]
        assert it.device.batches == [("busy", [0]), ("a", [0, 1, 2])]
        assert it.device.ran == [("busy", 1), ("a", 3)]


async def test_no_batch_is_larger_than_max_batch_size_and_the_oldest_go_first() -> None:
    async with bench(batch=4) as it:
        await it.keep_busy()
        tasks = [await it.queued("a", payload) for payload in range(10)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert [payloads for _, payloads in it.device.batches[1:]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_the_fullest_key_goes_first_while_no_job_is_old() -> None:
    async with bench(batch_timeout_s=1.0) as it:
        await it.keep_busy()
        tasks = [await it.queued("rare", 0), await it.queued("common", 1), await it.queued("common", 2)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert [key for key, _ in it.device.batches] == ["busy", "common", "rare"]


async def test_timeout_an_aged_jobs_key_goes_before_a_fuller_one() -> None:
    async with bench(batch_timeout_s=1.0) as it:
        await it.keep_busy()
        rare = await it.queued("rare", 0)
        it.device.now += 1.5
        tasks = [await it.queued("common", payload) for payload in range(3)]
        it.device.gate.set()
        assert (await rare).wait_s == 1.5
        await asyncio.gather(*tasks)
        assert [key for key, _ in it.device.batches] == ["busy", "rare", "common"]


async def test_a_rare_key_does_not_starve_under_a_flood_of_another() -> None:
    async with bench(batch=2, batch_timeout_s=1.0) as it:
        flood = [await it.keep_busy("flood")]
        rare = await it.queued("rare", 0)

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
        busy = await it.keep_busy("urgent")
        it.device.now += 2.0
        it.device.gate.set()
        await busy  # the batcher has now seen that a batch of this key takes 2 s
        await it.keep_busy()
        tasks = [await it.queued("common", 1), await it.queued("common", 2), await it.queued("urgent", 3, 3.0)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert [key for key, _ in it.device.batches[-2:]] == ["urgent", "common"]


async def test_within_a_key_the_nearest_deadline_goes_first() -> None:
    async with bench(batch=1) as it:
        await it.keep_busy()
        tasks = [await it.queued("a", 1, 500.0), await it.queued("a", 2, 100.0)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert it.device.batches[1:] == [("a", [2]), ("a", [1])]


async def test_a_client_gone_before_the_run_is_not_computed() -> None:
    async with bench() as it:
        await it.keep_busy()
        gone, stays = await it.queued("a", 1), await it.queued("a", 2)
        gone.cancel()
        await until(gone.done)
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
        await until(tasks[1].done)
        it.device.gate.set()
        assert [(await tasks[index]).result for index in (0, 2)] == ["a:0", "a:2"]
        assert (await it.batcher.submit("a", 9, FOREVER)).result == "a:9"
        assert it.device.dropped == []


async def test_an_engine_that_raises_fails_its_batch_and_the_next_one_works() -> None:
    async with bench() as it:
        it.device.failures = [RuntimeError("the device burns")] * 3  # for both jobs, then for each alone
        failed = await asyncio.gather(it.send("a", 1), it.send("a", 2), return_exceptions=True)
        assert [type(error) for error in failed] == [EngineError, EngineError]
        assert "the device burns" in str(failed[0])
        assert (await it.batcher.submit("a", 3, FOREVER)).result == "a:3"


async def test_a_job_that_fails_alone_is_parted_from_its_batch_mates(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(batch=8) as it:
        run_batch = it.device.run_batch

        async def poisoned(key: str, payloads: Sequence[int]) -> list[str]:
            answers = await run_batch(key, payloads)
            if 3 in payloads:
                raise ValueError("three")
            return answers

        monkeypatch.setattr(it.batcher, "_run_batch", poisoned)
        outcomes = await asyncio.gather(*(it.send("a", payload) for payload in range(8)), return_exceptions=True)
        assert isinstance(outcomes[3], EngineError) and "three" in str(outcomes[3])
        assert [(answer.result, answer.batch_size) for answer in outcomes if isinstance(answer, Answer)] == [
            (f"a:{payload}", 8) for payload in range(8) if payload != 3
        ]
        assert it.device.ran == [("a", 7)]  # one batch of which so many were answered
        assert it.batcher.speed.line("a") is None  # and whose time says nothing


async def test_an_engine_that_raises_a_server_error_is_quoted() -> None:
    async with bench() as it:
        it.device.failures = [UnavailableError("out of memory", retry_after_s=3)]
        with pytest.raises(UnavailableError, match="out of memory"):
            await it.batcher.submit("a", 1, FOREVER)


async def test_a_wrong_number_of_answers_fails_the_batch_and_the_next_one_works() -> None:
    async with bench() as it:
        it.device.lost_answers = 1
        failed = await asyncio.gather(it.send("a", 1), it.send("a", 2), return_exceptions=True)
        assert [type(error) for error in failed] == [EngineError, EngineError]
        assert "0 answers to 1 images" in str(failed[0])
        it.device.lost_answers = 0
        assert (await it.batcher.submit("a", 3, FOREVER)).result == "a:3"


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async with bench(queue=2) as it:
        busy = await it.keep_busy()
        it.device.now += 4.0
        it.device.gate.set()
        await busy  # one job takes 4 s
        await it.keep_busy()
        tasks = [await it.queued("a", 1), await it.queued("a", 2)]
        with pytest.raises(QueueFullError, match="at most 2") as refusal:
            await it.batcher.submit("a", 3, FOREVER)
        assert refusal.value.retry_after_s == pytest.approx(2 * 4.0)
        assert it.batcher.num_waiting == 2
        it.device.gate.set()
        await asyncio.gather(*tasks)


async def test_a_cancelled_job_makes_room_in_a_full_queue_at_once() -> None:
    async with bench(queue=1) as it:
        await it.keep_busy()
        first = await it.queued("a", 1)
        first.cancel()
        await until(first.done)
        second = await it.queued("a", 2)
        it.device.gate.set()
        assert (await second).result == "a:2"


async def test_an_urgent_job_passes_a_full_queue_and_goes_first() -> None:
    async with bench(queue=2) as it:
        await it.keep_busy()
        tasks = [await it.queued("a", 1), await it.queued("a", 2)]
        urgent = asyncio.create_task(it.batcher.submit("check", 0, FOREVER, urgent=True))
        await until(lambda: it.batcher.num_waiting == 3)
        it.device.gate.set()
        await asyncio.gather(urgent, *tasks)
        assert [key for key, _ in it.device.batches] == ["busy", "check", "a"]


async def test_a_deadline_that_passes_in_the_queue_is_an_error_and_nothing_is_computed() -> None:
    async with bench() as it:
        await it.keep_busy()
        late, patient = await it.queued("a", 1, 50.0), await it.queued("a", 2)
        it.device.now += 60.0
        it.device.gate.set()
        with pytest.raises(DeadlineError):
            await late
        assert (await patient).result == "a:2"
        assert it.device.batches[1:] == [("a", [2])]
        assert it.device.dropped == ["deadline"]


async def test_a_deadline_ends_the_wait_while_the_device_is_busy() -> None:
    async with bench() as it:
        await it.keep_busy()
        with pytest.raises(DeadlineError):
            await it.batcher.submit("a", 1, 0.01)
        assert it.batcher.num_waiting == 0


async def test_a_deadline_that_passes_during_the_run_is_an_error_and_the_others_are_answered() -> None:
    async with bench() as it:
        it.device.gate.clear()
        late, patient = it.send("a", 1, 0.01), it.send("a", 2)
        with pytest.raises(DeadlineError):
            await late
        assert it.device.batches == [("a", [1, 2])]
        it.device.gate.set()
        assert (await patient).result == "a:2"


async def test_close_answers_everyone_who_waits() -> None:
    async with bench(batch=2) as it:
        tasks = [await it.keep_busy()] + [await it.queued(key, 1) for key in ("a", "b", "c")]
        closing = asyncio.create_task(it.batcher.close())
        await asyncio.sleep(0)
        it.device.gate.set()
        await closing
        assert [task.result().result for task in tasks] == ["busy:0", "a:1", "b:1", "c:1"]


async def test_an_observer_that_fails_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench() as it:

        def fail(*event: object) -> None:
            raise OSError("the disk is full")

        monkeypatch.setattr(it.device, "batch_ran", fail)
        for payload in range(3):
            assert (await it.batcher.submit("a", payload, FOREVER)).result == f"a:{payload}"


@pytest.mark.parametrize("urgent", [False, True])
async def test_a_job_after_close_is_refused(urgent: bool) -> None:
    async with bench() as it:
        await it.batcher.close()
        with pytest.raises(UnavailableError) as refusal:
            await it.batcher.submit("a", 1, FOREVER, urgent=urgent)
        assert refusal.value.retry_after_s


STEP = st.sampled_from(["send", "send", "send", "turn", "open", "close", "cancel", "age"])
STEPS = st.lists(st.tuples(st.sampled_from("abc"), STEP), max_size=60)


@settings(max_examples=60)
@given(steps=STEPS, batch=st.integers(1, 5))
async def test_keys_never_mix_and_each_answer_belongs_to_its_payload(steps: list[tuple[str, str]], batch: int) -> None:
    async with bench(batch=batch, batch_timeout_s=2.0) as it:
        tasks: dict[str, asyncio.Task[Answer[str, str]]] = {}
        key_of: dict[int, str] = {}
        cancelled = set()
        for payload, (key, step) in enumerate(steps):
            if step == "send":
                key_of[payload] = key
                tasks[f"{key}:{payload}"] = it.send(key, payload)
            elif step == "turn":
                await asyncio.sleep(0)
            elif step in ("open", "close"):
                (it.device.gate.set if step == "open" else it.device.gate.clear)()
            elif step == "age":
                it.device.now += 1.0
            elif tasks:
                name = list(tasks)[payload % len(tasks)]
                if tasks[name].cancel():
                    cancelled.add(name)
        it.device.gate.set()
        answers = await asyncio.gather(*tasks.values(), return_exceptions=True)
        for name, answer in zip(tasks, answers, strict=True):
            if name in cancelled:
                assert isinstance(answer, asyncio.CancelledError)
            else:
                assert isinstance(answer, Answer) and answer.result == name
        for key, payloads in it.device.batches:
            assert {key_of[payload] for payload in payloads} == {key}
            assert len(payloads) <= batch
        computed = [payload for _, payloads in it.device.batches for payload in payloads]
        assert len(set(computed)) == len(computed)
        assert it.batcher.num_waiting == 0


def open_to(*keys: str, choice: str = "", loads: list[Load] | None = None) -> Open[str]:
    """Of one group; wants a key, or the first that it allows."""

    def choose(load: Load) -> str:
        if loads is not None:
            loads.append(load)
        return choice or keys[0]

    return Open("group", lambda key: key in keys, choose)


async def test_open_jobs_share_a_batch_under_the_key_chosen_when_it_is_formed() -> None:
    async with bench() as it:
        await it.keep_busy()
        loads: list[Load] = []
        tasks = [await it.queued(open_to("a", "b", choice="b", loads=loads), payload, 100) for payload in range(3)]
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
        fixed = [await it.queued("a", payload) for payload in (1, 2, 3)]
        allowed, not_allowed = await it.queued(open_to("b", "a"), 4), await it.queued(open_to("b"), 5)
        it.device.gate.set()
        assert [answer.key for answer in await asyncio.gather(*fixed, allowed, not_allowed)] == ["a"] * 4 + ["b"]
        assert it.device.batches[1:] == [("a", [1, 2, 3, 4]), ("b", [5])]


async def test_jobs_of_a_key_come_before_open_ones_that_fill_it_up() -> None:
    async with bench(batch=2) as it:
        await it.keep_busy()
        tasks = [await it.queued(open_to("b", "a"), 1)]
        tasks += [await it.queued("a", payload) for payload in (2, 3)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert it.device.batches[1:] == [("a", [2, 3]), ("b", [1])]


async def test_a_batch_that_an_open_job_leads_is_filled_up_by_its_key() -> None:
    async with bench(batch_timeout_s=5) as it:
        await it.keep_busy()
        tasks = [await it.queued(open_to("b", "a"), 1)]
        it.device.now += 6  # it is due before any other
        tasks += [await it.queued(key, payload) for key, payload in (("a", 2), ("b", 3), ("b", 4))]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert it.device.batches[1:] == [("b", [1, 3, 4]), ("a", [2])]


async def test_an_explicit_key_is_never_changed() -> None:
    async with bench(batch=3) as it:
        await it.keep_busy()
        tasks = [await it.queued(key, payload) for payload, key in enumerate("abcabcabc")]
        tasks += [await it.queued(open_to("a", "b", "c"), 9 + number) for number in range(5)]
        it.device.gate.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.key for answer in answers[:9]] == list("abcabcabc")
        assert [answer.result for answer in answers] == [
            f"{answer.key}:{payload}" for payload, answer in enumerate(answers)
        ]


async def test_what_cannot_be_done_in_time_is_given_up_before_it_is_computed() -> None:
    async with bench() as it:
        it.batcher.speed.expect("a", 0.0, 2.0)
        busy = await it.keep_busy()
        late, in_time = await it.queued("a", 1, timeout_s=1), await it.queued("a", 2, timeout_s=100)
        it.device.gate.set()
        await busy
        with pytest.raises(DeadlineError):
            await late  # it would take 2 s
        assert (await in_time).batch_size == 1
        assert it.device.batches[1:] == [("a", [2])] and it.device.dropped == ["deadline"]


async def test_a_batch_is_no_larger_than_its_deadline_allows() -> None:
    async with bench() as it:
        it.batcher.speed.expect("a", 0.0, 2.0)
        await it.keep_busy()
        tasks = [await it.queued("a", payload, timeout_s=14) for payload in range(4)]
        it.device.gate.set()
        await asyncio.gather(*tasks)
        assert [payloads for _, payloads in it.device.batches[1:]] == [[0, 1], [2, 3]]  # 4 of 14 s each
