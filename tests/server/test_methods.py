"""HEAD wherever GET is, what a 405 lists, and bodies that are compressed."""

from __future__ import annotations

import gzip
import itertools
import json
from typing import get_args

import pytest

from server.settings import Protocol
from tests.server.conftest import Service, assert_is_error, fake_curve, grey_png, serving
from tests.server.test_access import ROUTES

EVERY_PROTOCOL = get_args(Protocol)
CHANGING = {"date", "x-request-id", "content-length"}


def url_of(path: str) -> str:
    return path.replace("{name}", "tiny").replace("{path:path}", "app.css").replace("{version}", "1")


def gets_of(service: Service) -> list[str]:
    """The path of every GET of the application, whatever its router."""
    return [route.path for route in service.app.state.routes if "GET" in route.methods]


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "secret"}], ids=["no key", "a key"])
@pytest.mark.parametrize("accept", ["text/html", "*/*"])
async def test_head_is_get_without_a_body(headers: dict[str, str], accept: str) -> None:
    async with serving(api_key="secret", curve=fake_curve(), protocol=EVERY_PROTOCOL) as service:
        paths = gets_of(service)
        assert {"/", "/docs", "/static/{path:path}", "/v2", "/v2/models/{name}/config", "/ping", "/health"} <= {*paths}
        for path in [*paths, "/nothing", "/v1/models/none", "/static/nothing.js", "/v2/models/none"]:
            get, head = [
                await service.client.request(method, url_of(path), headers={**headers, "accept": accept})
                for method in ("GET", "HEAD")
            ]
            assert "{" not in url_of(path) and get.status_code in (200, 401, 404), path
            assert (head.status_code, head.content) == (get.status_code, b""), path
            assert "content-length" in head.headers and head.headers.keys() == get.headers.keys(), path
            for name in get.headers.keys() - CHANGING:
                assert head.headers[name] == get.headers[name], (path, name)


@pytest.mark.parametrize("method", ["HEAD", "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "ODD"])
async def test_a_method_that_a_path_does_not_know_is_answered_with_all_that_it_knows(method: str) -> None:
    methods: dict[str, set[str]] = {}
    for known, path in ROUTES:
        methods.setdefault(path, set()).update({known, "HEAD"} if known == "GET" else {known})
    async with serving(protocol="none") as service:
        for path, all_known in itertools.chain(methods.items(), [("/v1/models/none", {"GET", "HEAD", "PATCH"})]):
            if method not in all_known:
                response = await service.client.request(method, url_of(path))
                assert response.status_code == 405
                assert response.headers["allow"] == ", ".join(sorted(all_known)), path
                if method != "HEAD":
                    assert_is_error(response, 405, "method_not_allowed")


JSON = json.dumps({"r": 1}).encode()


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "GZIP", "odd"])
@pytest.mark.parametrize(
    ("method", "path", "content_type", "body"),
    [
        ("POST", "/classify", "image/png", grey_png()),
        ("POST", "/classify", "application/json", b"{}"),
        ("POST", "/classify", "multipart/form-data; boundary=x", b"--x--"),
        ("POST", "/v1/explain", "image/png", grey_png()),
        ("PATCH", "/v1/models/tiny", "application/json", JSON),
        ("PATCH", "/v1/config", "application/json", JSON),
    ],
)
async def test_a_compressed_body_is_refused_by_the_name_of_its_header(
    method: str, path: str, content_type: str, body: bytes, encoding: str
) -> None:
    async with serving() as service:
        headers = {"content-type": content_type, "content-encoding": encoding}
        response = await service.client.request(method, path, content=gzip.compress(body), headers=headers)
        message = assert_is_error(response, 415, "unsupported_format")
        assert "Content-Encoding" in message and encoding in message


@pytest.mark.parametrize("encoding", ["identity", "Identity"])
async def test_a_body_that_is_as_it_is_may_say_so(encoding: str) -> None:
    async with serving() as service:
        headers = {"content-type": "image/png", "content-encoding": encoding}
        assert (await service.client.post("/classify", content=grey_png(), headers=headers)).status_code == 200
