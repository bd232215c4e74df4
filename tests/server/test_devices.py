"""Several engines as one: who gets a request, and what holds while some are down."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from server.curve import Curve
from server.dial import RSetting
from server.errors import (
    DeadlineError,
    EngineError,
    InvalidError,
    NotFoundError,
    QueueFullError,
    ServerError,
    UnavailableError,
)
from server.images.image import JpegFile, Pixels
from server.ipc.client import LostEngineError
from server.ipc.devices import Devices
from server.ipc.messages import Answered, Classify, Merges, Request, TopK
from server.types import Compiling, ComputedBy, Configuration, ModelInfo, ModelState
from tests.server.conftest import (
    assert_is_error,
    class_of,
    classify,
    explain,
    fake_curve,
    grey_png,
    model_info,
    serving,
    until,
)

ROOT = Path(__file__).resolve().parents[2]


class FakeDevice:
    """Answers from the pixels, once its gate is open; says who it is by the version of its configuration."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.is_up = True
        self.known = True
        self.decodes = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: ServerError | None = None
        self.num_calls = 0
        self.num_asked = 0
        self.is_connected = False
        self.models = {"tiny": "1"}

    def start(self) -> None:
        self.is_connected = True

    async def close(self) -> None:
        self.is_connected = False

    def catalog(self) -> dict[str, ModelInfo]:
        if not self.known:
            raise UnavailableError("the models are still loading", retry_after_s=1)
        source = f"device {self.number}"
        return {
            name: model_info(name, source=source, decodes_jpeg=self.decodes, version=version, revision=version)
            for name, version in self.models.items()
        }

    async def _call(self) -> None:
        assert self.is_up, "an engine that is down was asked"
        self.num_calls += 1
        self.num_asked += 1
        try:
            await self.gate.wait()
        finally:
            self.num_calls -= 1
        if self.failure is not None:
            raise self.failure

    async def answer(self, request: Request[Any]) -> Answered[Any]:
        await self._call()
        schedule = request.r if isinstance(request.r, tuple) else (0, 0, 0)
        results: list[Any] = [TopK([class_of(image.data, schedule)], [1.0]) for image in request.images]
        if request.operation == "explain":
            results = [Merges(top_k, (4, 4), 2, [[0] * 16] * 3) for top_k in results]
        return Answered(results, schedule, self.number, 1, 0.0, 0.0, ComputedBy("torch", "fp32"))

    def die(self) -> None:
        """Goes down with what it holds."""
        self.is_up, self.failure = False, LostEngineError("the engine went down", retry_after_s=1)
        self.gate.set()

    async def curve(self, model: str) -> Curve:
        await self._call()
        return fake_curve()

    async def compiling(self, model: str) -> Compiling | None:
        await self._call()
        return None

    async def configuration(self) -> Configuration:
        await self._call()
        return Configuration(self.number, {"tiny": 0})

    async def configure(self, changes: Mapping[str, RSetting], expected_version: int | None) -> Configuration:
        await self._call()
        return Configuration(self.number, changes)

    async def load(self, name: str, version: str | None = None) -> None:
        await self._call()
        self.models[name] = version or "2"

    async def unload(self, name: str) -> None:
        await self._call()
        if self.models.pop(name, None) is None:
            raise NotFoundError(f"there is no model {name}")

    async def repository(self) -> list[ModelState]:
        await self._call()
        return [ModelState(name, version, "READY") for name, version in self.models.items()]

    async def check(self) -> None:
        await self._call()


async def dies_with(fake: FakeDevice, answering: Coroutine[Any, Any, Answered[Any]]) -> asyncio.Task[Answered[Any]]:
    """Has an engine go down while it holds a request."""
    call = asyncio.create_task(answering)
    await until(lambda: fake.num_calls == 1)
    fake.die()
    return call


def several(count: int = 3) -> tuple[list[FakeDevice], Devices]:
    fakes = [FakeDevice(number) for number in range(count)]
    return fakes, Devices(fakes)


async def who(devices: Devices) -> int:
    """Which engine answers the next request."""
    return (await devices.answer(classify())).config_version


async def test_idle_engines_take_turns() -> None:
    _, devices = several(3)
    assert [await who(devices) for _ in range(9)] == [0, 1, 2] * 3


