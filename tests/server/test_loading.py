"""Models that come and go while an engine serves: loaded beside the others, replaced in one step, freed at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from server.batching import loading as room
from server.batching.engine import LocalEngine
from server.batching.policy import Rung
from server.dial import AutoR
from server.errors import (
    ConflictError,
    EngineError,
    InvalidError,
    NotFoundError,
    ServerError,
    SettingsError,
    UnavailableError,
)
from server.ipc.messages import Answered, TopK
from server.types import ModelInfo, ModelState
from tests.server.conftest import (
    FakeDevice,
    class_of,
    classify,
    curve_row,
    fake_curve,
    local_engine,
    model_info,
    until,
)
from tests.server.fake_loader import CATS, TINY, TINY_2, FakeKept, FakeLoader, loading

DAY_S = 86_400.0


async def ask(engine: LocalEngine, model: str = "tiny", revision: str = "", **more: Any) -> Answered[TopK]:
    return await engine.answer(structs.replace(classify(model=model, **more), revision=revision))


def revisions(device: FakeDevice) -> list[str]:
    """Of each batch the revision of its model."""
    return [key.revision for key, _ in device.batches]


async def states(engine: LocalEngine) -> dict[tuple[str, str], str]:
    return {(each.name, each.version): each.state for each in await engine.repository()}


async def test_a_model_is_loaded_beside_the_others_which_answer_meanwhile() -> None:
    device, loader = FakeDevice(), FakeLoader()
    loader.gate.clear()
    async with loading(device, loader) as engine:
        coming = asyncio.create_task(engine.load("cats"))
        await until(lambda: loader.loads == [(CATS, 0)])
        assert await states(engine) == {
            ("tiny", "1"): "READY",
            ("tiny", "2"): "UNAVAILABLE",
            ("cats", "1"): "LOADING",
        }
        assert (await ask(engine)).results
        with pytest.raises(NotFoundError, match="no model 'cats'; there are: tiny"):
            await ask(engine, "cats")
        loader.gate.set()
        await coming
        assert list(engine.catalog()) == ["tiny", "cats"]
        assert (await ask(engine, "cats")).results[0].indices == [class_of(b"abc", (0, 0, 0))]
        assert (await states(engine))["cats", "1"] == "READY"
        assert revisions(device) == ["t1", "c1"]
        assert {name.rpartition("_")[0] for name in loader.threads} == {"device"}


async def test_what_is_loaded_already_is_loaded_again_only_where_its_files_have_changed() -> None:
    loader = FakeLoader()
    async with loading(FakeDevice(), loader) as engine:
        await engine.load("tiny", "1")
        assert not loader.loads
        loader.on_disk[0] = model_info("tiny", revision="t1, changed")
        await engine.load("tiny", "1")
        assert engine.catalog()["tiny"].revision == "t1, changed"
        await until(lambda: loader.freed == [TINY])


async def test_the_newest_version_is_loaded_where_none_is_named() -> None:
    async with loading(FakeDevice(), FakeLoader()) as engine:
        await engine.load("tiny")
        assert engine.catalog()["tiny"].version == "2"
        await engine.load("tiny", "1")
        assert engine.catalog()["tiny"].version == "1"


async def test_a_version_takes_the_name_in_one_step_and_requests_finish_on_the_one_that_they_came_for() -> None:
    device, loader = FakeDevice(), FakeLoader()
    async with loading(device, loader, linger_s=DAY_S) as engine:
        device.gate.clear()
        held = [asyncio.ensure_future(ask(engine, pixels=bytes([n]))) for n in range(3)]
        await until(lambda: len(device.batches) == 1)
        changing = asyncio.create_task(engine.load("tiny", "2"))
        await until(lambda: loader.loads == [(TINY_2, 0)])
        device.gate.set()  # which the loader, too, waits for
        await changing
        for _ in range(3):
            await ask(engine)
        await asyncio.gather(*held)
        assert revisions(device) == sorted(revisions(device)) and {"t1", "t2"} == set(revisions(device))
        late = await ask(engine, revision="t1", r=(8, 8, 8))  # its image was decoded for the old one
        assert (late.schedule, revisions(device)[-1]) == ((8, 8, 8), "t1")
        with pytest.raises(InvalidError):
            await engine.configure({"tiny": 8}, None)  # more than the new one can merge
        assert not loader.freed


async def test_answers_of_a_retired_model_are_not_counted_as_drift_of_the_one_with_its_name() -> None:
    device, loader = FakeDevice(), FakeLoader()
    async with loading(device, loader, linger_s=DAY_S, drift_sample=1.0) as engine:
        engine._drift._quiet_s = DAY_S  # nothing is checked, so samples can be counted
        await ask(engine, r=(4, 4, 4))
        assert engine._drift.num_waiting == 1
        await engine.load("tiny", "2")
        assert engine._drift.num_waiting == 0
        await ask(engine, r=(4, 4, 4), revision="t1")
        assert engine._drift.num_waiting == 0
        await ask(engine, r=(4, 4, 4))
        assert engine._drift.num_waiting == 1


async def test_an_unloaded_model_is_freed_once_its_last_request_is_answered() -> None:
    device, loader = FakeDevice(), FakeLoader()
    async with loading(device, loader) as engine:
        await ask(engine)
        device.gate.clear()
        held = [asyncio.ensure_future(ask(engine, pixels=bytes([n]))) for n in range(5)]
        await until(lambda: len(device.batches) == 2)
        await engine.unload("tiny")  # new requests are refused at once
        with pytest.raises(NotFoundError, match="no model is loaded"):
            await ask(engine)
        for _ in range(20):
            await asyncio.sleep(0)
        assert (await states(engine))["tiny", "1"] == "UNLOADING" and not loader.freed
        device.gate.set()
        assert [len(answer.results) for answer in await asyncio.gather(*held)] == [1] * 5
        await until(lambda: loader.freed == [TINY])
        await until(lambda: engine._loading is not None and not engine._loading._going)
        assert (await states(engine))["tiny", "1"] == "UNAVAILABLE"


async def test_what_is_timed_of_a_model_that_was_freed_is_not_kept() -> None:
    device, loader = FakeDevice(), FakeLoader()
    async with loading(device, loader) as engine:
        await engine.load("cats")
        key = engine.catalog()["cats"].batch_key((4, 4, 4))
        (timed,) = [timed for name, _, timed in device.begun if name == "cats"]
        await asyncio.to_thread(timed, {key: (0.25, 0.125)})
        assert engine._batcher.speed.own_line(key) == (0.25, 0.125)
        await engine.unload("cats")
        await until(lambda: engine._loading is not None and not engine._loading._going)
        await asyncio.to_thread(timed, {key: (0.25, 0.125)})
        assert engine._batcher.speed.own_line(key) is None


async def test_a_model_is_freed_only_after_the_batch_of_a_request_that_was_withdrawn() -> None:
    device, loader = FakeDevice(), FakeLoader()
    async with loading(device, loader) as engine:
        device.gate.clear()
        given_up = asyncio.ensure_future(ask(engine))
        await until(lambda: len(device.batches) == 1)
        given_up.cancel()
        await engine.unload("tiny")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not loader.freed
        device.gate.set()
        await until(lambda: loader.freed == [TINY])


async def test_a_request_for_a_model_that_was_replaced_and_freed_is_to_be_sent_again() -> None:
    loader = FakeLoader()
    async with loading(FakeDevice(), loader) as engine:
        await engine.load("tiny", "2")
        await until(lambda: loader.freed == [TINY])
        with pytest.raises(UnavailableError, match="was replaced") as refused:
            await ask(engine, revision="t1")
        assert refused.value.retry_after_s
        await engine.unload("tiny")
        await until(lambda: loader.freed == [TINY, TINY_2])
        with pytest.raises(NotFoundError):
            await ask(engine, revision="t2")


async def test_a_model_that_comes_back_while_it_is_in_memory_is_not_loaded_again() -> None:
    device, loader = FakeDevice(), FakeLoader()
    async with loading(device, loader, CATS, TINY, linger_s=DAY_S) as engine:
        await engine.load("tiny", "2")
        await engine.load("tiny", "1")
        await engine.unload("cats")
        await engine.load("cats")
        assert loader.loads == [(TINY_2, 0)]
        assert list(engine.catalog()) == ["cats", "tiny"], "the default is the one of the start again"
        assert (await ask(engine)).results and revisions(device) == ["t1"]
        assert (await states(engine))["tiny", "2"] == "UNLOADING"


async def test_a_model_that_comes_back_while_it_is_being_freed_is_loaded_again() -> None:
    device, loader = FakeDevice(), FakeLoader()
    async with loading(device, loader) as engine:
        device.gate.clear()
        held = asyncio.ensure_future(ask(engine))
        await until(lambda: len(device.batches) == 1)
        await engine.unload("tiny")
        for _ in range(20):
            await asyncio.sleep(0)
        coming = asyncio.create_task(engine.load("tiny", "1"))
        device.gate.set()
        await coming
        assert loader.freed == [TINY] and loader.loads == [(TINY, 0)]
        assert (await held).results and (await ask(engine)).results


FAILURES: list[tuple[Exception, type[ServerError], str]] = [
    (SettingsError("model cats: it has no weights"), InvalidError, "model cats: it has no weights"),
    (EngineError("cats gives numbers that are none"), EngineError, "cats gives numbers that are none"),
    (RuntimeError("CUDA out of memory.\nTried"), EngineError, "model cats cannot be loaded: CUDA out of memory. Tried"),
]


@pytest.mark.parametrize(("failure", "kind", "said"), FAILURES, ids=lambda each: type(each).__name__)
async def test_a_load_that_fails_leaves_all_as_it_was(failure: Exception, kind: type[ServerError], said: str) -> None:
    loader, kept = FakeLoader(), FakeKept()
    loader.failure = failure
    async with loading(FakeDevice(), loader, kept=kept) as engine:
        for name in ("cats", "tiny"):
            with pytest.raises(kind) as failed:
                await engine.load(name)
        assert failed.value.message.replace("tiny", "cats") == said
        assert list(engine.catalog().values()) == [TINY] and not kept and (await ask(engine)).results
        (cats,) = (each for each in await engine.repository() if each.name == "cats")
        assert cats == ModelState("cats", "1", "UNAVAILABLE", said)
        loader.failure = None
        await engine.load("cats")
        assert ModelState("cats", "1", "READY") in await engine.repository()


@pytest.mark.parametrize("name", ["dogs", "../tiny", "", "/etc"])
async def test_what_may_not_be_loaded_is_not_looked_for(name: str) -> None:
    async with loading(FakeDevice(), FakeLoader()) as engine:
        with pytest.raises(NotFoundError):
            await engine.load(name)
        with pytest.raises(InvalidError, match="no version 9"):
            await engine.load("tiny", "9")
        with pytest.raises(NotFoundError):
            await engine.unload("dogs")


async def test_a_model_whose_deployment_r_is_too_large_for_the_new_version_is_not_replaced() -> None:
    loader = FakeLoader()
    async with loading(FakeDevice(), loader) as engine:
        await engine.configure({"tiny": 8}, None)
        with pytest.raises(InvalidError):
            await engine.load("tiny", "2")
        assert engine.catalog()["tiny"] == TINY and (await ask(engine)).schedule == (8, 8, 8)
        await until(lambda: loader.freed == [TINY_2])
        await engine.configure({"tiny": 3}, None)
        await engine.load("tiny", "2")
        assert (await ask(engine)).schedule == (3, 3, 3)


async def test_loads_take_turns() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    async with loading(FakeDevice(), loader) as engine:
        both = [asyncio.create_task(engine.load(name)) for name in ("cats", "tiny")]
        await until(lambda: len(loader.loads) == 1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert loader.loads == [(CATS, 0)]
        loader.gate.set()
        await asyncio.gather(*both)
        assert {info.revision for info in engine.catalog().values()} == {"c1", "t2"}


async def test_a_load_goes_on_though_its_caller_has_left() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    async with loading(FakeDevice(), loader) as engine:
        coming = asyncio.create_task(engine.load("cats"))
        await until(lambda: len(loader.loads) == 1)
        coming.cancel()
        await asyncio.wait([coming])
        loader.gate.set()
        await until(lambda: "cats" in engine.catalog())


async def test_the_deployments_r_of_a_model_that_comes_back_is_the_one_that_it_had(tmp_path: Path) -> None:
    loader = FakeLoader()
    async with loading(FakeDevice(), loader, state_file=tmp_path / "config.json") as engine:
        await engine.load("cats")
        assert (await engine.configuration()).models == {"tiny": 0, "cats": 0}
        await engine.configure({"cats": 5}, None)
        await engine.unload("cats")
        assert (await engine.configuration()).models == {"tiny": 0}
        with pytest.raises(NotFoundError):
            await engine.configure({"cats": 3}, None)
        await until(lambda: loader.freed == [CATS])
        await engine.load("cats")
        assert (await ask(engine, "cats")).schedule == (5, 5, 5)
        assert loader.loads[-1] == (CATS, 5), "it was warmed for that r"


async def test_a_model_that_goes_answers_with_the_r_that_it_had() -> None:
    async with loading(FakeDevice(), FakeLoader(), r=4, linger_s=DAY_S) as engine:
        await engine.unload("tiny")
        assert (await ask(engine, revision="t1")).schedule == (4, 4, 4)


async def test_auto_goes_by_what_is_known_of_each_version() -> None:
    loader = FakeLoader()
    loader.steps = [Rung((0, 0, 0), 0.0, 1.0, 1.0), Rung((4, 4, 4), 0.0, 0.5, 0.9)]
    loader.curve = fake_curve(rows=(curve_row(0, 1.0, (0.0, 1.0)), curve_row(4, 0.9, (0.0, 0.5))))
    device = FakeDevice()
    async with loading(device, loader, linger_s=DAY_S) as engine:
        old: Sequence[Any] = [await engine.answer(classify(r=AutoR()))]
        await engine.load("tiny", "2")
        device.gate.clear()
        waiting = [
            asyncio.ensure_future(ask(engine, revision=revision, r=AutoR(), pixels=bytes([n])))
            for n, revision in enumerate(["t2", "t2", "t1", "t2", "t1"])
        ]
        await until(lambda: len(device.batches) == 2)
        device.gate.set()
        answers = await asyncio.gather(*waiting)
        assert [len(items) for key, items in device.batches[1:] if key.revision == "t1"] in ([2], [1, 1])
        assert all(answer.auto is not None for answer in [*old, *answers])
        assert [row.agreement for row in (await engine.curve("tiny")).rows] == [1.0, 0.9]
        await engine.unload("tiny")
        with pytest.raises(NotFoundError):
            await engine.curve("tiny")


async def test_what_came_and_went_is_kept() -> None:
    kept = FakeKept()
    async with loading(FakeDevice(), FakeLoader(), kept=kept) as engine:
        await engine.load("cats")
        await engine.load("tiny", "2")
        assert kept == {"cats": "1", "tiny": "2"}
        await engine.unload("cats")
        assert kept == {"cats": None, "tiny": "2"}


async def test_an_engine_follows_what_another_one_has_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FOLLOW_S", 0.001)
    kept, loader = FakeKept(cats="1"), FakeLoader()
    told: list[list[str]] = []
    async with loading(FakeDevice(), loader, kept=kept) as engine:
        engine.on_catalog(lambda: told.append(list(engine.catalog())))
        await until(lambda: list(engine.catalog()) == ["tiny", "cats"])  # kept while this one started
        assert told == [["tiny", "cats"]]
        kept["tiny"] = "2"
        await until(lambda: engine.catalog()["tiny"].version == "2")
        kept["cats"] = None
        await until(lambda: list(engine.catalog()) == ["tiny"])
        kept["dogs"] = "1"  # which nobody finds here
        kept["cats"] = "1"
        await until(lambda: list(engine.catalog()) == ["tiny", "cats"])
        assert (await ask(engine, "cats")).results
        assert kept.calls == []  # to keep again what it follows would undo a later change


async def test_an_engine_that_ends_waits_for_no_load() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    async with loading(FakeDevice(), loader) as engine:
        coming = asyncio.create_task(engine.load("cats"))
        await until(lambda: len(loader.loads) == 1)
        await engine.close()
        with pytest.raises(asyncio.CancelledError):
            await coming


async def test_an_engine_without_a_loader_keeps_its_models() -> None:
    engine = local_engine(FakeDevice())
    for change in (engine.load("cats"), engine.unload("tiny")):
        with pytest.raises(ConflictError, match="loads and unloads no models"):
            await change
    assert await engine.repository() == [ModelState("tiny", "1", "READY")]


def test_every_other_model_has_another_key() -> None:
    infos: list[ModelInfo] = [TINY, TINY_2, CATS]
    assert len({info.batch_key((0, 0, 0)) for info in infos}) == 3
