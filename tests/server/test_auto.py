"""`r=auto` through the service: chosen by the load, told why, bounded, and the deployment's if it is set so."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from server.batching.engine import LocalEngine
from server.batching.policy import Rung
from server.dial import AutoR
from tests.server.conftest import (
    FakeDevice,
    Service,
    assert_is_error,
    class_of_grey,
    grey_png,
    local_engine,
    model_info,
    serving,
    until,
)

STEPS = [Rung((0, 0, 0), 0.0, 1.0, 1.0), Rung((4, 4, 4), 0.0, 0.5, 0.96), Rung((8, 8, 8), 0.0, 0.1, 0.9)]
"""Seconds an image: with a deadline of some seconds a few images are a load."""


async def auto(service: Service, grey: int = 100, **parameters: Any) -> dict[str, Any]:
    body: dict[str, Any] = (await service.classify(grey_png(grey), **({"r": "auto"} | parameters))).json()
    return body


async def many(service: Service, count: int, *, first_r: Any = 1, **parameters: Any) -> list[dict[str, Any]]:
    """Images that arrive while the device is busy with one, and so wait together; the answer to that comes last."""
    engine = service.app.state.service.engine
    assert isinstance(engine, LocalEngine)
    service.device.gate.clear()
    before = len(service.device.batches)
    first = asyncio.create_task(auto(service, 0, r=first_r))
    await until(lambda: len(service.device.batches) > before)
    tasks = [asyncio.create_task(auto(service, grey, **parameters)) for grey in range(1, count + 1)]
    await until(lambda: engine._batcher.num_waiting == count)
    service.device.gate.set()
    return await asyncio.gather(*tasks, first)


async def test_an_idle_server_answers_at_r_0() -> None:
    async with serving(steps=STEPS) as service:
        body = await auto(service)
        assert (body["r"], body["r_source"], body["tokens"]) == (0, "request", 17)
        assert body["auto"] == {"reason": "idle", "expected_agreement": 1.0}
        assert body["results"][0]["top_k"][0]["index"] == class_of_grey(100)


async def test_a_load_turns_the_dial_and_the_answer_says_so() -> None:
    async with serving(steps=STEPS) as service:
        *bodies, _ = await many(service, 8, deadline_ms=5000)  # 8 s of work at r=0, and 4 s at r=4
        assert {body["r"] for body in bodies} == {8}
        for grey, body in enumerate(bodies, start=1):
            assert body["auto"] == {"reason": "load", "expected_agreement": 0.9}
            assert body["results"][0]["top_k"][0]["index"] == class_of_grey(grey, (8, 8, 8))


async def test_bounds_are_kept_under_any_load() -> None:
    async with serving(steps=STEPS) as service:
        for bounds in ({"max_r": 5}, {"min_agreement": 0.95}):
            *bodies, _ = await many(service, 8, deadline_ms=5000, **bounds)
            assert {(body["r"], body["auto"]["reason"]) for body in bodies} == {(4, "bounds")}
        *bodies, _ = await many(service, 8, deadline_ms=9000, max_r=0)
        assert {body["r"] for body in bodies} == {0}


async def test_the_reason_is_that_of_the_moment_when_it_was_chosen() -> None:
    async with serving(steps=STEPS) as service:
        *bodies, first = await many(service, 8, first_r="auto", deadline_ms=5000)
        assert {(body["r"], body["auto"]["reason"]) for body in bodies} == {(8, "load")}
        # It is answered when the dial has been turned, and was chosen when there was nothing else.
        assert (first["r"], first["auto"]) == (0, {"reason": "idle", "expected_agreement": 1.0})


async def test_an_image_that_fills_up_a_batch_says_so() -> None:
    async with serving(steps=STEPS) as service:
        engine = service.app.state.service.engine
        service.device.gate.clear()
        before = len(service.device.batches)
        first = asyncio.create_task(auto(service, 0, r=1))
        await until(lambda: len(service.device.batches) > before)
        fixed = [asyncio.create_task(auto(service, grey, r=4)) for grey in (1, 2, 3)]
        await until(lambda: engine._batcher.num_waiting == 3)
        shares = asyncio.create_task(auto(service, 4))
        await until(lambda: engine._batcher.num_waiting == 4)
        service.device.gate.set()
        body = await shares
        assert (body["r"], body["auto"]) == (4, {"reason": "shared", "expected_agreement": 0.96})
        assert [each["auto"] for each in await asyncio.gather(first, *fixed)] == [None] * 4


async def test_images_of_one_request_share_one_r() -> None:
    async with serving(steps=STEPS) as service:
        files = [("image", (f"{grey}.png", grey_png(grey), "image/png")) for grey in (1, 2, 3)]
        response = await service.client.post("/classify?r=auto", files=files)
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["auto"]["reason"] in ("idle", "load") and len(body["results"]) == 3
        assert {key.schedule for key, _ in service.device.batches} == {(body["r"],) * 3}


async def test_the_deployment_can_be_auto(tmp_path: Path) -> None:
    state_file = tmp_path / "config.json"
    async with serving(steps=STEPS, state_file=state_file) as service:
        change = {"r": "auto", "min_agreement": 0.95}
        patched = (await service.client.patch("/v1/models/tiny", json=change)).json()
        assert (patched["r"], patched["auto"]) == ("auto", {"max_r": None, "min_agreement": 0.95})
        body = (await service.classify(grey_png())).json()
        assert (body["r"], body["r_source"], body["auto"]["reason"]) == (0, "deployment", "idle")
        assert (await service.classify(grey_png(), r=3)).json()["auto"] is None  # an explicit r is never changed
        listed = (await service.client.get("/v1/models")).json()["models"][0]
        assert (listed["r"], listed["auto"]["min_agreement"]) == ("auto", 0.95)
    async with serving(steps=STEPS, state_file=state_file) as service:  # it outlives a restart
        assert (await service.client.get("/v1/models/tiny")).json()["auto"]["min_agreement"] == 0.95
        back = (await service.client.patch("/v1/models/tiny", json={"r": 2})).json()
        assert (back["r"], back["auto"]) == (2, None)


async def test_wrong_bounds_of_a_deployment_change_nothing() -> None:
    async with serving(steps=STEPS) as service:
        for change in ({"r": "auto", "max_r": -1}, {"r": 3, "max_r": 3}, {"r": "auto", "inflect": 1.0}):
            assert_is_error(await service.client.patch("/v1/models/tiny", json=change), 422, "invalid_parameter")
        assert (await service.client.get("/v1/models/tiny")).json()["r"] == 0


async def test_without_a_ladder_auto_is_r_0() -> None:
    async with serving() as service:
        *bodies, _ = await many(service, 20, deadline_ms=5000)
        assert {body["r"] for body in bodies} == {0}


async def test_an_engine_that_starts_with_auto_serves() -> None:
    engine = local_engine(FakeDevice(), [model_info()], r=AutoR(max_r=4), steps={"tiny": STEPS})
    engine.start()
    try:
        assert (await engine.configuration()).models["tiny"] == AutoR(max_r=4)
    finally:
        await engine.close()
