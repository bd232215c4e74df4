"""The local socket, with a real one: answers find their callers, errors keep their meaning, nobody is left hanging."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any, cast

import pytest
import uvloop

from server.curve import Curve
from server.dial import AutoR, RSetting, Schedule
from server.errors import DeadlineError, EngineError, NotFoundError, QueueFullError, ServerError, UnavailableError
from server.images.image import Image, JpegFile, Pixels
from server.ipc import client, frames
from server.ipc.client import GRACE_S, LostEngineError, RemoteEngine
from server.ipc.devices import Devices
from server.ipc.door import Door
from server.ipc.messages import Answered, Choice, Classify, Explain, Merges, Request, TopK
from server.ipc.server import EngineServer
from server.types import Compiling, ComputedBy, Configuration, ModelInfo, ModelState
from tests.server.conftest import (
    FakeDevice,
    assert_is_error,
    class_of,
    classify,
    explain,
    fake_curve,
    grey_png,
    groups_of,
    local_engine,
    model_info,
    serving,
    until,
)


class FakeEngine:
    """Answers from the images after a random number of turns; holds requests while its gate is closed.

    Attributes:
        asked: Every request that it got.
        running: The first image of each that it has not answered.
        withdrawn: That of each that was withdrawn.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.refusal: Exception | None = None
        self.asked: list[Request[Any]] = []
        self.running: set[bytes] = set()
        self.withdrawn: set[bytes] = set()
        self.random = random.Random(0)
        self.now = Configuration(7, {"tiny": 3})
        self.models = {"tiny": model_info(), "large": model_info("large", labels=("é", "\u2603"), max_r=4)}
        self.auto: Choice | None = None

    def catalog(self) -> dict[str, ModelInfo]:
        return self.models

    def answer(self, request: Request[Any]) -> asyncio.Future[Answered[Any]]:
        self.asked.append(request)
        if self.refusal is not None:
            raise self.refusal  # at once, as an engine refuses whose queue is full
        return asyncio.ensure_future(self._answer(request))

    async def _answer(self, request: Request[Any]) -> Answered[Any]:
        name = request.images[0].data
        self.running.add(name)
        try:
            for _ in range(self.random.randrange(20)):
                await asyncio.sleep(0)
            await self.gate.wait()
        except asyncio.CancelledError:
            self.withdrawn.add(name)
            raise
        finally:
            self.running.remove(name)
        if self.failure is not None:
            raise self.failure
        assert isinstance(request, Classify | Explain)
        schedule = request.r if isinstance(request.r, tuple) else (3, 3, 3)
        results: list[Any] = [top_k_of(image, schedule, request.top_k) for image in request.images]
        if isinstance(request, Explain):
            results = [Merges(top_k, (4, 4), 2, groups_of(schedule)) for top_k in results]
        return Answered(
            results, schedule, 7, len(results), request.deadline, 0.25, ComputedBy("openvino", "bf16"), self.auto
        )

    async def curve(self, model: str) -> Curve:
        if model != "tiny":
            raise NotFoundError(f"{model} has no curve")
        return fake_curve()

    async def compiling(self, model: str) -> Compiling | None:
        return Compiling((8, 8, 8), 3, 9) if model == "tiny" else None

    async def configuration(self) -> Configuration:
        return self.now

    async def configure(self, changes: Mapping[str, RSetting], expected_version: int | None) -> Configuration:
        self.now = Configuration(0 if expected_version is None else expected_version + 1, dict(changes))
        return self.now

    async def load(self, name: str, version: str | None = None) -> None:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.models = self.models | {name: model_info(name, version=version or "1")}

    async def unload(self, name: str) -> None:
        self.models = {other: info for other, info in self.models.items() if other != name}

    async def repository(self) -> list[ModelState]:
        return [ModelState(name, info.version, "READY") for name, info in self.models.items()]

    async def check(self) -> None:
        if self.failure is not None:
            raise self.failure


