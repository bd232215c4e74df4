"""The line of the log that each request has."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server.api.access_log import PROBES, AccessLog
from server.log_format import Format
from server.tracing.context import RequestContext
from tests.server.conftest import Service, grey_png, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PNG = {"content-type": "image/png"}
NOW_NS = 1_790_000_000_123_456_789


class Log:
    """What an access log writes, and how often."""

    def __init__(self, form: Format = "text", has_probes: bool = False) -> None:
        self.writes: list[str] = []
        self.access = AccessLog(self.writes.append, form, has_probes, clock=lambda: NOW_NS)

    @property
    def lines(self) -> list[str]:
        return "".join(self.writes).splitlines()

    @property
    def line(self) -> dict[str, Any]:
        """The only line, of JSON."""
        (line,) = self.lines
        said: dict[str, Any] = json.loads(line)
        return said


@asynccontextmanager
async def logged(form: Format = "text", has_probes: bool = False, **options: Any) -> AsyncIterator[tuple[Service, Log]]:
    """A service, and the log of its requests."""
    log = Log(form, has_probes)
    async with serving(access_log=log.access, **options) as service:
        yield service, log
        await asyncio.sleep(0)


async def answered(service: Service, method: str, path: str, **options: Any) -> int:
    """Asks, and has the line of the answer written: in the turn of the loop after it."""
    response = await service.client.request(method, path, **options)
    await asyncio.sleep(0)
    return response.status_code


async def test_a_line_of_text_tells_what_was_asked_and_how_it_was_answered() -> None:
    async with logged() as (service, log):
        response = await service.client.post(
            "/classify", params={"r": "4"}, content=grey_png(), headers={**PNG, "x-request-id": "mine"}
        )
        await asyncio.sleep(0)
        (line,) = log.lines
        assert re.fullmatch(
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,123 INFO \S+: 127\.0\.0\.1 POST /classify 200 "
            rf"{len(response.content)} bytes [\d.]+ ms r=4 request=mine",
            line,
        )


async def test_a_line_of_json_has_the_same_in_fields_and_the_trace_of_the_client() -> None:
    async with logged("json", r=2) as (service, log):
        headers = {**PNG, "x-request-id": "mine", "traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert await answered(service, "POST", "/classify", content=grey_png(), headers=headers) == 200
        line = log.line
        assert line.pop("ms") > 0 and line.pop("bytes") > 100 and line.pop("process")
        assert line == {
            "time": "2026-09-21T14:13:20.123Z",
            "level": "info",
            "message": "POST /classify 200",
            "method": "POST",
            "path": "/classify",
            "status": 200,
            "r": "2",
            "request_id": "mine",
            "trace_id": TRACE,
            "client": "127.0.0.1",
        }


@pytest.mark.parametrize("form", ["text", "json"])
async def test_neither_query_nor_key_is_in_the_log(form: Format) -> None:
    async with logged(form, api_key="hush") as (service, log):
        for headers in ({"authorization": "Bearer hush"}, {"x-api-key": "hush"}, {"x-api-key": "hush-wrong"}):
            await answered(service, "GET", "/v1/models?key=hush&api_key=hush", headers=headers)
        assert len(log.lines) == 3 and "hush" not in "".join(log.lines)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/models/none", 404), ("GET", "/nowhere", 404), ("PUT", "/classify", 405), ("POST", "/classify", 415)],
)
async def test_refusals_have_a_line_too(method: str, path: str, status: int) -> None:
    async with logged("json") as (service, log):
        assert await answered(service, method, path) == status
        assert (log.line["status"], log.line["message"]) == (status, f"{method} {path} {status}")


async def test_what_breaks_has_a_line_with_500(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("broken")

    async with logged("json") as (service, log):
        monkeypatch.setattr("server.batching.engine.LocalEngine.catalog", fail)
        assert await answered(service, "GET", "/v1/models") == 500
        assert log.line["status"] == 500


@pytest.mark.parametrize("path", sorted(PROBES))
async def test_a_probe_has_a_line_at_debug_alone(path: str) -> None:
    async with logged("json") as (service, log):
        await answered(service, "GET", path)
        assert not log.lines
    async with logged("json", has_probes=True) as (service, log):
        await answered(service, "GET", path)
        assert (log.line["level"], log.line["path"]) == ("debug", path)


async def test_a_service_without_an_access_log_answers_the_same() -> None:
    async with serving() as service:
        assert await answered(service, "GET", "/v1/models") == 200


def note(log: Log, path: str = "/classify", client: str | None = "10.0.0.1") -> None:
    """Notes a request."""
    log.access.note("POST", path, 200, 0.0123, RequestContext("id"), size=12, r="8", client=client)


async def test_lines_of_one_turn_of_the_loop_leave_in_one_write() -> None:
    log = Log()
    for _ in range(5):
        note(log)
    assert not log.writes
    await asyncio.sleep(0)
    assert len(log.writes) == 1 and len(log.lines) == 5
    note(log)
    await asyncio.sleep(0)
    assert len(log.writes) == 2 and len(log.lines) == 6


@pytest.mark.parametrize("form", ["text", "json"])
async def test_what_a_client_sends_cannot_make_lines_or_fields(form: Format) -> None:
    log = Log(form)
    note(log, "/a b\n2026 INFO forged: \x1b[31m\xff" + "x" * 1000, "10.0.0.1 request=forged\n")
    await asyncio.sleep(0)
    (line,) = log.lines
    assert line.isascii() and line.isprintable() and len(line) < 700
    assert "/a%20b%0A2026" in line and "10.0.0.1%20request=forged%0A" in line


async def test_a_path_stays_as_it_came() -> None:
    log = Log("json")
    note(log, "/v2/models/a%20b/infer", None)
    await asyncio.sleep(0)
    assert log.line["path"] == "/v2/models/a%20b/infer" and "client" not in log.line