@given(loads=st.lists(st.integers(0, 5), min_size=2, max_size=5), requests=st.integers(1, 20))
def test_requests_even_out_what_the_engines_have_to_do(loads: list[int], requests: int) -> None:
    """No engine is given a request while another has less to do: none that got one has two more than another."""

    async def run() -> None:
        fakes, devices = several(len(loads))
        for fake, load in zip(fakes, loads, strict=True):
            fake.gate.clear()
            fake.num_calls = load
        calls = [asyncio.create_task(devices.answer(classify())) for _ in range(requests)]
        await until(lambda: sum(fake.num_calls for fake in fakes) == sum(loads) + requests)
        taken = {fake.number: fake.num_calls - loads[fake.number] for fake in fakes}
        most = max(fake.num_calls for fake in fakes if taken[fake.number])
        assert most <= min(fake.num_calls for fake in fakes) + 1
        for fake in fakes:
            fake.gate.set()
        answers = await asyncio.gather(*calls)
        assert Counter(answer.config_version for answer in answers) == Counter(taken)

    asyncio.run(run())


@pytest.mark.parametrize("is_told", [True, False])
async def test_an_engine_that_is_too_late_does_not_draw_those_who_cannot_wait(is_told: bool) -> None:
    """It hangs: its calls end by the engine's word or by the caller's own deadline, and so it has nothing in hand."""
    now = 0.0
    fakes = [FakeDevice(0), FakeDevice(1)]
    devices = Devices(fakes, clock=lambda: now)
    fakes[0].failure, fakes[1].num_calls = (DeadlineError("late") if is_told else None), 1
    if not is_told:
        fakes[0].gate.clear()
    late = Classify(model="tiny", images=classify().images, deadline=-1.0, top_k=1)
    for _ in range(3):
        call = asyncio.create_task(devices.answer(late))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
    assert fakes[0].num_asked == 2 and fakes[1].num_asked == 1


async def test_an_engine_that_fails_at_once_does_not_draw_the_requests_of_those_that_work() -> None:
    """While the other works on eight requests, it gets as many and no more, until a second has passed."""
    now = 0.0
    fakes = [FakeDevice(0), FakeDevice(1)]
    devices = Devices(fakes, clock=lambda: now)
    fakes[0].failure = EngineError("no memory")
    fakes[1].gate.clear()
    calls: list[asyncio.Task[Answered[TopK]]] = []
    failed = 0
    while len(calls) - failed < 8:
        calls.append(asyncio.create_task(devices.answer(classify())))
        for _ in range(5):
            await asyncio.sleep(0)
        failed = sum(call.done() for call in calls)
    assert failed in (7, 8)
    now = 1.1
    fakes[0].failure = None
    assert await who(devices) == 0
    fakes[1].gate.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, EngineError) for answer in answers) == failed


async def test_an_engine_that_stands_still_gets_no_more() -> None:
    fakes, devices = several(2)
    fakes[0].gate.clear()
    stuck = asyncio.create_task(devices.answer(classify()))
    await until(lambda: fakes[0].num_calls == 1)
    assert {await who(devices) for _ in range(50)} == {1}
    fakes[0].gate.set()
    assert (await stuck).config_version == 0


async def test_while_some_are_down_the_others_serve_and_without_any_it_is_unavailable() -> None:
    fakes, devices = several(3)
    fakes[1].is_up = False
    assert [await who(devices) for _ in range(6)] == [0, 2] * 3
    fakes[2].is_up = False
    assert {await who(devices) for _ in range(6)} == {0}
    fakes[0].is_up = False
    for call in (
        devices.answer(classify()),
        devices.answer(explain()),
        devices.curve("tiny"),
        devices.configuration(),
        devices.configure({"tiny": 1}, None),
        devices.check(),
    ):
        with pytest.raises(UnavailableError) as refusal:
            await call
        assert refusal.value.retry_after_s
    fakes[1].is_up = True
    assert await who(devices) == 1


async def test_every_call_reaches_an_engine_that_is_up() -> None:
    fakes, devices = several(2)
    fakes[0].is_up = False
    for request in (classify(b"one"), explain(b"two")):
        assert await devices.answer(cast(Request[Any], request)) == await fakes[1].answer(request)
    assert await devices.curve("tiny") == fake_curve()
    assert await devices.configuration() == Configuration(1, {"tiny": 0})
    assert await devices.configure({"tiny": 3}, None) == Configuration(1, {"tiny": 3})


