"""Drift: sampled images are computed again at r=0 while the device is idle, and the curve is held to them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from server.batching.batcher import Batcher
from server.batching.drift import FEWEST, KEPT, WINDOW, DriftWatch, LiveAgreement, Z
from server.batching.jobs import Batched
from server.calibration.simulator import _in_virtual_time
from server.curve import Curve
from server.dial import Schedule
from server.errors import SettingsError
from server.images.image import JpegFile, Pixels
from server.intervals import wilson
from server.ipc.messages import Classify, Item, TopK, Vector
from server.settings import Settings
from server.settings_sources import load_settings
from server.types import BatchKey, ModelInfo
from tests.server.conftest import FakeDevice, classify, curve_row, explain, fake_curve, local_engine, model_info, until

NAMES = itertools.count()


def fresh() -> ModelInfo:
    """A model whose metrics no other test has touched."""
    return model_info(f"drift-{next(NAMES)}")


def metric(name: str, model: str, r: str = "4") -> float | None:
    return REGISTRY.get_sample_value(name, {"model": model, "r": r})


class Device:
    """Answers 1 to everything at r=0, until it fails; notes every image that it computes."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.computed: list[tuple[BatchKey, Item]] = []

    async def run_batch(self, key: BatchKey, items: Sequence[Item]) -> list[TopK]:
        self.computed += [(key, each) for each in items]
        if self.failure is not None:
            raise self.failure
        return [TopK([1], [0.5])] * len(items)

    @property
    def images(self) -> list[int]:
        """The numbers of the images that it computed."""
        return [each.image.data[0] for _, each in self.computed]


class Bench:
    """A watch that samples every image, and the answers that it is told of."""

    def __init__(self, curve: Curve | None = None, info: ModelInfo | None = None, share: float = 1.0) -> None:
        self.info, self.device = info or fresh(), Device()
        self.model = self.info.name
        curves: Mapping[str, Curve] = {self.model: curve} if curve else {}
        self.watch = DriftWatch(self.device.run_batch, curves, share, random=Random(0).random)

    def offer(self, agrees: Iterable[bool], schedule: Schedule = (4, 4, 4)) -> None:
        """Tells of answers that agree with r=0, or do not."""
        for number, each in enumerate(agrees):
            answer = TopK([1 if each else 2, 3], [0.5, 0.1])
            self.watch.offer(self.info.batch_key(schedule), [Pixels(bytes([number % 256]))], [answer])

    async def check(self, agrees: Iterable[bool], schedule: Schedule = (4, 4, 4)) -> None:
        """Tells of answers, with enough idle time after each to check it."""
        for each in agrees:
            self.offer([each], schedule)
            await self.idle()

    async def idle(self) -> None:
        """Idle time until nothing waits for a check."""
        arrived = asyncio.Event()
        idling = asyncio.create_task(self.watch.idle(arrived))
        await until(lambda: self.watch.num_waiting == 0)
        arrived.set()
        await idling


# What is drift.


def curve_of(agreement: float, low: float, high: float) -> Curve:
    row = curve_row(4, agreement, (0.0, 0.5)).model_copy(update={"agreement_interval": (low, high)})
    return fake_curve(rows=(curve_row(0, 1.0, (0.0, 1.0)), row))


ROW = curve_of(0.95, 0.93, 0.96).rows[1]


@given(st.lists(st.booleans(), max_size=2 * FEWEST))
def test_drift_begins_where_the_intervals_part_and_ends_where_the_curves_agreement_is_held(checks: list[bool]) -> None:
    live, drifts = LiveAgreement(ROW), False
    for count, agreed in enumerate(checks, start=1):
        changed = live.add(agreed)
        low, high = wilson(sum(checks[:count]), count, Z)
        if count < FEWEST:
            expected = False
        elif drifts:
            expected = not low <= 0.95 <= high
        else:
            expected = high < 0.93 or low > 0.96
        assert live.drifts == expected and changed == (expected != drifts)
        assert live.share == sum(checks[:count]) / count
        drifts = expected


def test_only_the_last_checks_count() -> None:
    live = LiveAgreement()
    for agreed in [False] * WINDOW + [True] * (WINDOW - 1):
        live.add(agreed)
    assert live.share == (WINDOW - 1) / WINDOW
    live.add(True)
    assert live.share == 1.0