def top_k_of(image: Image, schedule: Schedule, top_k: int) -> TopK:
    return TopK([class_of(image.data, schedule)] * top_k, [0.5] * top_k)


async def first(answering: Coroutine[Any, Any, Answered[TopK]]) -> int:
    """The class of a request's only image."""
    (result,) = (await answering).results
    return result.indices[0]


@pytest.fixture
def door() -> Iterator[Door]:
    with closing(Door()) as door:
        yield door


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has lost an engine connects again at once."""
    monkeypatch.setattr(client, "RECONNECT_S", 0.001)


@asynccontextmanager
async def connected(engine: FakeEngine, door: Door) -> AsyncIterator[RemoteEngine]:
    async with listening(engine, door):
        remote = RemoteEngine(door)
        remote.start()
        try:
            await until(lambda: remote.is_up)
            yield remote
        finally:
            await remote.close()
            engine.gate.set()


@asynccontextmanager
async def listening(engine: FakeEngine, door: Door) -> AsyncIterator[EngineServer]:
    """An engine on a socket; at the end it is gone with all its connections, as when its process dies."""
    server = EngineServer(engine, door)
    try:
        yield server
    finally:
        server.close()
        for connection in server._connections:
            connection.frames.close()
        await server.left(within_s=60)


async def test_an_engine_that_does_not_read_is_asked_no_more_until_it_does(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(FakeEngine(), door) as remote:
        monkeypatch.setattr(client, "MOST_UNSENT", 1000)
        first = asyncio.create_task(remote.answer(classify(bytes(5000))))
        await asyncio.sleep(0)  # it stands in the buffer, for the loop has not turned since
        with pytest.raises(UnavailableError, match="does not read"):
            await remote.answer(classify())
        assert (await first).results and (await remote.answer(classify())).results


async def test_the_catalog_crosses_whole_and_in_order(door: Door) -> None:
    async with connected(FakeEngine(), door) as remote:
        assert remote.catalog() == FakeEngine().catalog()
        assert list(remote.catalog()) == ["tiny", "large"]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_answers_find_their_callers_under_many_concurrent_calls(
    run: Callable[[Coroutine[Any, Any, None]], None], door: Door
) -> None:
    """On the event loop of tests, and on that of the processes; some are larger than a socket holds."""

    async def ask() -> None:
        async with connected(FakeEngine(), door) as remote:
            data = [random.Random(seed).randbytes(16 + 9_973 * (seed % 71)) for seed in range(300)]
            schedules = [None if seed % 3 else (seed % 5, 2, 0) for seed in range(300)]
            asked = [
                classify(each, schedule, top_k=1 + seed % 4, in_s=1000.0 + seed)
                for seed, (each, schedule) in enumerate(zip(data, schedules, strict=True))
            ]
            answers = await asyncio.gather(*map(remote.answer, asked))
            for sent, got in zip(asked, answers, strict=True):
                schedule = sent.r if isinstance(sent.r, tuple) else (3, 3, 3)
                assert got.results == [top_k_of(sent.images[0], schedule, sent.top_k)]
                assert (got.schedule, got.queue_s) == (schedule, sent.deadline)
            assert remote.num_calls == 0

    run(ask())


async def test_a_request_arrives_as_it_was_and_its_answer_too(door: Door) -> None:
    engine = FakeEngine()
    images: list[Image] = [Pixels(b"one"), JpegFile(random.Random(1).randbytes(300_000), 40, 30), Pixels(b"three")]
    asked: list[Request[Any]] = [
        kind(model="tiny", images=images, r=r, deadline=time.monotonic() + 1e3, top_k=2)
        for kind in (Classify, Explain)
        for r in (None, (1, 2, 3), AutoR(), AutoR(8, 0.9))
    ]
    async with connected(engine, door) as remote:
        for engine.auto in (None, Choice((3, 3, 3), "load", 0.97), Choice((0, 0, 0), "idle", None)):
            for request in asked:
                answered = await remote.answer(request)
                assert engine.asked[-1] == request
                assert answered == await engine.answer(request)
                assert answered.auto == engine.auto and len(answered.results) == 3


@pytest.mark.parametrize("r", [8, (4, 2), AutoR(max_r=16), AutoR(None, 0.95)])
async def test_the_configuration_crosses_both_ways(r: RSetting, door: Door) -> None:
    async with connected(FakeEngine(), door) as remote:
        assert await remote.configuration() == Configuration(7, {"tiny": 3})
        changed = await remote.configure({"tiny": r, "large": 1}, 41)
        assert changed == Configuration(42, {"tiny": r, "large": 1}) == await remote.configuration()
        assert await remote.configure({"tiny": r}, None) == Configuration(0, {"tiny": r})


async def test_what_is_compiled_crosses_whole(door: Door) -> None:
    async with connected(FakeEngine(), door) as remote:
        assert await remote.compiling("tiny") == Compiling((8, 8, 8), 3, 9)
        assert await remote.compiling("large") is None


async def test_the_curve_crosses_whole(door: Door) -> None:
    async with connected(FakeEngine(), door) as remote:
        assert await remote.curve("tiny") == fake_curve()
        with pytest.raises(NotFoundError, match="large has no curve"):
            await remote.curve("large")


@pytest.mark.parametrize("kind", ServerError.__subclasses__())
@pytest.mark.parametrize("at_once", [False, True], ids=["later", "at once"])
async def test_every_error_keeps_its_kind_its_words_and_its_facts(
    kind: type[ServerError], at_once: bool, door: Door
) -> None:
    engine = FakeEngine()
    failure = kind("no, and here is why: é", retry_after_s=2.5, max_r=8, models=["tiny"])
    engine.failure, engine.refusal = (None, failure) if at_once else (failure, None)
    async with connected(engine, door) as remote:
        with pytest.raises(kind) as raised:
            await remote.answer(classify())
        got = raised.value
        assert type(got) is kind
        assert (got.message, got.retry_after_s, got.details) == (failure.message, 2.5, failure.details)
        assert (got.code, got.status) == (kind.code, kind.status)


@pytest.mark.parametrize("at_once", [False, True], ids=["later", "at once"])
async def test_any_other_exception_of_the_engine_is_an_engine_error_of_that_call_alone(
    at_once: bool, door: Door
) -> None:
    async def fail() -> Answered[Any]:
        raise ZeroDivisionError("by zero")

    class Breaking(FakeEngine):
        def answer(self, request: Request[Any]) -> asyncio.Future[Answered[Any]]:
            if request.images[0].data != b"odd":
                return super().answer(request)
            if at_once:
                raise ZeroDivisionError("by zero")
            return asyncio.ensure_future(fail())

    engine = Breaking()
    engine.gate.clear()
    async with connected(engine, door) as remote:
        beside = asyncio.create_task(first(remote.answer(classify(b"beside"))))
        await until(lambda: engine.running == {b"beside"})
        with pytest.raises(EngineError, match="by zero"):
            await remote.answer(classify(b"odd"))
        assert remote.is_up and not beside.done()
        engine.gate.set()
        assert await beside == class_of(b"beside", (3, 3, 3))


async def test_a_check_that_fails_says_so(door: Door) -> None:
    engine = FakeEngine()
    async with connected(engine, door) as remote:
        await remote.check()
        engine.failure = QueueFullError("full", retry_after_s=1)
        with pytest.raises(QueueFullError):
            await remote.check()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all writes of both ends from here on."""
    sizes: list[int] = []

    class Counting:
        """A transport whose writes are counted."""

        def __init__(self, transport: asyncio.Transport) -> None:
            self._transport = transport

        def __getattr__(self, name: str) -> Any:
            return getattr(self._transport, name)

        def write(self, data: bytes) -> None:
            sizes.append(len(data))
            self._transport.write(data)

    connect = frames.Frames.connection_made

    def counting(self: frames.Frames[Any], transport: asyncio.Transport) -> None:
        connect(self, cast(asyncio.Transport, Counting(transport)))

    monkeypatch.setattr(frames.Frames, "connection_made", counting)
    return sizes


