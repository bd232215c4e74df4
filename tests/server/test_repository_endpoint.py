"""`/v2/repository`: what Triton's client sends, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import EngineError
from tests.server.conftest import FakeDevice, assert_is_error, grey_png, serving
from tests.server.fake_loader import CATS, TINY, FakeLoader, loading

LOADS: list[Any] = [
    {"content": b"{}"},  # as Triton's client sends it, without a content type
    {"content": b""},
    {"json": {"parameters": {}}},
    {"json": {"parameters": {"version": "1"}}},
    {"json": {"parameters": {"version": 1}}},
    {"json": {"parameters": None}},
]


@pytest.mark.parametrize("body", LOADS, ids=str)
async def test_a_model_is_loaded_asked_and_unloaded(body: Any) -> None:
    loader, device = FakeLoader(), FakeDevice()
    async with loading(device, loader) as engine, serving(engine=engine) as service:
        loaded = await service.client.post("/v2/repository/models/cats/load", **body)
        assert (loaded.status_code, loaded.json()) == (200, {})
        answer = await service.classify(grey_png(), model="cats")
        assert answer.json()["model"] == "cats" and device.batches[-1][0].revision == CATS.revision
        listed = (await service.client.get("/v1/models")).json()["models"]
        assert [(each["name"], each["version"], each["is_default"]) for each in listed] == [
            ("tiny", "1", True),
            ("cats", "1", False),
        ]
        said = {"parameters": {"unload_dependents": False}}
        unloaded = await service.client.post("/v2/repository/models/cats/unload", json=said)
        assert (unloaded.status_code, unloaded.json()) == (200, {})
        assert_is_error(await service.classify(grey_png(), model="cats", status=404), 404, "not_found")


async def test_the_index_says_what_is_there() -> None:
    loader = FakeLoader()
    loader.failure = EngineError("cats gives numbers that are none")
    async with loading(FakeDevice(), loader) as engine, serving(engine=engine) as service:
        failed = await service.client.post("/v2/repository/models/cats/load", content=b"{}")
        assert failed.status_code == 500
        message = failed.json()["error"]  # as Triton's client wants it
        index = await service.client.post("/v2/repository/index")
        tiny = {"name": "tiny", "version": "1", "state": "READY", "reason": ""}
        assert (index.status_code, index.json()) == (
            200,
            [
                tiny,
                {"name": "tiny", "version": "2", "state": "UNAVAILABLE", "reason": ""},
                {"name": "cats", "version": "1", "state": "UNAVAILABLE", "reason": message},
            ],
        )
        assert (await service.client.post("/v2/repository/index", json={"ready": True})).json() == [tiny]


async def test_when_the_last_model_is_gone_requests_are_told_so_and_the_server_is_ready() -> None:
    async with loading(FakeDevice(), FakeLoader()) as engine, serving(engine=engine) as service:
        await service.client.post("/v2/repository/models/tiny/unload")
        for response in (
            await service.classify(grey_png(), status=404),
            await service.client.get("/v1/models/tiny"),
        ):
            assert "no model is loaded; POST /v2/repository/models/NAME/load" in assert_is_error(
                response, 404, "not_found"
            )
        assert (await service.client.get("/v1/models")).json() == {"models": [], "data": [], "object": "list"}
        assert (await service.client.get("/readyz")).json() == {"status": "ready", "models": []}
        await service.client.post("/v2/repository/models/tiny/load")
        assert (await service.classify(grey_png())).json()["model"] == "tiny"


REFUSED: list[tuple[str, Any, int, str]] = [
    ("models/dogs/load", {}, 404, "there is no model 'dogs' to load"),
    ("models/dogs/unload", {}, 404, "there is no model 'dogs'"),
    ("models/tiny/load", {"parameters": {"version": "9"}}, 422, "has no version 9"),
    ("models/tiny/load", {"parameters": {"version": True}}, 422, "version is True"),
    ("models/tiny/load", {"parameters": {"version": [1]}}, 422, "version is"),
    ("models/tiny/load", {"parameters": {"version": "\udcff"}}, 422, "version is '\\udcff'"),
    ("models/tiny/load", {"parameters": {"config": "{}"}}, 422, "no parameter 'config' here; there are: version"),
    ("models/tiny/load", {"parameters": [1]}, 422, "it must be an object"),
    ("models/tiny/load", {"version": "2"}, 422, "no field 'version' here; the only one is parameters"),
    ("models/tiny/unload", {"parameters": {"version": "1"}}, 422, "there are: unload_dependents"),
    ("models/tiny/load", [1], 400, "JSON object"),
    ("index", {"ready": "yes"}, 422, "ready is 'yes'; it must be true or false"),
    ("index", {"read": True}, 422, "no field 'read' of an index"),
]


@pytest.mark.parametrize(("path", "body", "status", "said"), REFUSED)
async def test_what_cannot_be_done_is_refused_and_changes_nothing(path: str, body: Any, status: int, said: str) -> None:
    loader = FakeLoader()
    async with loading(FakeDevice(), loader) as engine, serving(engine=engine) as service:
        response = await service.client.post(f"/v2/repository/{path}", json=body)
        assert response.status_code == status and said in response.json()["error"]
        assert list(engine.catalog().values()) == [TINY] and not loader.loads


async def test_without_a_loader_models_stay() -> None:
    async with serving(protocol="none") as service:  # with the native errors where that protocol is off
        response = await service.client.post("/v2/repository/models/tiny/load", content=b"{}")
        assert "deploy it again" in assert_is_error(response, 409, "conflict")
