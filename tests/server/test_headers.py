"""What every answer tells browsers and caches."""

from __future__ import annotations

import dataclasses
from typing import Any

import httpx
import pytest

from tests.server.conftest import fake_curve, grey_png, serving
from tests.server.test_access import ROUTES, ask


def assert_safe(response: httpx.Response) -> None:
    told = response.headers.multi_items()
    for name, value in {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
    }.items():
        assert [each for each in told if each[0] == name] == [(name, value)]
    assert len([name for name, _ in told if name == "x-request-id"]) == 1
    if response.headers.get("content-type", "").startswith("text/html"):
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


def assert_kept_by_no_cache(response: httpx.Response, *, but_asked_again: bool) -> None:
    if response.request.method != "POST":  # of which no cache keeps an answer anyway
        assert response.headers["cache-control"] == ("no-cache" if but_asked_again else "no-store")


@pytest.mark.parametrize("keys", [{}, {"api_key": "secret"}], ids=["open", "keys"])
async def test_every_route_says_how_it_may_be_used(keys: dict[str, Any]) -> None:
    async with serving(curve=fake_curve(), protocol="none", **keys) as service:
        for method, path in ROUTES:
            response = await ask(service, method, path, {})
            assert_safe(response)
            is_file = path in ("/", "/docs", "/static/{path:path}")
            assert_kept_by_no_cache(response, but_asked_again=is_file)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/static/nothing.js", 404),
        ("GET", "/classify", 405),
        ("HEAD", "/livez", 200),
        ("POST", "/classify", 415),
        ("POST", "/classify/", 307),
        ("PATCH", "/v1/config", 400),
        ("GET", "/v1/models/none", 404),
    ],
)
async def test_so_does_every_error(method: str, path: str, status: int) -> None:
    async with serving() as service:
        response = await service.client.request(method, path)
        assert response.status_code == status
        assert_safe(response)
        assert_kept_by_no_cache(response, but_asked_again=False)


async def test_so_does_an_error_that_nobody_foresaw() -> None:
    async with serving() as service:
        service.app.state.service = dataclasses.replace(service.app.state.service, admission=None)
        for path in ("/classify", "/v1/explain"):
            response = await service.client.post(path, content=grey_png(), headers={"content-type": "image/png"})
            assert response.status_code == 500
            assert_safe(response)


async def test_what_has_not_changed_is_answered_so_too() -> None:
    async with serving() as service:
        etag = (await service.client.get("/docs")).headers["etag"]
        unchanged = await service.client.get("/docs", headers={"if-none-match": etag})
        assert unchanged.status_code == 304
        assert_safe(unchanged)
