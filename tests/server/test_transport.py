"""The local socket, with a real one: answers find their callers, errors keep their meaning, nobody is left hanging."""

from __future__ import annotations

import asyncio
import logging
import random
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server.curve import Curve
from server.dial import AutoR, RSetting
from server.errors import DeadlineError, EngineError, NotFoundError, QueueFullError, ServerError, UnavailableError
from server.ipc import transport
from server.ipc.frames import Frames
from server.ipc.transport import RemoteEngine, serve_engine
from server.types import Choice, Configuration, Explanation, Job, Merges, ModelInfo, Prediction, TopK
from tests.server.conftest import FakeDevice, class_of, fake_curve, groups_of, local_engine, model_info, until


class FakeEngine:
    """Answers from the pixels after a random number of turns; holds jobs while its gate is closed."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.running: set[bytes] = set()
        self.withdrawn: set[bytes] = set()
        self.random = random.Random(0)
        self.now = Configuration(7, {"tiny": 3})

    def catalog(self) -> dict[str, ModelInfo]:
        return {"tiny": model_info(), "large": model_info("large", labels=("é", "\u2603"), max_r=4)}

    async def classify(self, job: Job) -> Prediction:
        self.running.add(job.pixels)
        try:
            for _ in range(self.random.randrange(20)):
                await asyncio.sleep(0)
            await self.gate.wait()
        except asyncio.CancelledError:
            self.withdrawn.add(job.pixels)
            raise
        finally:
            self.running.remove(job.pixels)
        if self.failure is not None:
            raise self.failure
        schedule = job.r if isinstance(job.r, tuple) else (3, 3, 3)
        return Prediction(
            top_k=TopK([class_of(job.pixels, schedule)] * job.top_k, [0.5] * job.top_k),
            schedule=schedule,
            batch_size=1,
            config_version=7,
            queue_s=job.timeout_s,
            inference_s=0.25,
        )

    async def explain(self, job: Job) -> Explanation:
        prediction = await self.classify(job)
        return Explanation(prediction, Merges((4, 4), 2, groups_of(prediction.schedule)))

    async def choose(self, model: str, bounds: AutoR) -> Choice:
        return Choice((bounds.max_r or 0,) * 3, "load", bounds.min_agreement)

    async def curve(self, model: str) -> Curve:
        if model != "tiny":
            raise NotFoundError(f"{model} has no curve")
        return fake_curve()

    async def configuration(self) -> Configuration:
        return self.now

    async def configure(self, changes: Mapping[str, RSetting], expected_version: int | None) -> Configuration:
        self.now = Configuration(0 if expected_version is None else expected_version + 1, dict(changes))
        return self.now

    async def check(self) -> None:
        if self.failure is not None:
            raise self.failure


class Gone(asyncio.Transport):
    """As uvloop's transports are once their connection is gone."""

    def write(self, data: object) -> None:
        raise RuntimeError("unable to perform operation on a closed transport")


@pytest.fixture
def socket_path() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path may be longer than a socket's name can be
        yield str(Path(folder) / "s")


@asynccontextmanager
async def connected(engine: FakeEngine, path: str) -> AsyncIterator[RemoteEngine]:
    async with listening(engine, path):
        remote = RemoteEngine(path)
        remote.start()
        try:
            await until(lambda: bool(remote._catalog))
            yield remote
        finally:
            await remote.close()
            engine.gate.set()


@asynccontextmanager
async def listening(engine: FakeEngine, path: str) -> AsyncIterator[None]:
    """An engine on a socket; at the end it is gone with all its connections, as when its process dies."""
    server = await serve_engine(engine, path)
    try:
        yield
    finally:
        server.close()
        for connection in server._connections:
            connection.frames.close()
        await server.left(within_s=60)
        Path(path).unlink(missing_ok=True)


def job(pixels: bytes = b"abc", top_k: int = 1, timeout_s: float = 1000.0) -> Job:
    return Job("tiny", pixels, None, top_k, timeout_s)


async def test_the_catalog_crosses_whole_and_in_order(socket_path: str) -> None:
    async with connected(FakeEngine(), socket_path) as remote:
        assert remote.catalog() == FakeEngine().catalog()
        assert list(remote.catalog()) == ["tiny", "large"]