async def test_calls_of_one_turn_leave_in_one_write_and_so_do_the_answers_of_a_batch(
    door: Door, writes: list[int]
) -> None:
    engine = FakeEngine()
    async with connected(engine, door) as remote:
        engine.gate.clear()
        writes.clear()
        names = [bytes([index]) for index in range(50)]
        calls = [asyncio.create_task(remote.answer(classify(name))) for name in names]
        await until(lambda: engine.running == set(names))
        assert len(writes) == 1
        for _ in range(30):  # those that take their turns before the gate have taken them
            await asyncio.sleep(0)
        engine.gate.set()
        answers = await asyncio.gather(*calls)
        assert len(writes) == 2
        assert [answer.results[0].indices[0] for answer in answers] == [class_of(name, (3, 3, 3)) for name in names]


async def test_cancelling_a_call_withdraws_its_request_and_no_other(door: Door) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with connected(engine, door) as remote:
        calls = {name: asyncio.create_task(first(remote.answer(classify(name)))) for name in (b"a", b"b", b"c")}
        await until(lambda: engine.running == {b"a", b"b", b"c"})
        calls[b"b"].cancel()
        await until(lambda: engine.running == {b"a", b"c"})
        assert engine.withdrawn == {b"b"}
        assert remote.num_calls == 2
        engine.gate.set()
        assert await calls[b"c"] == class_of(b"c", (3, 3, 3))
        assert await calls[b"a"] == class_of(b"a", (3, 3, 3))


