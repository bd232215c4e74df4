"""Two stages: a batch is prepared while the one before computes, and nobody's answer or error goes astray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.batching import engine as engine_module
from server.batching.batcher import Answer, Batcher
from server.errors import DeadlineError, EngineError, ServerError, UnavailableError
from server.errors import UndecodableError as BrokenFileError
from server.types import BatchKey, Job
from tests.server.conftest import FakeDevice, class_of, local_engine, until

FOREVER = 1e6
NO_FILE, SPOILS_PREPARING, SPOILS_COMPUTING = -1, -2, -3
"""Payloads that have an error of their own, or make the batch raise that they are in."""


class Device:
    """Prepares by adding a hundred, and computes `key:number`, each once its gate is open; notes what it does."""

    def __init__(self) -> None:
        self.prepare_gate, self.compute_gate = asyncio.Event(), asyncio.Event()
        self.prepare_gate.set()
        self.compute_gate.set()
        self.events: list[tuple[str, list[int]]] = []
        self.now = 1000.0
        self.prepare_s = self.compute_s = 0.0
        self.ran_s: list[float] = []
        self.idle_began = 0

    async def prepare(self, key: str, payloads: Sequence[int]) -> list[int | ServerError]:
        self.events.append(("prepare", list(payloads)))
        await self.prepare_gate.wait()
        self.now += self.prepare_s
        if SPOILS_PREPARING in payloads:
            raise RuntimeError("no memory to prepare it")
        self.events.append(("prepared", list(payloads)))
        return [BrokenFileError("no file") if each == NO_FILE else each + 100 for each in payloads]

    async def compute(self, key: str, prepared: Sequence[int]) -> list[str]:
        self.events.append(("compute", [each - 100 for each in prepared]))
        await self.compute_gate.wait()
        self.now += self.compute_s
        if SPOILS_COMPUTING + 100 in prepared:
            raise RuntimeError("cannot be computed")
        self.events.append(("computed", [each - 100 for each in prepared]))
        return [f"{key}:{each - 100}" for each in prepared]

    async def idle(self, arrived: asyncio.Event) -> None:
        self.idle_began += 1
        await arrived.wait()

    def batch_ran(self, key: str, waits_s: Sequence[float], run_s: float) -> None:
        self.ran_s.append(run_s)

    def job_dropped(self, reason: str) -> None:
        pass


class Bench:
    """A started batcher of two stages."""

    def __init__(self, batch: int) -> None:
        self.device = Device()
        self.batcher = Batcher[str, int, str](
            self.device.compute,
            prepare=self.device.prepare,
            max_batch_size=batch,
            max_queue_size=100,
            batch_timeout_s=FOREVER,
            observer=self.device,
            idle=self.device.idle,
            clock=lambda: self.device.now,
        )
        self.loop = self.batcher.start()

    def send(self, payload: int, timeout_s: float = FOREVER) -> asyncio.Task[Answer[str, str]]:
        return asyncio.create_task(self.batcher.submit("a", payload, timeout_s))

    async def happened(self, event: str, payloads: list[int]) -> None:
        await until(lambda: (event, payloads) in self.device.events)


@asynccontextmanager
async def bench(batch: int = 4) -> AsyncIterator[Bench]:
    it = Bench(batch)
    try:
        yield it
    finally:
        it.device.prepare_gate.set()
        it.device.compute_gate.set()
        await it.batcher.close()


async def test_a_batch_is_prepared_while_the_one_before_computes() -> None:
    async with bench() as it:
        it.device.compute_gate.clear()
        first = it.send(1)
        await it.happened("compute", [1])
        second = it.send(2)
        await it.happened("prepared", [2])
        assert ("computed", [1]) not in it.device.events and ("compute", [2]) not in it.device.events
        it.device.compute_gate.set()
        assert [(await each).result for each in (first, second)] == ["a:1", "a:2"]


async def test_no_batch_leaves_the_queue_while_one_is_prepared_or_waits_for_the_device() -> None:
    async with bench() as it:
        it.device.compute_gate.clear()
        tasks = [it.send(1)]
        await it.happened("compute", [1])
        it.device.prepare_gate.clear()
        tasks.append(it.send(2))
        await it.happened("prepare", [2])
        tasks += [it.send(3), it.send(4)]
        await until(lambda: it.batcher.num_waiting == 2)
        it.device.prepare_gate.set()
        await it.happened("prepared", [2])
        assert it.batcher.num_waiting == 2
        it.device.compute_gate.set()
        assert [(await each).result for each in tasks] == ["a:1", "a:2", "a:3", "a:4"]
        assert ("compute", [3, 4]) in it.device.events


async def test_one_batch_computes_and_one_is_prepared_at_a_time() -> None:
    async with bench(batch=2) as it:
        answers = await asyncio.gather(*(it.send(payload) for payload in range(20)))
        assert [answer.result for answer in answers] == [f"a:{payload}" for payload in range(20)]
        for stage in ({"prepare": 1, "prepared": -1}, {"compute": 1, "computed": -1}):
            steps = [stage[event] for event, _ in it.device.events if event in stage]
            assert steps == [1, -1] * 10


async def test_the_pace_is_the_slower_stages_and_the_client_is_told_all_of_its_time() -> None:
    async with bench() as it:
        it.device.prepare_s, it.device.compute_s = 1.0, 3.0
        assert (await it.send(1)).run_s == 4.0
        assert it.batcher.speed("a", 1) == 3.0 and it.device.ran_s == [3.0]
        it.device.prepare_s, it.device.compute_s = 7.0, 3.0
        assert (await it.send(1)).run_s == 10.0
        assert it.device.ran_s == [3.0, 7.0]


async def test_waiting_for_the_device_is_no_part_of_the_pace() -> None:
    async with bench() as it:
        it.device.compute_s = 2.0
        it.device.compute_gate.clear()
        first = it.send(1)
        await it.happened("compute", [1])
        second = it.send(2)
        await it.happened("prepared", [2])
        it.device.now += 50.0
        it.device.compute_gate.set()
        await first
        assert (await second).run_s == 54.0
        assert it.device.ran_s == [52.0, 2.0]


async def test_a_job_that_the_batch_before_makes_late_is_given_up() -> None:
    async with bench() as it:
        it.device.compute_s = 5.0
        await it.send(0)
        assert (await it.send(1, 7.0)).result == "a:1"  # an idle device has it in time
        it.device.compute_gate.clear()
        busy = it.send(2)
        await it.happened("compute", [2])
        late, in_time = it.send(3, 7.0), it.send(4, 11.0)
        with pytest.raises(DeadlineError):
            await late
        await it.happened("prepared", [4])
        it.device.compute_gate.set()
        await busy
        assert (await in_time).result == "a:4"


@settings(max_examples=60)
@given(
    payloads=st.lists(st.integers(0, 50), max_size=20),
    bad=st.lists(st.sampled_from([NO_FILE, SPOILS_PREPARING, SPOILS_COMPUTING]), max_size=2),
    batch=st.integers(1, 8),
    data=st.data(),
)
async def test_everybody_has_an_answer_or_an_error_of_their_own(
    payloads: list[int], bad: list[int], batch: int, data: st.DataObject
) -> None:
    sent = data.draw(st.permutations(payloads + bad))
    async with bench(batch) as it:
        tasks = [it.send(each) for each in sent]
        for payload, outcome in zip(sent, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if payload == NO_FILE:
                assert isinstance(outcome, BrokenFileError)
            elif payload < 0:
                assert isinstance(outcome, EngineError)
            else:
                assert isinstance(outcome, Answer) and outcome.result == f"a:{payload}"


async def test_a_file_that_cannot_be_decoded_costs_no_second_run() -> None:
    async with bench(batch=8) as it:
        outcomes = await asyncio.gather(*(it.send(each) for each in (1, NO_FILE, 2, 3)), return_exceptions=True)
        assert isinstance(outcomes[1], BrokenFileError)
        assert [event for event, _ in it.device.events] == ["prepare", "prepared", "compute", "computed"]
        assert it.batcher.speed("a", 1) == 0  # of a batch that was not whole nothing is learned


async def test_a_batch_of_which_nothing_can_be_prepared_is_not_computed() -> None:
    async with bench() as it:
        outcomes = await asyncio.gather(it.send(NO_FILE), it.send(NO_FILE), return_exceptions=True)
        assert [type(each) for each in outcomes] == [BrokenFileError] * 2
        assert [event for event, _ in it.device.events] == ["prepare", "prepared"]
        assert (await it.send(1)).result == "a:1"


async def test_idle_time_begins_when_nothing_computes() -> None:
    async with bench() as it:
        it.device.compute_gate.clear()
        task = it.send(1)
        await it.happened("compute", [1])
        idle_before = it.device.idle_began
        for _ in range(20):
            await asyncio.sleep(0)
        assert it.device.idle_began == idle_before
        it.device.compute_gate.set()
        await task
        await until(lambda: it.device.idle_began == idle_before + 1)


async def test_close_answers_what_is_under_way_in_both_stages() -> None:
    async with bench() as it:
        it.device.compute_gate.clear()
        tasks = [it.send(1)]
        await it.happened("compute", [1])
        tasks.append(it.send(2))
        await it.happened("prepared", [2])
        tasks.append(it.send(3))
        await until(lambda: it.batcher.num_waiting == 1)
        closing = asyncio.create_task(it.batcher.close())
        it.device.compute_gate.set()
        await closing
        assert [each.result().result for each in tasks] == ["a:1", "a:2", "a:3"]


async def test_a_batcher_that_is_stopped_fails_both_batches() -> None:
    async with bench() as it:
        it.device.compute_gate.clear()
        tasks = [it.send(1)]
        await it.happened("compute", [1])
        tasks.append(it.send(2))
        await it.happened("prepared", [2])
        it.loop.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, UnavailableError)
        with pytest.raises(asyncio.CancelledError):
            await it.loop
        it.batcher._loop = None  # closing it would wait for what was cancelled


class Preparing:
    """Gives a job with its pixels reversed, for a device that computes on such; notes its threads."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[str] = set()
        self.failure: Exception | None = None

    def __call__(self, key: BatchKey, jobs: Sequence[Job]) -> list[Any]:
        self.threads.add(threading.current_thread().name)
        self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return [BrokenFileError("broken") if not job.pixels else job for job in jobs]


