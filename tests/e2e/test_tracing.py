"""Spans of a real server, as a collector on the loopback gets them; and that there is nothing of it without a wish."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.e2e.service import StartService

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
SHOWS_IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}
"""Has Python write a line for each import, in every process of the service."""
SDK = ("opentelemetry.sdk", "opentelemetry.exporter", "server.tracing.provider")


class Collector:
    """Takes spans by OTLP over HTTP, and keeps them.

    Attributes:
        posts: Path and content type of each request.
        spans: Each span with the name of the process that sent it.
    """

    def __init__(self) -> None:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(self.path, str(self.headers["content-type"]), self.headers["content-encoding"], body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.posts: list[tuple[str, str]] = []
        self.spans: list[tuple[str, Span]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, path: str, content_type: str, encoding: str | None, body: bytes) -> None:
        """Reads one request."""
        self.posts.append((path, content_type))
        message = ExportTraceServiceRequest.FromString(gzip.decompress(body) if encoding == "gzip" else body)
        for resource in message.resource_spans:
            named = {each.key: each.value.string_value for each in resource.resource.attributes}
            assert named["service.name"] == "tome-server"
            self.spans += [(named["tome.process"], span) for scope in resource.scope_spans for span in scope.spans]

    def one(self, name: str) -> tuple[str, Span]:
        """The only span of a name, and who sent it."""
        (found,) = [(process, span) for process, span in self.spans if span.name == name]
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that ends with the test."""
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def environment(url: str | None, **variables: str) -> dict[str, str]:
    """Variables of a service that sends its spans to a URL, or to none, whatever these tests were started by."""
    asked = {} if url is None else {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
    blank = {name: "" for name in os.environ if name.startswith("OTEL_")}
    return {**blank, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **asked, **variables}


def facts(span: Span) -> dict[str, Any]:
    """Attributes of a span that are ours."""
    return {
        each.key: each.value.string_value or each.value.int_value
        for each in span.attributes
        if each.key.startswith("tome.")
    }


def test_a_request_is_one_trace_through_both_processes_and_the_last_spans_leave_at_sigterm(
    start_service: StartService, collector: Collector, photo: bytes
) -> None:
    service = start_service("--r", "3", environment=environment(collector.url) | SHOWS_IMPORTS, preloaded=False)
    headers = {"content-type": "image/jpeg", "x-request-id": "mine", **CALLER}
    answer = httpx.post(f"{service.url}/classify", content=photo, headers=headers)
    assert answer.status_code == 200
    assert httpx.post(f"{service.url}/v1/classify", content=b"garbage", headers=CALLER).status_code == 415
    assert service.stop() == 0  # sooner than spans leave by themselves

    assert set(collector.posts) == {("/v1/traces", "application/x-protobuf")}
    process, server = collector.one("POST /classify")
    assert process == "http-0" and server.kind == Span.SPAN_KIND_SERVER
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, PARENT)
    tokens = answer.json()["tokens"]
    used = {"tome.model": "tome-vit-tiny-64", "tome.r": "3", "tome.tokens": tokens, "tome.batch_size": 1}
    assert facts(server) == used | {"tome.images": 1, "tome.request_id": "mine"}
    children = {
        span.name: (process, span) for process, span in collector.spans if span.parent_span_id == server.span_id
    }
    assert {name: process for name, (process, _) in children.items()} == {
        "reading": "http-0",
        "decoding": "http-0",
        "queue": "engine",
        "answer": "engine",
    }
    assert {span.trace_id.hex() for _, span in children.values()} == {TRACE}
    process, batch = collector.one("batch")
    assert process == "engine" and not batch.parent_span_id and batch.trace_id != server.trace_id
    assert [(link.trace_id, link.span_id) for link in batch.links] == [(server.trace_id, server.span_id)]
    assert facts(batch) == used | {"tome.operation": "forward"}
    _, refused = collector.one("POST /v1/classify")
    assert [event.name for event in refused.events] == ["exception"]
    assert refused.status.code == Status.STATUS_CODE_UNSET
    assert all(name in "".join(service.log) for name in SDK)  # the check of the next test can fail


def test_nothing_is_imported_and_nothing_sent_unless_it_is_asked_for(
    start_service: StartService, collector: Collector, photo: bytes
) -> None:
    """The variables here ask for it and then do not; where there are none, `traces_endpoint` gives the same."""
    variables = environment(collector.url, OTEL_SDK_DISABLED="true") | SHOWS_IMPORTS
    service = start_service("--log-format", "json", environment=variables, preloaded=False)
    headers = {"content-type": "image/jpeg", "x-request-id": "mine", **CALLER}
    assert httpx.post(f"{service.url}/classify", content=photo, headers=headers).status_code == 200
    assert service.stop() == 0
    assert not collector.posts
    log = "".join(service.log)
    assert "import time:" in log and not any(name in log for name in SDK)
    lines = [json.loads(line) for line in service.log if not line.startswith("import time:")]
    (line,) = [line for line in lines if line.get("path") == "/classify"]
    assert (line["request_id"], line["trace_id"], line["status"]) == ("mine", TRACE, 200)


def test_a_collector_that_never_answers_stops_neither_answers_nor_the_end(
    start_service: StartService, photo: bytes
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # the kernel takes connections, and nobody reads
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        service = start_service(environment=environment(url, OTEL_BSP_SCHEDULE_DELAY="50"))
        for _ in range(5):
            answer = httpx.post(f"{service.url}/classify", content=photo, headers={"content-type": "image/jpeg"})
            assert answer.status_code == 200
        assert service.stop() == 0


def test_a_wrong_variable_is_told_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--state-dir", str(tmp_path), "--port", "0"]
    variables = {**os.environ, **environment("collector:4317")}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("tome-server: OTEL_EXPORTER_OTLP_ENDPOINT is 'collector:4317'; it must begin with")