@pytest.mark.parametrize("kind", ServerError.__subclasses__())
async def test_what_an_engine_cannot_answer_is_not_tried_on_another(kind: type[ServerError]) -> None:
    fakes, devices = several(2)
    fakes[0].failure = kind("it says no", retry_after_s=1)
    with pytest.raises(kind, match="it says no"):
        await devices.answer(classify())
    assert [fake.num_asked for fake in fakes] == [1, 0]
    assert await who(devices) == 1


async def test_what_an_engine_held_when_it_went_down_is_answered_by_another_once() -> None:
    fakes, devices = several(3)
    fakes[0].gate.clear()
    calls = [asyncio.create_task(devices.answer(classify(bytes([index])))) for index in range(3)]
    await until(lambda: fakes[0].num_calls == 1 and calls[1].done() and calls[2].done())
    fakes[0].die()
    answered = await calls[0]
    assert answered.config_version in (1, 2) and answered.results[0].indices == [class_of(bytes([0]), (0, 0, 0))]
    assert [fake.num_asked for fake in fakes] in ([1, 2, 1], [1, 1, 2])


async def test_what_is_tried_again_goes_to_the_one_with_the_least_to_do() -> None:
    fakes, devices = several(3)
    for fake in fakes:
        fake.gate.clear()
    call = asyncio.create_task(devices.answer(classify()))
    await until(lambda: fakes[0].num_calls == 1)
    fakes[1].num_calls = 5
    fakes[0].die()
    await until(lambda: fakes[2].num_calls == 1)
    fakes[2].gate.set()
    assert (await call).config_version == 2


async def test_with_one_engine_what_it_held_is_unavailable() -> None:
    (fake,), devices = several(1)
    fake.gate.clear()
    call = asyncio.create_task(devices.answer(classify()))
    await until(lambda: fake.num_calls == 1)
    fake.die()
    with pytest.raises(UnavailableError, match="went down") as refusal:
        await call
    assert refusal.value.retry_after_s and fake.num_asked == 1


async def test_where_the_others_are_down_what_one_held_is_unavailable() -> None:
    fakes, devices = several(2)
    fakes[1].is_up = False
    fakes[0].gate.clear()
    call = await dies_with(fakes[0], devices.answer(classify()))
    with pytest.raises(UnavailableError) as refusal:
        await call
    assert refusal.value.retry_after_s


async def test_a_request_that_two_engines_went_down_with_is_refused_and_the_third_never_sees_it() -> None:
    fakes, devices = several(3)
    for fake in fakes:
        fake.gate.clear()
    call = asyncio.create_task(devices.answer(classify()))
    for fake in fakes[:2]:
        await until(lambda fake=fake: fake.num_calls == 1)  # type: ignore[misc]
        fake.die()
    with pytest.raises(EngineError, match="two engines went down") as refusal:
        await call
    assert refusal.value.status == 500
    assert [fake.num_asked for fake in fakes] == [1, 1, 0]


@pytest.mark.parametrize("failure", [EngineError("no"), QueueFullError("no"), DeadlineError("no")])
async def test_what_the_second_engine_says_is_the_answer(failure: ServerError) -> None:
    fakes, devices = several(3)
    fakes[0].gate.clear()
    fakes[1].failure = failure
    call = await dies_with(fakes[0], devices.answer(classify()))
    with pytest.raises(type(failure), match="no"):
        await call
    assert [fake.num_asked for fake in fakes] == [1, 1, 0]


async def test_the_engine_that_went_down_is_not_asked_again_though_it_is_back() -> None:
    fakes, devices = several(2)
    fakes[0].gate.clear()
    fakes[1].num_calls = 100
    call = await dies_with(fakes[0], devices.answer(classify()))
    fakes[0].is_up = True  # before anyone has heard of it
    assert (await call).config_version == 1


READS: list[Callable[[Devices], Coroutine[Any, Any, Any]]] = [
    lambda devices: devices.curve("tiny"),
    lambda devices: devices.compiling("tiny"),
    lambda devices: devices.configuration(),
    lambda devices: devices.repository(),
]


@pytest.mark.parametrize("read", READS)
async def test_what_is_read_of_an_engine_that_goes_down_is_read_of_another(
    read: Callable[[Devices], Coroutine[Any, Any, Any]],
) -> None:
    fakes, devices = several(2)
    fakes[0].gate.clear()
    call = asyncio.create_task(read(devices))
    await until(lambda: fakes[0].num_calls == 1)
    fakes[0].die()
    await call
    assert [fake.num_asked for fake in fakes] == [1, 1]
    with pytest.raises(LostEngineError):
        fakes[1].failure = fakes[0].failure
        await read(devices)
    assert [fake.num_asked for fake in fakes] == [1, 2]


