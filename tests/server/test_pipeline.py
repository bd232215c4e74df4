"""Two stages: a batch is prepared while the one before computes, and nobody's answer or error goes astray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.batching import engine as engine_module
from server.batching.batcher import Batcher
from server.batching.engine import LocalEngine
from server.batching.jobs import Batched
from server.errors import DeadlineError, EngineError, ServerError, UnavailableError
from server.errors import UndecodableError as BrokenFileError
from server.images.image import Pixels
from server.ipc.messages import Answered, Item
from server.types import BatchKey
from tests.server.conftest import FakeDevice, class_of, classify, explain, local_engine, until

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

    def send(self, *payloads: int, in_s: float = FOREVER) -> asyncio.Future[Batched[str, str]]:
        return self.batcher.submit("a", payloads, self.device.now + in_s, lambda batched: batched)

    async def probe(self) -> int:
        """Is done between batches; gives how many events there were by then."""
        events: list[int] = []

        async def look() -> None:
            events.append(len(self.device.events))

        await self.batcher.between_batches(look)
        return events[0]

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


async def settled() -> None:
    """Lets everything happen that is about to."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_batch_is_prepared_while_the_one_before_computes() -> None:
    async with bench() as it:
        it.device.compute_gate.clear()
        first = it.send(1)
        await it.happened("compute", [1])
        second = it.send(2)
        await it.happened("prepared", [2])
        assert ("computed", [1]) not in it.device.events
        it.device.compute_gate.set()
        assert [(await each).results for each in (first, second)] == [["a:1"], ["a:2"]]


async def test_full_batches_are_handed_on_before_the_stage_is_free_and_no_more_than_four() -> None:
    async with bench(batch=2) as it:
        it.device.prepare_gate.clear()
        it.device.compute_gate.clear()
        tasks = [it.send(payload) for payload in range(13)]
        await it.happened("prepare", [2, 3])  # it waits in the stage for the one before
        await settled()
        assert it.batcher.num_waiting == 9
        it.device.prepare_gate.set()
        await it.happened("prepare", [6, 7])
        await settled()
        assert it.batcher.num_waiting == 5  # one computes, the others stand behind it
        it.device.compute_gate.set()
        assert [(await each).results for each in tasks] == [[f"a:{payload}"] for payload in range(13)]


async def test_a_batch_that_may_grow_waits_until_the_stage_is_free() -> None:
    async with bench(batch=4) as it:
        it.device.prepare_gate.clear()
        tasks = [it.send(0)]
        await it.happened("prepare", [0])
        tasks += [it.send(1), it.send(2), it.send(3)]
        await settled()
        assert it.batcher.num_waiting == 3
        tasks.append(it.send(4))
        await it.happened("prepare", [1, 2, 3, 4])
        it.device.prepare_gate.set()
        assert [(await each).results for each in tasks] == [[f"a:{payload}"] for payload in range(5)]


async def test_no_batch_leaves_the_queue_while_one_is_prepared_or_waits_for_the_device() -> None:
    async with bench() as it:
        it.device.compute_gate.clear()
        tasks = [it.send(1)]
        await it.happened("compute", [1])
        it.device.prepare_gate.clear()
        tasks.append(it.send(2))
        await it.happened("prepare", [2])
        tasks += [it.send(3), it.send(4)]
        assert it.batcher.num_waiting == 2
        it.device.prepare_gate.set()
        await it.happened("prepared", [2])
        assert it.batcher.num_waiting == 2
        it.device.compute_gate.set()
        assert [(await each).results for each in tasks] == [["a:1"], ["a:2"], ["a:3"], ["a:4"]]
        assert ("compute", [3, 4]) in it.device.events


