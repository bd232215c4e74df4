"""Pages of other origins: with --cors-origin they may ask and read; without it nothing tells browsers so."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.errors import SettingsError
from server.settings_sources import load_settings
from tests.server.conftest import Service, assert_is_error, grey_png, serving
from tests.server.test_access import ROUTES

OURS, OTHER = "https://app.example.org", "https://evil.example.org"
IMAGE = {"content-type": "image/png"}


def allowed(response: httpx.Response) -> str | None:
    origin: str | None = response.headers.get("access-control-allow-origin")
    return origin


async def preflight(service: Service, origin: str, method: str, path: str) -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "x-api-key, content-type, if-match",
    }
    return await service.client.options(
        path.replace("{name}", "tiny").replace("{path:path}", "app.css"), headers=headers
    )


async def test_a_preflight_of_every_route_is_answered_without_a_key() -> None:
    async with serving(cors_origin=[OURS], api_key="secret") as service:
        for method, path in ROUTES:
            response = await preflight(service, OURS, method, path)
            assert (response.status_code, allowed(response)) == (200, OURS)
            assert method in response.headers["access-control-allow-methods"]
            assert "x-api-key" in response.headers["access-control-allow-headers"]
            assert "access-control-allow-credentials" not in response.headers
            assert response.headers["x-request-id"] and response.headers["x-content-type-options"] == "nosniff"


async def test_an_answer_may_be_read_and_its_headers_too() -> None:
    async with serving(cors_origin=[OURS], api_key="secret") as service:
        headers = {**IMAGE, "origin": OURS, "x-api-key": "secret"}
        response = await service.client.post("/classify", content=grey_png(), headers=headers)
        assert (response.status_code, allowed(response)) == (200, OURS)
        assert "Origin" in response.headers["vary"]
        exposed = response.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "x-r", "etag", "server-timing", "retry-after"} <= set(exposed)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ({"headers": IMAGE}, 401),
        ({"headers": {**IMAGE, "x-api-key": "secret"}, "content": b"x"}, 415),
        ({"url": "/no"}, 404),
    ],
)
async def test_an_error_may_be_read_as_well(said: dict[str, Any], status: int) -> None:
    async with serving(cors_origin=[OURS], api_key="secret") as service:
        asked = {"method": "POST", "url": "/classify"} | said
        asked["headers"] = {"origin": OURS} | asked.get("headers", {})
        response = await service.client.request(**asked)
        assert (response.status_code, allowed(response)) == (status, OURS)


async def test_another_origin_is_told_nothing() -> None:
    async with serving(cors_origin=[OURS, "http://localhost:3000"]) as service:
        assert_is = [await preflight(service, OTHER, "POST", "/classify")]
        assert assert_is[0].status_code == 400
        assert_is.append(await service.client.get("/v1/models", headers={"origin": OTHER}))
        assert [allowed(response) for response in assert_is] == [None, None]
        assert allowed(await service.client.get("/v1/models", headers={"origin": "http://localhost:3000"})) is not None


async def test_a_star_lets_all_ask() -> None:
    async with serving(cors_origin=["*"]) as service:
        assert allowed(await service.client.get("/v1/models", headers={"origin": OTHER})) == "*"


async def test_without_the_setting_there_is_none_of_it() -> None:
    async with serving() as service:
        refused = await preflight(service, OURS, "POST", "/classify")
        assert_is_error(refused, 405, "method_not_allowed")
        assert (refused.headers["allow"], allowed(refused)) == ("POST", None)
        assert allowed(await service.client.get("/v1/models", headers={"origin": OURS})) is None
        assert "CORSMiddleware" not in str(service.app.user_middleware)  # which would cost each request


def test_origins_come_from_flags_a_variable_and_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    both = ("https://app.example.org", "http://localhost:3000")
    assert load_settings({"cors_origin": list(both)}).cors_origin == both
    monkeypatch.setenv("TOME_CORS_ORIGIN", "https://App.example.org http://localhost:3000")
    assert load_settings({}).cors_origin == both
    monkeypatch.delenv("TOME_CORS_ORIGIN")
    (tmp_path / "settings.yaml").write_text(f"cors-origin: [{', '.join(both)}]")
    assert load_settings({}, str(tmp_path / "settings.yaml")).cors_origin == both


@pytest.mark.parametrize(
    "origin", ["app.example.org", "https://a.org/", "https://a.org/path", "null", "https://*.a.org", ""]
)
def test_what_is_no_origin_stops_the_start(origin: str) -> None:
    with pytest.raises(SettingsError, match="cors_origin: .* not an origin; write SCHEME"):
        load_settings({"cors_origin": [origin]})