async def test_a_change_is_not_tried_again() -> None:
    """It may have been made before the engine went down."""
    fakes, devices = several(2)
    fakes[0].failure = LostEngineError("the engine went down", retry_after_s=1)
    with pytest.raises(UnavailableError):
        await devices.configure({"tiny": 1}, None)
    assert [fake.num_asked for fake in fakes] == [1, 0]


async def test_a_caller_that_gives_up_while_it_is_tried_again_leaves_no_load() -> None:
    fakes, devices = several(2)
    for fake in fakes:
        fake.gate.clear()
    call = await dies_with(fakes[0], devices.answer(classify()))
    await until(lambda: fakes[1].num_calls == 1)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled() and [fake.num_calls for fake in fakes] == [0, 0]


async def test_a_caller_that_gives_up_leaves_no_load() -> None:
    fakes, devices = several(2)
    for fake in fakes:
        fake.gate.clear()
    calls = [asyncio.create_task(devices.answer(classify())) for _ in range(4)]
    await until(lambda: [fake.num_calls for fake in fakes] == [2, 2])
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert [fake.num_calls for fake in fakes] == [0, 0]


async def test_the_models_are_those_of_the_first_that_has_said_them() -> None:
    fakes, devices = several(2)
    assert devices.catalog()["tiny"].source == "device 0"
    fakes[0].known = fakes[0].is_up = False
    assert devices.catalog()["tiny"].source == "device 1"
    fakes[1].known = fakes[1].is_up = False
    with pytest.raises(UnavailableError, match="loading"):
        devices.catalog()


def with_a_jpeg() -> Classify:
    """Two images, of which one is for an engine that decodes."""
    return Classify(model="tiny", images=[Pixels(b"abc"), JpegFile(b"abc", 8, 8)], deadline=1e9, top_k=1)


async def test_a_jpeg_goes_to_an_engine_that_decodes() -> None:
    fakes, devices = several(2)
    fakes[0].decodes = True
    assert devices.catalog()["tiny"].decodes_jpeg
    assert [(await devices.answer(with_a_jpeg())).config_version for _ in range(3)] == [0, 0, 0]
    assert await who(devices) == 1
    fakes[0].is_up = False
    with pytest.raises(UnavailableError, match="decodes") as refusal:
        await devices.answer(with_a_jpeg())
    assert refusal.value.retry_after_s
    assert not devices.catalog()["tiny"].decodes_jpeg  # so that the next one comes as pixels


async def test_a_jpeg_is_tried_again_by_an_engine_that_decodes() -> None:
    fakes, devices = several(3)
    fakes[0].decodes = fakes[2].decodes = True
    for fake in fakes:
        fake.gate.clear()
    call = await dies_with(fakes[0], devices.answer(with_a_jpeg()))
    await until(lambda: fakes[2].num_calls == 1)
    fakes[2].gate.set()
    assert (await call).config_version == 2 and fakes[1].num_asked == 0


async def test_where_no_other_engine_decodes_a_jpeg_is_unavailable() -> None:
    fakes, devices = several(2)
    fakes[0].decodes = True
    fakes[0].gate.clear()
    call = await dies_with(fakes[0], devices.answer(with_a_jpeg()))
    with pytest.raises(UnavailableError) as refusal:
        await call
    assert refusal.value.retry_after_s and fakes[1].num_asked == 0


async def test_one_engine_that_answers_is_enough_to_be_ready() -> None:
    fakes, devices = several(3)
    fakes[0].gate.clear()  # it hangs
    fakes[1].failure = EngineError("it burns")
    await devices.check()
    await until(lambda: fakes[0].num_calls == 0)  # what hangs is not waited for
    fakes[2].is_up = False
    checking = asyncio.create_task(devices.check())
    await until(lambda: fakes[0].num_calls == 1)
    assert not checking.done()
    fakes[0].gate.set()
    await checking


async def test_where_none_is_ready_it_says_why() -> None:
    fakes, devices = several(2)
    for fake in fakes:
        fake.failure = EngineError("it burns")
    with pytest.raises(EngineError, match="it burns"):
        await devices.check()


async def test_all_are_connected_and_left() -> None:
    fakes, devices = several(3)
    devices.start()
    assert all(fake.is_connected for fake in fakes)
    await devices.close()
    assert not any(fake.is_connected for fake in fakes)


