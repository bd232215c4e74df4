"""Who may ask what: every endpoint, for nobody and the bearer of each key, under every setting of keys."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.errors import ConflictError
from tests.server.conftest import Service, assert_is_error, fake_curve, grey_png, model_info, serving
from tests.server.fake_loader import FakeLoader

KEYS: dict[str, Any] = {"api_key": "user-key", "admin_key": "admin-key", "metrics_key": "metrics-key"}
SETTINGS: list[dict[str, Any]] = [
    {name: KEYS[name] for name in names}
    for count in range(len(KEYS) + 1)
    for names in itertools.combinations(KEYS, count)
]

# Each route of our own, and who may ask it. Other protocols have tests of their own.
ROUTES = {
    ("GET", "/"): "all",
    ("GET", "/static/{path:path}"): "all",
    ("GET", "/docs"): "all",
    ("GET", "/openapi.json"): "all",
    ("GET", "/livez"): "all",
    ("GET", "/readyz"): "all",
    ("GET", "/healthz"): "all",
    ("GET", "/metrics"): "scrapers",
    ("POST", "/classify"): "users",
    ("POST", "/v1/classify"): "users",
    ("POST", "/v1/explain"): "users",
    ("GET", "/v1/models"): "users",
    ("GET", "/v1/models/{name}"): "users",
    ("GET", "/v1/models/{name}/curve"): "users",
    ("GET", "/v1/config"): "users",
    ("PATCH", "/v1/models/{name}"): "admins",
    ("PATCH", "/v1/config"): "admins",
    ("POST", "/v2/repository/index"): "users",
    ("POST", "/v2/repository/models/{name}/load"): "admins",
    ("POST", "/v2/repository/models/{name}/unload"): "admins",
}

# What nobody, the user, the admin and the scraper get, where the key of the user and that of the admin are set.
ALL = "200 200 200 200"
ANSWERS = {
    "all": dict.fromkeys([(0, 0), (1, 0), (0, 1), (1, 1)], ALL),
    "users": {(0, 0): ALL, (1, 0): "401 200 401 401", (0, 1): ALL, (1, 1): "401 200 200 401"},
    "admins": {(0, 0): ALL, (1, 0): "401 200 401 401", (0, 1): "403 403 200 403", (1, 1): "401 403 200 401"},
}
# The same of /metrics, where its key is set; it is open where that is not.
SCRAPES = {(0, 0): "401 401 401 200", (1, 0): "401 200 401 200", (0, 1): "401 401 200 200", (1, 1): "401 200 200 200"}


def expected(kind: str, keys: dict[str, str]) -> list[int]:
    """The statuses for nobody, the user, the admin and the scraper."""
    place = (int("api_key" in keys), int("admin_key" in keys))
    if kind == "scrapers":
        row = SCRAPES[place] if "metrics_key" in keys else ALL
    else:
        row = ANSWERS[kind][place]
    return [int(status) for status in row.split()]


def routes_of(service: Service) -> Iterator[tuple[str, str]]:
    for route in service.app.state.routes:
        yield from ((method, route.path) for method in route.methods)


async def ask(service: Service, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    """A good request to a route."""
    url = path.replace("{name}", "tiny").replace("{path:path}", "app.css")
    said: dict[str, Any] = {}
    if path.endswith("/unload"):
        with contextlib.suppress(ConflictError):  # an engine whose models neither come nor go
            await service.app.state.service.engine.load("tiny")
    elif path.startswith("/v2/repository"):
        pass
    elif method == "POST":
        said = {"files": [("image", ("a.png", grey_png()))]}
    elif method == "PATCH":
        said = {"json": {"r": 1} if "{name}" in path else {"models": {"tiny": {"r": 1}}}}
    return await service.client.request(method, url, headers=headers, **said)


async def test_every_route_has_a_row() -> None:
    async with serving(protocol="none") as service:
        assert sorted(routes_of(service)) == sorted(ROUTES)
        known = {path for _, path in ROUTES}
        other = [getattr(route, "path", None) for route in service.app.routes]  # what FastAPI adds by itself
        assert {path for path in other if path is not None} <= known


@pytest.mark.parametrize("keys", SETTINGS, ids=[" ".join(keys) or "no key" for keys in SETTINGS])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "x-api-key"])
async def test_keys_open_what_they_should(keys: dict[str, Any], scheme: str) -> None:
    async with serving(curve=fake_curve(), loader=FakeLoader([model_info()]), protocol="none", **keys) as service:
        for (method, path), kind in ROUTES.items():
            for key, status in zip([None, *KEYS.values()], expected(kind, keys), strict=True):
                headers: dict[str, str] = {}
                if key is not None:
                    headers = {"x-api-key": key} if scheme == "x-api-key" else {"authorization": f"{scheme} {key}"}
                response = await ask(service, method, path, headers)
                assert response.status_code == status, (method, path, key)
                if status >= 400:
                    message = assert_is_error(response, status, "unauthorized" if status == 401 else "forbidden")
                    assert "key" in message and not any(key in message for key in KEYS.values())
                assert ("www-authenticate" in response.headers) == (status == 401)


WRONG = [
    {"x-api-key": "user-ke"},
    {"x-api-key": "user-key2"},
    {"x-api-key": "USER-KEY"},
    {"x-api-key": "metrics-key"},
    {"authorization": "user-key"},
    {"authorization": "Token user-key"},
    {"authorization": "Basic dXNlcjp1c2VyLWtleQ=="},
    {"authorization": "Bearer "},
    {"x-api-key": "wrong", "authorization": "Bearer user-key"},
    {"cookie": "x-api-key=user-key"},
    {"x_api_key": "user-key"},
]


@pytest.mark.parametrize("headers", WRONG, ids=str)
async def test_what_is_no_key_opens_nothing(headers: dict[str, str]) -> None:
    async with serving(**KEYS) as service:
        for path in ("/v1/models", "/v1/models?api_key=user-key", "/v1/models?x-api-key=user-key"):
            assert_is_error(await service.client.get(path, headers=headers), 401, "unauthorized")


async def test_a_key_of_other_bytes_is_a_wrong_one() -> None:
    async with serving(**KEYS) as service:
        headers = {b"x-api-key": b"user-key\xe9"}
        assert_is_error(await service.client.get("/v1/models", headers=headers), 401, "unauthorized")