@pytest.mark.parametrize("agreement", [0.868, 0.948])
def test_traffic_like_the_photos_of_the_curve_is_not_called_drift_and_other_traffic_is(agreement: float) -> None:
    low, high = wilson(round(agreement * 1000), 1000)
    live = LiveAgreement(curve_of(agreement, low, high).rows[1])
    random = Random(0).random
    assert not any(live.add(random() < agreement) for _ in range(20_000))
    changes = [live.add(random() < agreement - 0.15) for _ in range(WINDOW)]
    assert live.drifts and sum(changes) == 1


def test_agreement_above_the_curves_is_drift_too() -> None:
    live = LiveAgreement(curve_of(0.6, 0.55, 0.65).rows[1])
    assert sum(live.add(True) for _ in range(WINDOW)) == 1 and live.drifts


async def test_a_model_that_is_unloaded_drifts_no_more() -> None:
    bench = Bench(curve_of(0.95, 0.93, 0.96))
    await bench.check([False] * FEWEST)
    assert metric("tome_drift", bench.model) == 1
    bench.watch.forget(bench.model)
    assert metric("tome_drift", bench.model) == 0


# What is sampled, and kept.


async def test_a_share_of_the_images_above_r_0_is_sampled() -> None:
    draws = iter([0.049, 0.05, 0.0, 0.999, 0.03])
    bench = Bench()
    bench.watch = DriftWatch(bench.device.run_batch, {}, 0.05, random=lambda: next(draws))
    bench.offer([True] * 10, (0, 0, 0))  # nothing to be learned of these
    assert bench.watch.num_waiting == 0
    bench.offer([True] * 5, (0, 0, 1))
    await bench.idle()
    assert bench.device.images == [0, 2, 4]


async def test_each_image_of_a_request_is_sampled_by_itself_and_held_to_its_own_answer() -> None:
    draws = iter([0.5, 0.01, 0.5, 0.01, 0.01])
    bench = Bench()
    bench.watch = DriftWatch(bench.device.run_batch, {}, 0.05, random=lambda: next(draws))
    images = [JpegFile(bytes([number]), 8, 8) for number in range(5)]
    answers = [TopK([index, 7], [0.5, 0.1]) for index in (1, 1, 1, 2, 1)]
    bench.watch.offer(bench.info.batch_key((4, 4, 4)), images, answers)
    await bench.idle()
    assert [each.image for _, each in bench.device.computed] == [images[1], images[3], images[4]]
    assert all(each.request.model == bench.model and len(each.request.images) == 1 for _, each in bench.device.computed)
    assert metric("tome_drift_checked_total", bench.model) == 3
    assert metric("tome_drift_agreed_total", bench.model) == 2  # not the one that was answered with 2


async def test_few_samples_are_kept_and_they_are_the_newest() -> None:
    bench = Bench()
    bench.offer([True] * 100)
    assert bench.watch.num_waiting == KEPT
    await bench.idle()
    assert bench.device.images == list(range(100 - KEPT, 100))
    asked = [(key.schedule, each.request) for key, each in bench.device.computed]
    assert {(schedule, one.top_k) for schedule, one in asked if isinstance(one, Classify)} == {((0, 0, 0), 1)}


async def test_a_share_of_0_samples_and_computes_nothing() -> None:
    bench = Bench(share=0.0)
    bench.offer([True] * 1000)
    assert bench.watch.num_waiting == 0
    await bench.idle()
    assert bench.device.computed == []


# Metrics and the log.


async def test_checks_are_counted_by_model_and_r_and_lists_share_a_label() -> None:
    bench = Bench()
    await bench.check([True, False, True, True])
    await bench.check([False], (8, 4, 0))
    await bench.check([True], (8, 0, 0))
    assert metric("tome_drift_checked_total", bench.model) == 4
    assert metric("tome_drift_agreed_total", bench.model) == 3
    assert metric("tome_live_agreement", bench.model) == 0.75
    assert metric("tome_drift_checked_total", bench.model, "schedule") == 2
    assert metric("tome_live_agreement", bench.model, "schedule") == 0.5
    assert metric("tome_drift", bench.model) is None  # there is no curve to leave