async def test_a_call_that_is_cancelled_before_it_has_left_is_withdrawn_too(door: Door) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with connected(engine, door) as remote:
        gone = asyncio.create_task(remote.answer(classify(b"gone")))
        await asyncio.sleep(0)
        gone.cancel()
        stays = asyncio.create_task(first(remote.answer(classify(b"stays"))))
        await until(lambda: engine.running == {b"stays"})
        engine.gate.set()
        assert await stays == class_of(b"stays", (3, 3, 3))
        assert gone.cancelled() and remote.num_calls == 0


async def test_an_engine_that_no_longer_keeps_deadlines_is_given_up_some_time_after_them(door: Door) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with connected(engine, door) as remote:
        request, later = classify(b"now", in_s=500), classify(b"later", in_s=800)
        calls = [asyncio.create_task(remote.answer(each)) for each in (request, later)]
        await until(lambda: len(engine.running) == 2)
        # Just before it, the engine may still say something; then nobody waits any more.
        assert remote._expire(request.deadline + GRACE_S - 1e-3) == request.deadline + GRACE_S
        await asyncio.sleep(0)
        assert not calls[0].done()
        assert remote._expire(request.deadline + GRACE_S) == later.deadline + GRACE_S
        with pytest.raises(DeadlineError):
            await calls[0]
        assert not calls[1].done() and remote.num_calls == 1
        engine.gate.set()
        assert await first(remote.answer(classify(b"next"))) == class_of(b"next", (3, 3, 3))
        assert (await calls[1]).config_version == 7


async def test_a_timer_gives_it_up(door: Door) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with connected(engine, door) as remote:
        for _ in range(2):
            with pytest.raises(DeadlineError):
                await remote.answer(classify(in_s=0.02 - GRACE_S))
        assert remote.num_calls == 0


async def test_an_engine_that_answers_in_time_is_heard_although_the_deadline_has_passed_on_the_way(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "GRACE_S", 1000.0)
    async with connected(FakeEngine(), door) as remote:
        assert await first(remote.answer(classify(b"late", in_s=-500))) == class_of(b"late", (3, 3, 3))


async def test_a_check_of_a_hanging_engine_is_unavailable(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()

    async def hang() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(engine, "check", hang)
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.01)
    async with connected(engine, door) as remote:
        with pytest.raises(UnavailableError) as refusal:
            await remote.check()
        assert refusal.value.retry_after_s and not isinstance(refusal.value, LostEngineError)


