"""The engine in this process: deployment `r`, keys, health checks, over a fake device."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from server.batching import engine as engine_module
from server.batching.engine import LocalEngine
from server.dial import Schedule
from server.errors import ConflictError, EngineError, InvalidError, NotFoundError, QueueFullError, UnavailableError
from server.types import Configuration, Job
from tests.server.conftest import FakeDevice, class_of, local_engine, model_info, until


def job(pixels: bytes = b"abc", schedule: Schedule | None = None, *, model: str = "tiny", top_k: int = 1) -> Job:
    return Job(model, pixels, schedule, top_k, timeout_s=1000.0)


@asynccontextmanager
async def started(device: FakeDevice, **options: Any) -> AsyncIterator[LocalEngine]:
    engine = local_engine(device, **options)
    engine.start()
    try:
        yield engine
    finally:
        device.gate.set()
        await engine.close()


async def test_a_job_that_names_no_r_takes_the_deployments() -> None:
    async with started(FakeDevice(), r=(4, 2)) as engine:
        prediction = await engine.classify(job())
        assert prediction.schedule == (4, 2, 0)
        assert prediction.top_k.indices == [class_of(b"abc", (4, 2, 0))]


@pytest.mark.parametrize("schedule", [(0, 0, 0), (8, 8, 8), (1, 2, 3)])
async def test_a_jobs_own_r_is_honoured(schedule: Schedule) -> None:
    async with started(FakeDevice(), r=5) as engine:
        prediction = await engine.classify(job(schedule=schedule))
        assert prediction.schedule == schedule
        assert prediction.top_k.indices == [class_of(b"abc", schedule)]


async def test_schedules_models_and_sizes_never_share_a_batch() -> None:
    device = FakeDevice()
    async with started(device, models=[model_info(), model_info("large")], r=5) as engine:
        asked = [("tiny", None), ("tiny", (5, 5, 5)), ("tiny", (5, 5, 4)), ("large", None)] * 3
        jobs = [job(bytes([index]), schedule, model=model) for index, (model, schedule) in enumerate(asked)]
        predictions = await asyncio.gather(*map(engine.classify, jobs))
        for sent, prediction in zip(jobs, predictions, strict=True):
            assert prediction.top_k.indices == [class_of(sent.pixels, prediction.schedule)] and prediction.schedule == (
                sent.r or (5, 5, 5)
            )
        for key, batch in device.batches:
            assert {(each.model, each.r or (5, 5, 5)) for each in batch} == {(key.model, key.schedule)}
            assert key.input_size == (8, 8)
        # What the deployment says and what a request says alike may share a batch.
        assert any(len({each.r for each in batch}) == 2 for _, batch in device.batches)


async def test_the_batch_size_and_the_times_are_those_of_the_batch() -> None:
    async with started(FakeDevice()) as engine:
        predictions = await asyncio.gather(*(engine.classify(job()) for _ in range(3)))
        assert [prediction.batch_size for prediction in predictions] == [3, 3, 3]
        assert len({prediction.inference_s for prediction in predictions}) == 1
        assert all(prediction.queue_s >= 0 for prediction in predictions)


async def test_a_changed_r_counts_from_the_next_job_on_and_waiting_jobs_keep_theirs() -> None:
    device = FakeDevice()
    async with started(device) as engine:
        device.gate.clear()
        before = asyncio.create_task(engine.classify(job()))
        await until(lambda: len(device.batches) == 1)
        changed = await engine.configure({"tiny": 8}, None)
        after = asyncio.create_task(engine.classify(job()))
        device.gate.set()
        assert ((await before).schedule, (await after).schedule) == ((0, 0, 0), (8, 8, 8))
        assert (await after).config_version == changed.version == (await before).config_version + 1
        assert await engine.configuration() == changed
        assert REGISTRY.get_sample_value("tome_config_version") == changed.version


async def test_a_changed_r_survives_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    async with started(FakeDevice(), state_file=file) as engine:
        changed = await engine.configure({"tiny": (8, 1)}, None)
    async with started(FakeDevice(), state_file=file) as engine:
        assert await engine.configuration() == changed
        assert (await engine.classify(job())).schedule == (8, 1, 0)


async def test_an_r_out_of_range_changes_nothing() -> None:
    async with started(FakeDevice()) as engine:
        with pytest.raises(InvalidError, match="between 0 and 8"):
            await engine.configure({"tiny": 9}, None)
        assert (await engine.configuration()).models["tiny"] == 0


async def test_a_stale_version_is_a_conflict() -> None:
    async with started(FakeDevice()) as engine:
        version = (await engine.configuration()).version
        assert await engine.configure({"tiny": 1}, version) == Configuration(version + 1, {"tiny": 1})
        with pytest.raises(ConflictError):
            await engine.configure({"tiny": 2}, version)


async def test_an_unknown_model_is_not_found_and_the_known_ones_are_named() -> None:
    async with started(FakeDevice()) as engine:
        with pytest.raises(NotFoundError, match="tiny"):
            await engine.classify(job(model="huge"))
        with pytest.raises(NotFoundError, match="tiny"):
            await engine.configure({"huge": 1}, None)


def test_a_deployment_r_out_of_range_stops_the_start() -> None:
    with pytest.raises(InvalidError, match="between 0 and 8"):
        local_engine(FakeDevice(), r=9)


async def test_the_check_goes_through_the_batch_loop_and_passes_a_full_queue() -> None:
    device = FakeDevice()
    async with started(device, max_queue_size=1, max_batch_size=1) as engine:
        device.gate.clear()
        running = asyncio.create_task(engine.classify(job()))
        await until(lambda: len(device.batches) == 1)
        waiting = asyncio.create_task(engine.classify(job()))
        checking = asyncio.create_task(engine.check())
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await engine.classify(job())
        assert not checking.done()
        device.gate.set()
        await asyncio.gather(running, waiting, checking)
        assert len(device.batches) == 2  # a check is no batch of the model's


async def test_a_check_of_an_engine_that_hangs_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CHECK_TIMEOUT_S", 0.01)
    device = FakeDevice()
    async with started(device) as engine:
        device.gate.clear()
        running = asyncio.create_task(engine.classify(job()))
        await until(lambda: len(device.batches) == 1)
        with pytest.raises(UnavailableError, match="does not answer"):
            await engine.check()
        device.gate.set()
        await running
        await engine.check()


async def test_a_closed_engine_is_unavailable_and_has_answered_what_waited() -> None:
    device = FakeDevice()
    async with started(device) as engine:
        device.gate.clear()
        waiting = asyncio.create_task(engine.classify(job()))
        await until(lambda: len(device.batches) == 1)
        device.gate.set()
        await engine.close()
        assert waiting.result().top_k.indices == [class_of(b"abc", (0, 0, 0))]
        with pytest.raises(UnavailableError):
            await engine.classify(job())
        with pytest.raises(UnavailableError):
            await engine.check()


async def test_a_failed_batch_on_a_working_device_is_not_the_end() -> None:
    device = FakeDevice(failure=ValueError("this batch alone"))
    async with started(device) as engine:
        broken = asyncio.create_task(engine.broken())
        with pytest.raises(EngineError):
            await engine.classify(job())
        device.failure = None
        assert (await engine.classify(job())).top_k.indices == [class_of(b"abc", (0, 0, 0))]
        assert not broken.done()
        broken.cancel()


async def test_an_engine_whose_device_works_no_more_is_not_ready_and_says_that_it_is_broken() -> None:
    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    async with started(FakeDevice(failure=RuntimeError("illegal")), check_device=fail) as engine:
        with pytest.raises(UnavailableError):
            await engine.classify(job())
        await engine.broken()
        with pytest.raises(UnavailableError, match="works no more"):
            await engine.check()


async def test_an_engine_whose_device_hangs_says_that_it_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "HANGS_AFTER_S", 0.05)
    device = FakeDevice()
    async with started(device) as engine:
        device.gate.clear()
        with pytest.raises(UnavailableError, match="hangs"):
            await engine.classify(job())
        await engine.broken()


async def test_a_batch_that_failed_is_logged_in_full_for_the_culprit_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with started(FakeDevice(failure=ValueError("this image"))) as engine:
        await asyncio.gather(*(engine.classify(job()) for _ in range(4)), return_exceptions=True)
    logged = [record for record in caplog.records if "this image" in record.getMessage()]
    assert [bool(record.exc_info) for record in logged] == ["batch of 1 " in record.getMessage() for record in logged]
    assert any(record.exc_info for record in logged)
