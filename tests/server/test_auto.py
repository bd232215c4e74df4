"""`r=auto` through the service: chosen by the load, told why, bounded, and the deployment's if it is set so."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

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


async def many(service: Service, count: int, **parameters: Any) -> list[dict[str, Any]]:
    """Images that arrive while the device is busy, and so wait together."""
    service.device.gate.clear()
    first = asyncio.create_task(service.classify(grey_png(0), r=1))
    await until(lambda: len(service.device.batches) > 0)
    tasks = [asyncio.create_task(auto(service, grey, **parameters)) for grey in range(1, count + 1)]
    await until(lambda: service.app.state.service.admission.in_flight == count + 1)
    await asyncio.sleep(0.05)  # the last of them goes from admission to the queue
    service.device.gate.set()
    await first
    return await asyncio.gather(*tasks)


async def test_an_idle_server_answers_at_r_0() -> None:
    async with serving(steps=STEPS) as service:
        body = await auto(service)
        assert (body["r"], body["r_source"], body["tokens"]) == (0, "request", 17)
        assert body["auto"] == {"reason": "idle", "expected_agreement": 1.0}
        assert body["results"][0]["top_k"][0]["index"] == class_of_grey(100)


async def test_a_load_turns_the_dial_and_the_answer_says_so() -> None:
    async with serving(steps=STEPS) as service:
        bodies = await many(service, 8, deadline_ms=5000)  # 8 s of work at r=0, and 4 s at r=4
        assert {body["r"] for body in bodies} == {8}
        for grey, body in enumerate(bodies, start=1):
            assert body["auto"] == {"reason": "load", "expected_agreement": 0.9}
            assert body["results"][0]["top_k"][0]["index"] == class_of_grey(grey, (8, 8, 8))


async def test_bounds_are_kept_under_any_load() -> None:
    async with serving(steps=STEPS) as service:
        for bounds in ({"max_r": 5}, {"min_agreement": 0.95}):
            service.device.batches.clear()
            bodies = await many(service, 8, deadline_ms=5000, **bounds)
            assert {(body["r"], body["auto"]["reason"]) for body in bodies} == {(4, "bounds")}
        service.device.batches.clear()
        assert {body["r"] for body in await many(service, 8, deadline_ms=9000, max_r=0)} == {0}


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
        assert {body["r"] for body in await many(service, 20, deadline_ms=5000)} == {0}


async def test_an_engine_that_starts_with_auto_serves() -> None:
    engine = local_engine(FakeDevice(), [model_info()], r=AutoR(max_r=4), steps={"tiny": STEPS})
    engine.start()
    try:
        assert (await engine.configuration()).models["tiny"] == AutoR(max_r=4)
    finally:
        await engine.close()