async def test_answers_find_their_callers_under_many_concurrent_calls(socket_path: str) -> None:
    async with connected(FakeEngine(), socket_path) as remote:
        pixels = [random.Random(seed).randbytes(16 + 997 * (seed % 7)) for seed in range(300)]
        schedules = [None if seed % 3 else (seed % 5, 2, 0) for seed in range(300)]
        jobs = [
            Job("tiny", each, schedule, 1 + seed % 4, 1000.0 + seed)
            for seed, (each, schedule) in enumerate(zip(pixels, schedules, strict=True))
        ]
        predictions = await asyncio.gather(*map(remote.classify, jobs))
        for sent, got in zip(jobs, predictions, strict=True):
            schedule = sent.r if isinstance(sent.r, tuple) else (3, 3, 3)
            assert got.top_k == TopK([class_of(sent.pixels, schedule)] * sent.top_k, [0.5] * sent.top_k)
            assert (got.schedule, got.queue_s) == (schedule, sent.timeout_s)


def test_a_frame_for_a_connection_that_is_gone_is_lost() -> None:
    lost: list[str] = []
    frames = Frames(lambda head, body: None, lambda: lost.append("lost"))
    frames.connection_made(Gone())
    with pytest.raises(RuntimeError):
        frames.send({"id": 1})
    frames.connection_lost(None)
    frames.send({"id": 2}, b"pixels")
    assert lost == ["lost"]


async def test_an_explanation_crosses_whole(socket_path: str) -> None:
    engine = FakeEngine()
    async with connected(engine, socket_path) as remote:
        assert await remote.explain(job()) == await engine.explain(job())


@pytest.mark.parametrize("r", [8, (4, 2), AutoR(max_r=16)])
async def test_the_configuration_crosses_both_ways(r: RSetting, socket_path: str) -> None:
    async with connected(FakeEngine(), socket_path) as remote:
        assert await remote.configuration() == Configuration(7, {"tiny": 3})
        changed = await remote.configure({"tiny": r, "large": 1}, 41)
        assert changed == Configuration(42, {"tiny": r, "large": 1}) == await remote.configuration()
        assert await remote.configure({"tiny": r}, None) == Configuration(0, {"tiny": r})


async def test_the_curve_crosses_whole(socket_path: str) -> None:
    async with connected(FakeEngine(), socket_path) as remote:
        assert await remote.curve("tiny") == fake_curve()
        with pytest.raises(NotFoundError, match="large has no curve"):
            await remote.curve("large")


@pytest.mark.parametrize("kind", ServerError.__subclasses__())
async def test_every_error_keeps_its_kind_its_words_and_its_facts(kind: type[ServerError], socket_path: str) -> None:
    engine = FakeEngine()
    engine.failure = kind("no, and here is why: é", retry_after_s=2.5, max_r=8, models=["tiny"])
    async with connected(engine, socket_path) as remote:
        with pytest.raises(kind) as failure:
            await remote.classify(job())
        assert type(failure.value) is kind
        assert failure.value.to_wire() == engine.failure.to_wire()
        assert (failure.value.code, failure.value.status) == (kind.code, kind.status)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_any_other_exception_of_the_engine_is_an_engine_error(socket_path: str) -> None:
    engine = FakeEngine()
    engine.failure = ZeroDivisionError("by zero")
    async with connected(engine, socket_path) as remote:
        with pytest.raises(EngineError, match="by zero"):
            await remote.classify(job())
        engine.failure = None
        assert (await remote.classify(job())).config_version == 7


async def test_a_check_that_fails_says_so(socket_path: str) -> None:
    engine = FakeEngine()
    async with connected(engine, socket_path) as remote:
        await remote.check()
        engine.failure = QueueFullError("full", retry_after_s=1)
        with pytest.raises(QueueFullError):
            await remote.check()


async def test_cancelling_a_call_withdraws_its_job_and_no_other(socket_path: str) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with connected(engine, socket_path) as remote:
        calls = {name: asyncio.create_task(remote.classify(job(name))) for name in (b"a", b"b", b"c")}
        await until(lambda: engine.running == {b"a", b"b", b"c"})
        calls[b"b"].cancel()
        await until(lambda: engine.running == {b"a", b"c"})
        assert engine.withdrawn == {b"b"}
        engine.gate.set()
        assert (await calls[b"c"]).top_k.indices == [class_of(b"c", (3, 3, 3))]
        assert (await calls[b"a"]).top_k.indices == [class_of(b"a", (3, 3, 3))]


