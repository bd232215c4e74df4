"""The short way to an endpoint answers as FastAPI's own way does: keys, errors, headers, and what is not its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import httpx
import pytest
from fastapi import APIRouter

from server.api.app import create_app
from server.api.body import CONTENT_TYPES
from server.api.direct import Direct
from server.settings import Settings
from tests.server.conftest import Service, grey_png, serving

KEY, ADMIN = "user-key", "admin-key"
IMAGE = {"content-type": "image/png", "x-request-id": "mine"}

CASES: dict[str, dict[str, Any]] = {
    "an answer": {"headers": IMAGE},
    "the admin": {"headers": {**IMAGE, "authorization": f"Bearer {ADMIN}"}},
    "no key": {"headers": {**IMAGE, "x-api-key": ""}},
    "a wrong key": {"headers": {**IMAGE, "x-api-key": "wrong"}},
    "versioned": {"url": "/v1/classify", "headers": IMAGE},
    "a slash more": {"url": "/classify/", "headers": IMAGE},
    "another method": {"method": "GET", "headers": IMAGE},
    "no image": {"headers": {"content-type": "text/plain"}},
    "a wrong parameter": {"headers": IMAGE, "params": {"top_k": 0}},
    "no such model": {"headers": IMAGE, "params": {"model": "none"}},
    "too long": {"headers": IMAGE, "content": bytes(5000)},
    "a form": {"files": {"image": grey_png()}, "content": None},
    "no form": {"headers": {"content-type": "multipart/form-data"}},
}


def answer(response: httpx.Response) -> tuple[Any, ...]:
    """What must not depend on the way."""
    body: Any = response.json() if response.content else None
    if response.status_code == 200:
        body.pop("timings_ms")
    headers = {
        name: value for name, value in response.headers.items() if name not in ("server-timing", "content-length")
    }
    if headers["x-request-id"] != "mine":
        headers["x-request-id"] = f"{len(headers['x-request-id'])} characters"
    return response.status_code, headers, body


async def ask(service: Service, case: dict[str, Any]) -> httpx.Response:
    said = {"method": "POST", "url": "/classify", "content": grey_png()} | case
    said["headers"] = {"x-api-key": KEY} | said.get("headers", {})
    return await service.client.request(**said)


def direct_of(service: Service) -> Direct:
    """The part of the application that knows the short way."""
    part: Any = service.app.middleware_stack
    while not isinstance(part, Direct):
        part = part.app if hasattr(part, "app") else part._app
    return part


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
async def test_both_ways_answer_alike(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(api_key=KEY, admin_key=ADMIN, max_body_bytes=4000) as service:
        short = answer(await ask(service, case))
        monkeypatch.setattr(direct_of(service), "_routes", {})
        assert answer(await ask(service, case)) == short


async def test_an_error_that_nobody_foresaw_is_one_of_ours_on_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(api_key=KEY) as service:
        service.app.state.service = dataclasses.replace(service.app.state.service, admission=None)
        short = answer(await ask(service, {"headers": IMAGE}))
        assert short[0] == 500 and short[1]["x-request-id"] == "mine"
        monkeypatch.setattr(direct_of(service), "_routes", {})
        assert answer(await ask(service, {"headers": IMAGE})) == short


async def test_the_hot_endpoints_go_the_short_way_and_are_described() -> None:
    async with serving() as service:
        await service.client.get("/livez")
        assert direct_of(service)._routes.keys() == {"/classify", "/v1/classify", "/v1/embeddings"}
        described = (await service.client.get("/openapi.json")).json()["paths"]["/classify"]["post"]
        assert described["requestBody"]["content"].keys() == set(CONTENT_TYPES)
        assert {"401", "429", "504"} <= described["responses"].keys()


async def test_what_stands_in_place_of_an_endpoint_is_not_passed_by() -> None:
    instead = APIRouter()

    @instead.post("/classify")
    async def other() -> str:
        return "other"

    async with serving() as service:
        engine = service.app.state.service.engine
        app = create_app(Settings.model_validate({"state_dir": None}), engine, instead=[instead])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.post("/classify")).json() == "other"