async def test_one_batch_computes_and_one_is_prepared_at_a_time() -> None:
    async with bench(batch=2) as it:
        answers = await asyncio.gather(*(it.send(payload) for payload in range(20)))
        assert [answer.results for answer in answers] == [[f"a:{payload}"] for payload in range(20)]
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
        assert (await it.send(1, in_s=7.0)).results == ["a:1"]  # an idle device has it in time
        it.device.compute_gate.clear()
        busy = it.send(2)
        await it.happened("compute", [2])
        late, in_time = it.send(3, in_s=7.0), it.send(4, in_s=11.0)
        with pytest.raises(DeadlineError):
            await late
        await it.happened("prepared", [4])
        it.device.compute_gate.set()
        await busy
        assert (await in_time).results == ["a:4"]


BAD = st.sampled_from([NO_FILE, SPOILS_PREPARING, SPOILS_COMPUTING])


@settings(max_examples=60)
@given(
    requests=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), max_size=12),
    bad=st.lists(BAD, max_size=2),
    batch=st.integers(1, 8),
    num_probes=st.integers(0, 3),
    data=st.data(),
)
async def test_everybody_has_an_answer_or_an_error_of_their_own(
    requests: list[list[int]], bad: list[int], batch: int, num_probes: int, data: st.DataObject
) -> None:
    sent = data.draw(st.permutations(requests + [[each] for each in bad]))
    # One of these has a bad payload among good ones. With three bad ones a batch may be given up as hopeless.
    mixed = [each + bad for each in requests[:1] if len(bad) == 1]
    async with bench(batch) as it:
        tasks = [it.send(*each) for each in sent + mixed]
        probes = [asyncio.create_task(it.probe()) for _ in range(num_probes)]
        for payloads, outcome in zip(sent + mixed, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if NO_FILE in payloads and len(payloads) == 1:
                assert isinstance(outcome, BrokenFileError)
            elif min(payloads) < 0:
                assert isinstance(outcome, EngineError | BrokenFileError)
            else:
                assert isinstance(outcome, Batched) and outcome.results == [f"a:{payload}" for payload in payloads]
        await asyncio.gather(*probes)
        assert not it.loop.done() and it.batcher.num_waiting == 0


async def test_a_request_over_several_batches_is_answered_in_order() -> None:
    async with bench(batch=3) as it:
        it.device.prepare_s, it.device.compute_s = 1.0, 2.0
        answer = await it.send(*range(8))
        assert answer.results == [f"a:{payload}" for payload in range(8)] and answer.batch_size == 3
        assert [each for event, each in it.device.events if event == "computed"] == [[0, 1, 2], [3, 4, 5], [6, 7]]


async def test_a_payload_that_cannot_be_decoded_fails_its_request_and_withdraws_what_waits_of_it() -> None:
    async with bench(batch=2) as it:
        failing, mate = it.send(NO_FILE, 1, 2, 3, 4), it.send(5)
        with pytest.raises(BrokenFileError):
            await failing
        assert (await mate).results == ["a:5"]
        prepared = [payload for event, each in it.device.events if event == "prepared" for payload in each]
        assert prepared == [NO_FILE, 1, 5] and it.batcher.num_waiting == 0


async def test_a_probe_is_answered_while_a_batch_computes_and_before_the_next_is_prepared() -> None:
    async with bench(batch=8) as it:
        it.device.compute_gate.clear()
        tasks = [it.send(1)]
        await it.happened("compute", [1])
        assert ("computed", [1]) not in it.device.events[: await it.probe()]
        it.device.prepare_gate.clear()
        tasks.append(it.send(2))
        await it.happened("prepare", [2])
        tasks.append(it.send(3))
        probing = asyncio.create_task(it.probe())
        await asyncio.sleep(0)
        it.device.prepare_gate.set()
        it.device.compute_gate.set()
        num_events = await probing
        assert ("prepare", [3]) not in it.device.events[:num_events]
        assert [(await each).results for each in tasks] == [["a:1"], ["a:2"], ["a:3"]]


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
        assert (await it.send(1)).results == ["a:1"]


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
        closing = asyncio.create_task(it.batcher.close())
        it.device.compute_gate.set()
        await closing
        assert [each.result().results for each in tasks] == [["a:1"], ["a:2"], ["a:3"]]


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


class Preparing(FakeDevice):
    """Prepares an image by making work of it, which alone is computed; notes its threads. It decodes no empty files."""

    def __init__(self) -> None:
        super().__init__(prepares=True)
        self.prepare_gate = threading.Event()
        self.prepare_gate.set()
        self.preparing: set[str] = set()
        self.computing: set[str] = set()
        self.prepare_failure: Exception | None = None
        self.checks = 0

    def prepare(self, key: BatchKey, items: Sequence[Item]) -> Sequence[Any]:
        self.preparing.add(threading.current_thread().name)
        self.prepare_gate.wait()
        if self.prepare_failure is not None:
            raise self.prepare_failure
        return [("work", each) if each.image.data else BrokenFileError("broken") for each in items]

    def compute(self, key: BatchKey, work: Sequence[Any]) -> Any:
        self.computing.add(threading.current_thread().name)
        assert all(made == "work" for made, _ in work)
        return super().compute(key, [item for _, item in work])

    def check(self) -> None:
        self.computing.add(threading.current_thread().name)
        self.checks += 1
        super().check()


@asynccontextmanager
async def started(device: Preparing, **options: Any) -> AsyncIterator[LocalEngine]:
    engine = local_engine(device, **options)
    engine.start()
    try:
        yield engine
    finally:
        device.gate.set()
        device.prepare_gate.set()
        await engine.close()


async def test_the_engine_prepares_on_a_thread_of_its_own_while_the_device_computes() -> None:
    device = Preparing()
    async with started(device) as engine:
        device.gate.clear()
        first = engine.answer(classify(b"a"))
        await until(lambda: len(device.batches) == 1)
        device.preparing.clear()
        second = engine.answer(classify(b"b"))
        await until(lambda: bool(device.preparing))
        assert not first.done()
        device.gate.set()
        for pixels, answer in ((b"a", first), (b"b", second)):
            assert (await answer).results[0].indices == [class_of(pixels, (0, 0, 0))]
        outcomes = await asyncio.gather(
            *(engine.answer(classify(each)) for each in (b"a", b"", b"c")), return_exceptions=True
        )
        assert isinstance(outcomes[1], BrokenFileError)
        assert [isinstance(each, BaseException) for each in outcomes] == [False, True, False]
        explained = await engine.answer(explain(b"abc"))  # which is prepared as well
        assert explained.results[0].top_k.indices == [class_of(b"abc", (0, 0, 0))]
        await engine.check()
        assert [name.split("_")[0] for name in device.preparing] == ["prepare"]
        assert [name.split("_")[0] for name in device.computing] == ["device"]


async def test_one_image_that_cannot_be_decoded_fails_its_request_alone() -> None:
    async with started(Preparing()) as engine:
        both = msgspec.structs.replace(classify(b"a"), images=[Pixels(b"a"), Pixels(b"")])
        outcomes = await asyncio.gather(engine.answer(both), engine.answer(classify(b"b")), return_exceptions=True)
        assert isinstance(outcomes[0], BrokenFileError) and isinstance(outcomes[1], Answered)


async def test_a_stage_that_hangs_is_the_end_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "HANGS_AFTER_S", 0.05)
    device = Preparing()
    async with started(device) as engine:
        device.prepare_gate.clear()
        with pytest.raises(UnavailableError, match="hangs"):
            await engine.answer(classify())
        await engine.broken()


async def test_a_device_that_fails_to_prepare_shows_whether_it_still_works() -> None:
    device = Preparing()
    device.prepare_failure = RuntimeError("the decoder burns")
    async with started(device) as engine:
        with pytest.raises(EngineError, match="the decoder burns"):
            await engine.answer(classify())
        assert device.checks == 1


async def test_drift_computes_again_from_the_file() -> None:
    device = Preparing()
    async with started(device, drift_sample=1.0) as engine:
        await engine.answer(classify(b"file", (4, 4, 4)))
        await until(lambda: len(device.batches) == 2)
        assert [(key.schedule, [each.image.data for each in items]) for key, items in device.batches] == [
            ((4, 4, 4), [b"file"]),
            ((0, 0, 0), [b"file"]),
        ]