async def test_an_engine_that_no_longer_keeps_deadlines_is_not_waited_for(
    socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with connected(engine, socket_path) as remote:
        with pytest.raises(DeadlineError):
            await remote.classify(job(timeout_s=-0.99))  # a second is added for the way
        engine.gate.set()
        assert (await remote.classify(job(b"next"))).top_k.indices == [class_of(b"next", (3, 3, 3))]


async def test_a_check_of_a_hanging_engine_is_unavailable(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()

    async def hang() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(engine, "check", hang)
    monkeypatch.setattr(transport.RemoteEngine._call, "__defaults__", (b"", 0.01))
    async with connected(engine, socket_path) as remote:
        with pytest.raises(UnavailableError):
            await remote.check()


async def test_before_the_engine_is_there_everything_is_unavailable(socket_path: str) -> None:
    remote = RemoteEngine(socket_path)
    remote.start()
    with pytest.raises(UnavailableError, match="loading") as refusal:
        remote.catalog()
    assert refusal.value.retry_after_s
    with pytest.raises(UnavailableError):
        await remote.classify(job())
    with pytest.raises(UnavailableError):
        await remote.check()
    await remote.close()


async def test_when_the_engine_dies_all_calls_in_flight_fail_and_a_restarted_one_serves(
    socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "RECONNECT_S", 0.001)
    remote = RemoteEngine(socket_path)
    remote.start()
    engine = FakeEngine()
    engine.gate.clear()
    async with listening(engine, socket_path):
        await until(lambda: bool(remote._catalog))
        calls = [asyncio.create_task(remote.classify(job(bytes([index])))) for index in range(20)]
        await until(lambda: len(engine.running) == 20)
    failures = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(failure) for failure in failures] == [UnavailableError] * 20
    with pytest.raises(UnavailableError):
        await remote.classify(job())
    async with listening(FakeEngine(), socket_path):
        await until(lambda: remote._frames is not None)
        assert (await remote.classify(job(b"again"))).top_k.indices == [class_of(b"again", (3, 3, 3))]
        await remote.close()


async def test_an_http_process_that_leaves_has_its_jobs_withdrawn_and_others_keep_theirs(socket_path: str) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with connected(engine, socket_path) as stays:
        leaves = RemoteEngine(socket_path)
        leaves.start()
        await until(lambda: bool(leaves._catalog))
        lost = [asyncio.create_task(leaves.classify(job(name))) for name in (b"x", b"y")]
        kept = asyncio.create_task(stays.classify(job(b"z")))
        await until(lambda: len(engine.running) == 3)
        await leaves.close()
        await until(lambda: engine.running == {b"z"})
        assert engine.withdrawn == {b"x", b"y"}
        assert [type(each) for each in await asyncio.gather(*lost, return_exceptions=True)] == [UnavailableError] * 2
        engine.gate.set()
        assert (await kept).top_k.indices == [class_of(b"z", (3, 3, 3))]


async def test_a_withdrawn_job_is_not_computed_by_a_real_engine(
    socket_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = FakeDevice()
    local = local_engine(device)
    local.start()
    server = await serve_engine(local, socket_path)
    remote = RemoteEngine(socket_path)
    remote.start()
    await until(lambda: bool(remote._catalog))
    device.gate.clear()
    running = asyncio.create_task(remote.classify(job(b"first")))
    await until(lambda: len(device.batches) == 1)
    gone, stays = (asyncio.create_task(remote.classify(job(name))) for name in (b"gone", b"stays"))
    await until(lambda: local._batcher.num_waiting == 2)
    gone.cancel()
    await until(lambda: local._batcher.num_waiting == 1)
    device.gate.set()
    assert (await stays).batch_size == 1 and (await running).batch_size == 1
    assert [each.pixels for _, batch in device.batches for each in batch] == [b"first", b"stays"]
    await remote.close()
    server.close()
    await local.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_server_that_takes_nobody_new_knows_when_the_last_http_process_has_left(socket_path: str) -> None:
    server = await serve_engine(FakeEngine(), socket_path)
    remote = RemoteEngine(socket_path)
    remote.start()
    await until(lambda: bool(remote._catalog))
    server.close()
    leaving = asyncio.create_task(server.left(within_s=1000))
    assert (await remote.classify(job(b"late"))).top_k.indices == [class_of(b"late", (3, 3, 3))]
    assert not leaving.done()
    await remote.close()
    await leaving
    await server.left(within_s=1000)


async def test_a_jpeg_crosses_as_it_came_and_a_catalog_says_whether_it_may(socket_path: str) -> None:
    got: list[Job] = []

    class Decoding(FakeEngine):
        def catalog(self) -> dict[str, ModelInfo]:
            return {"tiny": model_info(decodes_jpeg=True)}

        async def classify(self, job: Job) -> Prediction:
            got.append(job)
            return await super().classify(job)

    async with connected(Decoding(), socket_path) as remote:
        assert remote.catalog()["tiny"].decodes_jpeg
        sent = Job("tiny", random.Random(1).randbytes(300_000), (1, 2, 3), 1, 1000.0, jpeg_pixels=1200)
        await remote.classify(sent)
        assert got == [sent]