async def test_before_the_engine_is_there_everything_is_unavailable(door: Door) -> None:
    remote = RemoteEngine(door)
    remote.start()
    with pytest.raises(UnavailableError, match="loading") as refusal:
        remote.catalog()
    assert refusal.value.retry_after_s
    for call in (
        remote.answer(classify()),
        remote.answer(explain()),
        remote.check(),
        remote.curve("tiny"),
        remote.configuration(),
        remote.configure({"tiny": 1}, None),
    ):
        with pytest.raises(UnavailableError) as refusal:
            await cast(Coroutine[Any, Any, object], call)
        assert not isinstance(refusal.value, LostEngineError)  # it did not have it
    assert not remote.is_up
    await remote.close()


async def test_when_the_engine_dies_all_calls_in_flight_fail_and_a_restarted_one_serves(
    door: Door, at_once: None
) -> None:
    remote = RemoteEngine(door)
    remote.start()
    engine = FakeEngine()
    engine.gate.clear()
    async with listening(engine, door):
        await until(lambda: remote.is_up)
        calls = [asyncio.create_task(remote.answer(classify(bytes([index])))) for index in range(20)]
        await until(lambda: len(engine.running) == 20)
    failures = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(failure) for failure in failures] == [LostEngineError] * 20
    assert all(isinstance(failure, UnavailableError) and failure.retry_after_s for failure in failures)
    assert not remote.is_up
    with pytest.raises(UnavailableError):
        await remote.answer(classify())
    async with listening(FakeEngine(), door):
        await until(lambda: remote.is_up)
        assert await first(remote.answer(classify(b"again"))) == class_of(b"again", (3, 3, 3))
        await remote.close()


async def test_an_engine_that_dies_before_it_greets_is_waited_for_by_the_next_one(door: Door, at_once: None) -> None:
    remote = RemoteEngine(door)
    remote.start()
    for _ in range(3):
        end = None
        while end is None:  # it takes the connection, and dies
            end = door.take()
            await asyncio.sleep(0.001)
        end.close()
        assert not remote.is_up
        with pytest.raises(UnavailableError):
            await remote.answer(classify())
    async with listening(FakeEngine(), door):
        await until(lambda: remote.is_up)
        assert await first(remote.answer(classify(b"x"))) == class_of(b"x", (3, 3, 3))
        await remote.close()


async def test_more_connections_than_may_wait_for_an_engine_are_all_taken_by_it(door: Door, at_once: None) -> None:
    remotes = [RemoteEngine(door) for _ in range(40)]
    for remote in remotes:
        remote.start()
    await asyncio.sleep(0.01)  # those beyond what the kernel lets wait try again
    async with listening(FakeEngine(), door):
        await until(lambda: all(remote.is_up for remote in remotes))
        for remote in remotes:
            await remote.close()


def test_a_full_door_is_told_and_leaves_no_descriptor_open(door: Door) -> None:
    waiting: list[socket.socket] = []
    with pytest.raises(OSError):
        while len(waiting) < 10_000:
            waiting.append(door.knock())
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        door.knock()
    assert len(os.listdir("/proc/self/fd")) == before
    for end in waiting:
        end.close()
        taken = door.take()
        assert taken is not None and taken.recv(1) == b""  # its client is gone
        taken.close()
    assert door.take() is None


async def test_an_http_process_that_leaves_has_its_requests_withdrawn_and_others_keep_theirs(door: Door) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with connected(engine, door) as stays:
        leaves = RemoteEngine(door)
        leaves.start()
        await until(lambda: leaves.is_up)
        lost = [asyncio.create_task(leaves.answer(classify(name))) for name in (b"x", b"y")]
        kept = asyncio.create_task(first(stays.answer(classify(b"z"))))
        await until(lambda: len(engine.running) == 3)
        await leaves.close()
        await until(lambda: engine.running == {b"z"})
        assert engine.withdrawn == {b"x", b"y"}
        assert [type(each) for each in await asyncio.gather(*lost, return_exceptions=True)] == [LostEngineError] * 2
        engine.gate.set()
        assert await kept == class_of(b"z", (3, 3, 3))