async def test_a_warning_comes_once_when_the_curve_is_left_and_once_when_it_is_met_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(curve_of(0.95, 0.93, 0.96))
    agreeing = ([True] * 19 + [False]) * (WINDOW // 20)
    await bench.check(agreeing)
    assert metric("tome_drift", bench.model) == 0 and not caplog.records
    await bench.check([False] * WINDOW)
    (left,) = caplog.messages
    assert f"{bench.model} at r=4 has left its curve" in left and "0.930 to 0.960" in left
    assert metric("tome_drift", bench.model) == 1
    await bench.check(agreeing)
    _, back = caplog.messages
    assert f"{bench.model} at r=4 is back on its curve" in back
    assert metric("tome_drift", bench.model) == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


@pytest.mark.parametrize("schedule", [(5, 5, 5), (8, 4, 0)])
async def test_an_r_that_the_curve_does_not_tell_is_never_drift(
    schedule: Schedule, caplog: pytest.LogCaptureFixture
) -> None:
    # Lists share a label, and so none is held to the row of one of them.
    bench = Bench(fake_curve(rows=(*fake_curve().rows, curve_row(1, 1.0, None).model_copy(update={"r": (8, 4, 0)}))))
    await bench.check([False] * 2 * FEWEST, schedule)
    label = "5" if schedule == (5, 5, 5) else "schedule"
    assert metric("tome_live_agreement", bench.model, label) == 0.0
    assert metric("tome_drift", bench.model, label) is None and not caplog.records


async def test_a_failed_check_is_logged_and_counts_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.device.failure = RuntimeError("no memory left")
    await bench.check([True])
    assert "could not be checked" in caplog.text and "no memory left" in caplog.text
    bench.device.failure = None
    await bench.check([True])
    assert metric("tome_drift_checked_total", bench.model) == 1


# Beside the batcher: in virtual time, in which a batch and a check take a second each.


class Load:
    """Images at r=4 that arrive at given times; every one of them is sampled."""

    def __init__(self, arrivals: Sequence[float], share: float = 1.0) -> None:
        self.arrivals, self.share, self.info = arrivals, share, fresh()
        self.checks: list[float] = []
        self.running = 0
        self.dropped: list[str] = []
        self.ran: list[Schedule] = []

    async def serve(self) -> list[Batched[BatchKey, TopK]]:
        loop = asyncio.get_running_loop()
        watch = DriftWatch(self.run_batch, {}, self.share, random=Random(0).random, clock=loop.time)

        self.batcher = Batcher[BatchKey, Item, TopK](
            self.run_batch,
            max_batch_size=1000,
            max_queue_size=1000,
            batch_timeout_s=0.1,
            observer=self,
            idle=watch.idle,
            clock=loop.time,
        )
        self.batcher.start()

        async def request(at: float) -> Batched[BatchKey, TopK]:
            await asyncio.sleep(at - loop.time())
            asked = classify(bytes(str(at), "ascii"), model=self.info.name)

            def finish(batched: Batched[BatchKey, TopK]) -> Batched[BatchKey, TopK]:
                watch.offer(batched.key, asked.images, batched.results)
                return batched

            answer = await self.batcher.submit(self.info.batch_key((4, 4, 4)), [Item(asked, 0)], 1e6, finish)
            assert answer.results == [self.answer(asked.images[0].data)]
            return answer

        answers = await asyncio.gather(*map(request, self.arrivals))
        await asyncio.sleep(100)  # all the idle time that there could be use for
        await self.batcher.close()
        return answers

    async def run_batch(self, key: BatchKey, items: Sequence[Item]) -> Sequence[TopK]:
        if max(key.schedule) == 0:
            assert self.batcher.num_waiting == 0, "a check while others wait"
            assert len(items) == 1
            self.checks.append(asyncio.get_running_loop().time())
        self.running += 1
        assert self.running == 1, "a check beside a batch"
        before = self.batcher.load()
        await asyncio.sleep(1)
        after = self.batcher.load()
        assert after.left_s or after.arrivals_per_s < before.arrivals_per_s, "a check among the arrivals"
        self.running -= 1
        return [self.answer(each.image.data) for each in items]

    @staticmethod
    def answer(pixels: bytes) -> TopK:
        return TopK([sum(pixels)], [0.5])

    def batch_ran(self, key: BatchKey, waits_s: Sequence[float], run_s: float) -> None:
        self.ran.append(key.schedule)

    def job_dropped(self, reason: str) -> None:
        self.dropped.append(reason)


@settings(max_examples=50)
@given(st.lists(st.floats(0, 3), min_size=1, max_size=30))
def test_no_image_waits_for_more_than_one_check_and_none_is_checked_while_others_wait(gaps: list[float]) -> None:
    arrivals = list(itertools.accumulate(gaps))
    load = Load(arrivals)
    answers = _in_virtual_time(load.serve())
    # As without checks: what comes waits for what runs, a batch or a check, and for nothing else.
    assert all(answer.wait_s <= 1 + 1e-6 for answer in answers)
    assert min(len(arrivals), KEPT) <= len(load.checks) <= len(arrivals)
    assert metric("tome_drift_agreed_total", load.info.name) == len(load.checks)
    # Nothing of it is seen where production is watched.
    assert load.dropped == [] and set(load.ran) == {(4, 4, 4)}
    assert load.batcher.speed.line(load.info.batch_key((0, 0, 0))) is None


def test_a_client_that_asks_again_as_soon_as_it_is_answered_is_delayed_once() -> None:
    # The first check tells how long one takes; from then on the device must have been quiet for as long, or for 0.1 s.
    arrivals = [1.05 * turn for turn in range(40)]
    load = Load(arrivals)
    _in_virtual_time(load.serve())
    last = arrivals[-1]
    assert [at < last for at in load.checks] == [True] + [False] * KEPT
    assert math.isclose(load.checks[0], 1.0)


def test_checks_that_take_long_still_find_their_time_between_requests() -> None:
    # After the first check, which took a second, the device is never quiet for that long, but often for 0.1 s.
    arrivals = [1.5 * turn for turn in range(40)]
    load = Load(arrivals)
    _in_virtual_time(load.serve())
    assert sum(at < arrivals[-1] for at in load.checks) > 10


def test_off_means_that_nothing_is_checked() -> None:
    load = Load([0.0, 1.0, 5.0, 5.5], share=0.0)
    answers = _in_virtual_time(load.serve())
    assert len(answers) == 4 and load.checks == []
    assert metric("tome_drift_checked_total", load.info.name) is None


# In the engine.


async def answered(
    device: FakeDevice, info: ModelInfo, schedules: Sequence[Schedule], *, ask: Any = classify, **options: Any
) -> list[Any]:
    """The engine's results for one image after the other; returns when all that was sampled has been checked."""
    engine = local_engine(device, [info], **options)
    engine.start()
    try:
        requests = [ask(bytes([number]), r, model=info.name) for number, r in enumerate(schedules)]
        results = [(await engine.answer(each)).results for each in requests]
        await until(lambda: engine._drift.num_waiting == 0)
    finally:
        await engine.close()
    return [result for (result,) in results]


async def test_the_engine_checks_what_it_answered_above_r_0() -> None:
    device, info = FakeDevice(), fresh()
    await answered(device, info, [(0, 0, 0), (4, 4, 4), (8, 4, 0)], drift_sample=1.0)
    again = [batch for key, batch in device.batches if max(key.schedule) == 0][1:]
    assert [each.image.data for (each,) in again] == [b"\x01", b"\x02"]
    for label in ("4", "schedule"):  # the fake device's classes all differ from those of r=0
        assert metric("tome_drift_checked_total", info.name, label) == 1
        assert metric("tome_live_agreement", info.name, label) == 0
    assert metric("tome_inference_duration_seconds_count", info.name, "0") == 1  # production's alone
    assert metric("tome_batch_size_count", info.name, "0") == 1


async def test_what_is_explained_is_not_checked() -> None:
    device, info = FakeDevice(), fresh()
    await answered(device, info, [(4, 4, 4)] * 3, ask=explain, drift_sample=1.0)
    assert [key.operation for key, _ in device.batches] == ["explain"] * 3


async def test_the_engine_of_a_test_or_a_library_checks_nothing_unless_told_to() -> None:
    device, info = FakeDevice(), fresh()
    await answered(device, info, [(4, 4, 4)] * 3)
    assert [key.schedule for key, _ in device.batches] == [(4, 4, 4)] * 3


async def test_an_error_of_a_check_reaches_no_client(caplog: pytest.LogCaptureFixture) -> None:
    class FailsAtR0(FakeDevice):
        def answer(self, key: BatchKey, item: Item) -> TopK | Vector:
            if max(key.schedule) == 0:
                raise RuntimeError("no r=0 today")
            return super().answer(key, item)

    info = fresh()
    answers = await answered(FailsAtR0(), info, [(4, 4, 4)] * 5, drift_sample=1.0)
    assert len(answers) == 5
    assert "no r=0 today" in caplog.text and "could not be checked" in caplog.text
    assert metric("tome_drift_checked_total", info.name) is None


def test_the_setting_is_a_share() -> None:
    assert Settings.model_validate({}).drift_sample == 0.01
    assert load_settings({"drift_sample": "0"}).drift_sample == 0.0
    with pytest.raises(SettingsError, match="drift_sample"):
        load_settings({"drift_sample": "1.5"})