async def test_the_application_runs_on_several() -> None:
    fakes, devices = several(2)
    async with serving(engine=devices) as service:
        answers = [(await service.classify(grey_png())).json() for _ in range(4)]
        assert [answer["config_version"] for answer in answers] == [0, 1, 0, 1]
        assert (await service.client.get("/readyz")).status_code == 200
        for fake in fakes:
            fake.is_up = False
        assert (await service.classify(grey_png(), status=503)).headers["retry-after"]
        assert (await service.client.get("/readyz")).status_code == 503


async def test_clients_of_several_are_told_of_two_deaths_and_do_not_notice_one() -> None:
    fakes, devices = several(2)
    async with serving(engine=devices) as service:
        for fake in fakes:
            fake.gate.clear()
        call = asyncio.create_task(service.classify(grey_png()))
        await until(lambda: fakes[0].num_calls == 1)
        fakes[0].die()
        fakes[1].gate.set()
        assert (await call).json()["config_version"] == 1
        fakes[0].is_up, fakes[0].failure = True, None
        for fake in fakes:
            fake.gate.clear()
        call = asyncio.create_task(service.classify(grey_png(), status=500))
        for _ in fakes:
            await until(lambda: any(fake.num_calls for fake in fakes))
            next(fake for fake in fakes if fake.num_calls).die()
            await until(lambda: not any(fake.num_calls and not fake.is_up for fake in fakes))
        assert_is_error(await call, 500, "engine_error")
        assert service.app.state.service.admission.in_flight == 0


async def test_a_model_is_loaded_and_unloaded_on_every_engine() -> None:
    fakes, devices = several(3)
    await devices.load("cats", "5")
    assert [fake.models for fake in fakes] == [{"tiny": "1", "cats": "5"}] * 3
    await devices.unload("cats")
    assert [fake.models for fake in fakes] == [{"tiny": "1"}] * 3
    with pytest.raises(NotFoundError):
        await devices.unload("cats")


@pytest.mark.parametrize(("name", "before"), [("cats", {"tiny": "1"}), ("tiny", {"tiny": "1"})])
async def test_where_one_engine_refuses_a_model_the_others_go_back_to_what_they_had(
    name: str, before: dict[str, str]
) -> None:
    fakes, devices = several(3)
    fakes[1].failure = InvalidError("model: it does not fit into memory")
    with pytest.raises(InvalidError, match="does not fit"):
        await devices.load(name, "7")
    assert [fake.models for fake in fakes] == [before] * 3


async def test_an_engine_that_goes_down_with_a_load_keeps_the_others_from_nothing() -> None:
    fakes, devices = several(2)
    fakes[0].gate.clear()
    loading = asyncio.create_task(devices.load("cats"))
    await until(lambda: fakes[1].models == {"tiny": "1", "cats": "2"})
    fakes[0].die()
    await loading
    assert fakes[1].models == {"tiny": "1", "cats": "2"}
    fakes[1].failure = LostEngineError("the engine went down")
    with pytest.raises(LostEngineError):
        await devices.load("dogs")


@pytest.mark.parametrize("revision", ["1", "2"])
async def test_a_request_goes_to_an_engine_whose_model_its_images_were_prepared_for(revision: str) -> None:
    fakes, devices = several(3)
    fakes[int(revision)].models = {"tiny": revision}
    fakes[0].models = fakes[3 - int(revision)].models = {"tiny": "another"}
    prepared = structs.replace(classify(), revision=revision)
    assert [(await devices.answer(prepared)).config_version for _ in range(4)] == [int(revision)] * 4


async def test_a_request_for_what_no_engine_lists_any_more_goes_to_one_which_may_still_have_it() -> None:
    fakes, devices = several(2)
    for model in ({"tiny": "3"}, {}):
        for fake in fakes:
            fake.models = dict(model)
        assert await devices.answer(structs.replace(classify(), revision="2"))


async def test_a_model_that_one_engine_has_not_loaded_yet_is_in_the_catalog() -> None:
    fakes, devices = several(3)
    fakes[2].models = {"cats": "2", "tiny": "7"}
    fakes[1].is_up = False
    fakes[1].models = {"dogs": "1"}
    assert {name: info.version for name, info in devices.catalog().items()} == {"tiny": "1", "cats": "2"}
    assert (await devices.answer(classify(model="cats"))).config_version == 2