@pytest.mark.parametrize("garbage", [b"\0\0\0\5hello", b"\0\0\0\0", b"\0\0\0\2\xff\xff"], ids=["text", "empty", "odd"])
async def test_garbage_ends_the_connection_that_it_came_over_and_no_other(garbage: bytes, door: Door) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with connected(engine, door) as remote:
        kept = asyncio.create_task(first(remote.answer(classify(b"kept"))))
        await until(lambda: engine.running == {b"kept"})
        reader, writer = await asyncio.open_unix_connection(sock=door.knock())
        writer.write(garbage)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1 << 20)  # the catalog, and then the end
        writer.close()
        engine.gate.set()
        assert await kept == class_of(b"kept", (3, 3, 3))


async def test_an_engine_that_says_nonsense_is_lost_and_connected_to_again(door: Door, at_once: None) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with listening(engine, door) as server:
        remote = RemoteEngine(door)
        remote.start()
        await until(lambda: remote.is_up)
        lost = asyncio.create_task(remote.answer(classify(b"lost")))
        await until(lambda: engine.running == {b"lost"})
        (connection,) = server._connections
        assert connection.frames._transport is not None
        connection.frames._transport.write(b"\0\0\0\5hello")
        with pytest.raises(LostEngineError):
            await lost
        await until(lambda: remote.is_up and engine.withdrawn == {b"lost"})
        engine.gate.set()
        assert await first(remote.answer(classify(b"again"))) == class_of(b"again", (3, 3, 3))
        await remote.close()


