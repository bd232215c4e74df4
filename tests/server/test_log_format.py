"""The log as lines of JSON."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from server.log_format import Format, arrange
from server.repeats import WINDOW_S, CountingHandler
from server.tracing.context import CURRENT, RequestContext
from tests.server.conftest import serving


class Log:
    """A logger of its own, on a clock that a test moves."""

    def __init__(self, form: Format) -> None:
        self.now = 0.0
        self.stream = io.StringIO()
        handler = CountingHandler(self.stream, lambda: self.now)
        arrange(handler, form)
        self.logger = logging.Logger("test")
        self.logger.addHandler(handler)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def request_context() -> Iterator[RequestContext]:
    """The context of a request that this test serves."""
    context = RequestContext("mine", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    token = CURRENT.set(context)
    yield context
    CURRENT.reset(token)


def test_a_record_is_an_object_on_one_line() -> None:
    log = Log("json")
    log.logger.warning('two\nlines and a "quote" of %s', "whom")
    (line,) = log.lines
    assert line.pop("time").endswith("Z") and line.pop("process")
    assert line == {"level": "warning", "logger": "test", "message": 'two\nlines and a "quote" of whom'}


def test_a_path_that_is_no_utf8_is_written_with_escapes() -> None:
    log = Log("json")
    log.logger.warning("%s is gone", "caf\udce9")
    (line,) = log.lines
    assert line["message"] == "caf\\udce9 is gone"


def test_a_traceback_is_a_field() -> None:
    log = Log("json")
    try:
        raise ValueError("broken")
    except ValueError:
        log.logger.exception("it failed")
    (line,) = log.lines
    assert line["message"] == "it failed" and line["exception"].splitlines()[-1] == "ValueError: broken"


def test_a_record_of_a_request_names_it_and_a_count_of_repetitions_does_not(request_context: RequestContext) -> None:
    log = Log("json")
    for _ in range(3):
        log.logger.warning("again")
    log.now = WINDOW_S
    log.logger.warning("else")
    first, counted, _ = log.lines
    assert (first["request_id"], first["trace_id"]) == ("mine", "0af7651916cd43dd8448eb211c80319c")
    assert counted["message"].startswith("again (2 times more") and "request_id" not in counted


def test_text_is_as_ever() -> None:
    log = Log("text")
    log.logger.warning("plain")
    assert log.stream.getvalue().endswith(" WARNING MainProcess: plain\n")


async def test_what_breaks_is_logged_under_the_id_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("broken")

    log = Log("json")
    (handler,) = log.logger.handlers
    logging.getLogger().addHandler(handler)
    async with serving() as service:
        monkeypatch.setattr("server.batching.engine.LocalEngine.catalog", fail)
        response = await service.client.get("/v1/models", headers={"x-request-id": "mine"})
        assert response.status_code == 500
    (line,) = [line for line in log.lines if line["level"] == "error"]
    assert "RuntimeError: broken" in line["exception"] and "mine" in line["message"]