def job(pixels: bytes) -> Job:
    return Job("tiny", pixels, (0, 0, 0), 1, 1000.0)


async def test_the_engine_prepares_on_a_thread_of_its_own_while_the_device_computes() -> None:
    device, preparing = FakeDevice(), Preparing()
    engine = local_engine(device, prepare_batch=preparing)
    engine.start()
    device.gate.clear()
    first = asyncio.create_task(engine.classify(job(b"a")))
    await until(lambda: len(device.batches) == 1)
    second = asyncio.create_task(engine.classify(job(b"b")))
    preparing.threads.clear()
    await until(lambda: bool(preparing.threads))
    assert not first.done() and all(name.startswith("prepare") for name in preparing.threads)
    device.gate.set()
    for pixels, task in ((b"a", first), (b"b", second)):
        assert (await task).top_k.indices == [class_of(pixels, (0, 0, 0))]
    outcomes = await asyncio.gather(*(engine.classify(job(each)) for each in (b"a", b"", b"c")), return_exceptions=True)
    assert isinstance(outcomes[1], BrokenFileError)
    assert [isinstance(each, BaseException) for each in outcomes] == [False, True, False]
    await engine.explain(job(b"abc"))  # its pixels need no preparing
    await engine.check()
    await engine.close()


async def test_a_stage_that_hangs_is_the_end_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "HANGS_AFTER_S", 0.05)
    preparing = Preparing()
    engine = local_engine(FakeDevice(), prepare_batch=preparing)
    engine.start()
    preparing.gate.clear()
    with pytest.raises(UnavailableError, match="hangs"):
        await engine.classify(job(b"a"))
    await engine.broken()
    preparing.gate.set()
    await engine.close()


async def test_a_device_that_fails_to_prepare_shows_whether_it_still_works() -> None:
    checks = []
    preparing = Preparing()
    preparing.failure = RuntimeError("the decoder burns")
    engine = local_engine(FakeDevice(), prepare_batch=preparing, check_device=lambda: checks.append(1))
    engine.start()
    with pytest.raises(EngineError, match="the decoder burns"):
        await engine.classify(job(b"a"))
    assert checks == [1]
    await engine.close()


async def test_drift_computes_again_from_the_file() -> None:
    device, preparing = FakeDevice(), Preparing()
    engine = local_engine(device, prepare_batch=preparing, drift_sample=1.0)
    engine.start()
    await engine.classify(Job("tiny", b"file", (4, 4, 4), 1, 1000.0))
    await until(lambda: len(device.batches) == 2)
    assert [(key.schedule, [each.pixels for each in jobs]) for key, jobs in device.batches] == [
        ((4, 4, 4), [b"file"]),
        ((0, 0, 0), [b"file"]),
    ]
    await engine.close()