async def test_a_withdrawn_request_is_not_computed_by_a_real_engine(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    device = FakeDevice()
    local = local_engine(device)
    local.start()
    server = EngineServer(local, door)
    remote = RemoteEngine(door)
    remote.start()
    await until(lambda: remote.is_up)
    device.gate.clear()
    running = asyncio.create_task(remote.answer(classify(b"first")))
    await until(lambda: len(device.batches) == 1)
    gone, stays = (asyncio.create_task(remote.answer(classify(name))) for name in (b"gone", b"stays"))
    await until(lambda: local._batcher.num_waiting == 2)
    gone.cancel()
    await until(lambda: local._batcher.num_waiting == 1)
    device.gate.set()
    assert (await stays).batch_size == 1 and (await running).batch_size == 1
    assert [each.image.data for _, batch in device.batches for each in batch] == [b"first", b"stays"]
    await remote.close()
    server.close()
    await local.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_all_images_of_a_request_are_answered_in_order_by_a_real_engine(door: Door) -> None:
    device = FakeDevice()
    local = local_engine(device, r=2, max_batch_size=2)
    local.start()
    server = EngineServer(local, door)
    remote = RemoteEngine(door)
    remote.start()
    await until(lambda: remote.is_up)
    images: list[Image] = [Pixels(bytes([index])) for index in range(5)]
    for r, schedule in ((None, (2, 2, 2)), ((4, 0, 1), (4, 0, 1))):
        answered = await remote.answer(
            Classify(model="tiny", images=images, r=r, deadline=time.monotonic() + 1e3, top_k=1)
        )
        assert [top_k.indices[0] for top_k in answered.results] == [class_of(each.data, schedule) for each in images]
        assert (answered.schedule, answered.config_version, answered.batch_size) == (schedule, 1, 2)
    await remote.close()
    server.close()
    await local.close()


async def test_a_server_that_takes_nobody_new_knows_when_the_last_http_process_has_left(door: Door) -> None:
    server = EngineServer(FakeEngine(), door)
    remote = RemoteEngine(door)
    remote.start()
    await until(lambda: remote.is_up)
    server.close()
    leaving = asyncio.create_task(server.left(within_s=1000))
    assert await first(remote.answer(classify(b"late"))) == class_of(b"late", (3, 3, 3))
    assert not leaving.done()
    await remote.close()
    await leaving
    await server.left(within_s=1000)


async def test_a_jpeg_crosses_as_it_came_and_a_catalog_says_whether_it_may(door: Door) -> None:
    class Decoding(FakeEngine):
        def catalog(self) -> dict[str, ModelInfo]:
            return {"tiny": model_info(decodes_jpeg=True)}

    engine = Decoding()
    async with connected(engine, door) as remote:
        assert remote.catalog()["tiny"].decodes_jpeg
        file = JpegFile(random.Random(1).randbytes(4_000_000), 40, 30)
        sent = Classify(model="tiny", images=[file], r=(1, 2, 3), deadline=time.monotonic() + 1e3, top_k=1)
        await remote.answer(sent)
        assert engine.asked == [sent]


class Pool:
    """Several engines behind sockets of their own, each of which can die, and the server's view of them."""

    def __init__(self, count: int) -> None:
        self.engines = [FakeEngine() for _ in range(count)]
        self.doors = [Door() for _ in range(count)]
        self.remotes = [RemoteEngine(door, index) for index, door in enumerate(self.doors)]
        self.devices = Devices(self.remotes)
        self._alive = [asyncio.Event() for _ in range(count)]
        self._serving: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        for engine in self.engines:
            engine.gate.clear()
        self._serving = [asyncio.create_task(self._serve(index)) for index in range(len(self.engines))]
        self.devices.start()
        await until(lambda: all(remote.is_up for remote in self.remotes))

    async def _serve(self, index: int) -> None:
        async with listening(self.engines[index], self.doors[index]):
            await self._alive[index].wait()

    async def holder_of(self, data: bytes) -> int:
        """Which of them has a request in flight."""
        await until(lambda: any(data in engine.running for engine in self.engines))
        return next(index for index, engine in enumerate(self.engines) if data in engine.running)

    async def kill(self, index: int) -> None:
        self._alive[index].set()
        await self._serving[index]

    async def close(self) -> None:
        await self.devices.close()
        for index in range(len(self.engines)):
            await self.kill(index)
            self.doors[index].close()


@asynccontextmanager
async def several(count: int) -> AsyncIterator[Pool]:
    pool = Pool(count)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def times_asked(engines: Sequence[FakeEngine], data: bytes) -> int:
    return sum(request.images[0].data == data for engine in engines for request in engine.asked)


async def test_what_an_engine_held_when_it_went_down_is_answered_by_another_once(door: Door) -> None:
    async with several(2) as pool:
        calls = {name: asyncio.create_task(first(pool.devices.answer(classify(name)))) for name in (b"a", b"b", b"c")}
        victim = await pool.holder_of(b"b")
        await until(lambda: sum(len(engine.running) for engine in pool.engines) == 3)
        held = set(pool.engines[victim].running)
        await pool.kill(victim)
        await until(lambda: pool.engines[1 - victim].running == {b"a", b"b", b"c"})
        pool.engines[1 - victim].gate.set()
        for name, call in calls.items():
            assert await call == class_of(name, (3, 3, 3))
            assert times_asked(pool.engines, name) == (2 if name in held else 1)


async def test_a_request_that_was_in_flight_at_two_deaths_is_not_tried_a_third_time(door: Door) -> None:
    async with several(3) as pool:
        call = asyncio.create_task(pool.devices.answer(classify(b"deadly")))
        for _ in range(2):
            await pool.kill(await pool.holder_of(b"deadly"))
        with pytest.raises(EngineError, match="two engines went down"):
            await call
        assert times_asked(pool.engines, b"deadly") == 2
        (left,) = (engine for engine, remote in zip(pool.engines, pool.remotes, strict=True) if remote.is_up)
        left.gate.set()
        assert await first(pool.devices.answer(classify(b"next"))) == class_of(b"next", (3, 3, 3))
        assert times_asked([left], b"deadly") == 0


@pytest.mark.parametrize(
    ("count", "deaths", "status", "code"), [(1, 1, 503, "unavailable"), (3, 2, 500, "engine_error")]
)
@pytest.mark.parametrize("path", ["/classify", "/v1/explain"])
async def test_clients_are_told_of_engines_that_went_down(
    path: str, count: int, deaths: int, status: int, code: str, door: Door
) -> None:
    async with several(count) as pool:
        engine = pool.remotes[0] if count == 1 else pool.devices
        async with serving(engine=engine) as service:
            headers = {"content-type": "image/png"}
            call = asyncio.create_task(service.client.post(path, content=grey_png(), headers=headers))
            pixels = bytes([100]) * (8 * 8 * 3)
            for _ in range(deaths):
                await pool.kill(await pool.holder_of(pixels))
            response = await call
            assert_is_error(response, status, code)
            assert ("retry-after" in response.headers) == (status == 503)
            assert service.app.state.service.admission.in_flight == 0


@pytest.mark.parametrize("path", ["/classify", "/v1/explain"])
async def test_clients_do_not_notice_that_one_of_two_engines_went_down(path: str, door: Door) -> None:
    async with several(2) as pool, serving(engine=pool.devices) as service:
        headers = {"content-type": "image/png"}
        call = asyncio.create_task(service.client.post(path, content=grey_png(), headers=headers))
        pixels = bytes([100]) * (8 * 8 * 3)
        victim = await pool.holder_of(pixels)
        await pool.kill(victim)
        pool.engines[1 - victim].gate.set()
        assert (await call).status_code == 200
        assert times_asked(pool.engines, pixels) == 2


async def test_who_has_loaded_a_model_finds_it_in_every_http_process_and_who_has_unloaded_it_in_none(
    door: Door,
) -> None:
    engine = FakeEngine()
    async with listening(engine, door):
        remotes = [RemoteEngine(door) for _ in range(4)]
        for remote in remotes:
            remote.start()
        await until(lambda: all(remote.is_up for remote in remotes))
        for caller in remotes:
            await caller.load("cats", "2")
            assert [remote.catalog()["cats"].version for remote in remotes] == ["2"] * 4
            assert await remotes[-1].repository() == await engine.repository()
            await caller.unload("cats")
            assert not [remote for remote in remotes if "cats" in remote.catalog()]
        for remote in remotes:
            await remote.close()


async def test_a_catalog_without_models_is_one_and_no_sign_of_an_engine_that_starts(door: Door) -> None:
    async with connected(FakeEngine(), door) as remote:
        await remote.unload("tiny")
        await remote.unload("large")
        assert remote.is_up and remote.catalog() == {}


async def test_a_load_is_answered_though_an_http_process_does_not_read(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.ipc.server.SEEN_WITHIN_S", 0.01)
    async with connected(FakeEngine(), door) as remote:
        deaf = door.knock()
        with closing(deaf):
            await remote.load("cats")
            assert "cats" in remote.catalog()


async def test_an_error_of_a_load_arrives_and_changes_nothing(door: Door) -> None:
    engine = FakeEngine()
    engine.failure = NotFoundError("there is no model 'cats' to load")
    async with connected(engine, door) as remote:
        with pytest.raises(NotFoundError, match="no model 'cats' to load"):
            await remote.load("cats")
        assert list(remote.catalog()) == ["tiny", "large"]


async def test_every_http_process_is_shown_what_the_engine_has_loaded_by_itself(door: Door) -> None:
    engine = FakeEngine()
    async with listening(engine, door) as server:
        remote = RemoteEngine(door)
        remote.start()
        await until(lambda: remote.is_up)
        await engine.load("cats")  # as one does that follows another engine
        assert "cats" not in remote.catalog()
        server.show_catalog()
        await until(lambda: "cats" in remote.catalog())
        await remote.close()
