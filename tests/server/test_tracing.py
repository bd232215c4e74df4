"""The spans of requests and batches, as OpenTelemetry's own exporter for tests gets them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, StatusCode

from server.api.access_log import AccessLog
from server.api.calls import Calls
from server.errors import NotFoundError, SettingsError
from server.tracing.context import caller_of, current_trace
from server.tracing.provider import Tracing
from server.tracing.start import start_tracing, traces_endpoint
from tests.server.conftest import Service, grey_png, model_info, serving, until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=7"}
PNG = {"content-type": "image/png"}


@dataclass
class Traced:
    """A service whose spans are kept."""

    service: Service
    exporter: InMemorySpanExporter

    async def ask(self, path: str = "/classify", **options: Any) -> int:
        """Posts one image; gives the status."""
        headers = {**PNG, **options.pop("headers", {})}
        response = await self.service.client.post(path, content=grey_png(), headers=headers, **options)
        await asyncio.sleep(0)  # the engine notes its spans in the turn of the loop after the answer
        return response.status_code

    def named(self, name: str) -> list[ReadableSpan]:
        """The spans of a name that have ended."""
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        """The only one."""
        (span,) = self.named(name)
        return span


@asynccontextmanager
async def traced(**options: Any) -> AsyncIterator[Traced]:
    """A service with spans of both processes."""
    exporter = InMemorySpanExporter()
    processor = SimpleSpanProcessor(exporter)
    engine = Tracing(processor, "engine", follows=True)
    spans = engine.of_engine({"tiny": model_info()})
    async with serving(tracing=Tracing(processor, "http-0"), spans=spans, **options) as service:
        yield Traced(service, exporter)


def context(span: ReadableSpan) -> SpanContext:
    """Who a span is."""
    found = span.get_span_context()
    assert found is not None
    return found


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """Its attributes that are ours."""
    return {name: value for name, value in (span.attributes or {}).items() if name.startswith("tome.")}


async def test_a_request_continues_the_trace_of_its_client_through_all_stages() -> None:
    async with traced(r=4) as it:
        assert await it.ask(headers={**CALLER, "x-request-id": "mine"}) == 200
        server = it.one("POST /classify")
        assert server.kind == SpanKind.SERVER and server.parent is not None
        assert f"{context(server).trace_id:032x}" == TRACE and f"{server.parent.span_id:016x}" == PARENT
        for name in ("reading", "decoding", "queue", "answer"):
            child = it.one(name)
            assert child.parent is not None and child.parent.span_id == context(server).span_id
            assert f"{context(child).trace_id:032x}" == TRACE
            assert context(child).trace_state.to_header() == "vendor=7"


async def test_the_stages_follow_each_other_within_the_request() -> None:
    async with traced() as it:
        await it.ask()
        stages = [it.one(name) for name in ("reading", "decoding", "queue", "answer")]
        slack_ns = 1_000_000  # the clock of the wall and the monotonic one are read one after the other
        times = [(span.start_time or 0, span.end_time or 0) for span in (it.one("POST /classify"), *stages)]
        (began, ended), *inner = times
        for (_, before), (after, _) in zip(inner, inner[1:], strict=False):
            assert after >= before - slack_ns
        assert all(began - slack_ns <= start <= end <= ended + slack_ns for start, end in inner)


async def test_spans_tell_how_it_was_answered() -> None:
    async with traced() as it:
        assert await it.ask(params={"r": "4"}, headers={"x-request-id": "mine"}) == 200
        tokens = model_info().token_counts((4, 4, 4))[-1]
        facts = {"tome.model": "tiny", "tome.r": "4", "tome.tokens": tokens, "tome.batch_size": 1}
        server = it.one("POST /classify")
        assert attributes(server) == facts | {"tome.images": 1, "tome.request_id": "mine"}
        assert server.attributes is not None and server.attributes["http.response.status_code"] == 200
        assert server.attributes["http.route"] == "/classify"
        assert attributes(it.one("answer")) == facts | {"tome.images": 1, "tome.operation": "forward"}
        assert attributes(it.one("batch")) == facts | {"tome.operation": "forward"}
        assert {span.resource.attributes["service.name"] for span in it.exporter.get_finished_spans()} == {
            "tome-server"
        }


async def test_a_batch_is_a_trace_of_its_own_with_a_link_to_each_of_its_requests() -> None:
    async with traced() as it:
        it.service.device.gate.clear()
        first = asyncio.create_task(it.ask())
        await until(lambda: len(it.service.device.batches) == 1)
        others = [asyncio.create_task(it.ask(headers=CALLER)) for _ in range(3)]
        batcher = it.service.app.state.service.engine._batcher
        await until(lambda: batcher.num_waiting == 3)
        it.service.device.gate.set()
        assert await asyncio.gather(first, *others) == [200] * 4
        batches = it.named("batch")
        linked = [{link.context.span_id for link in batch.links} for batch in batches]
        assert [batch.parent for batch in batches] == [None] * len(batches)
        assert set().union(*linked) == {context(span).span_id for span in it.named("POST /classify")}
        assert sorted(map(len, linked)) == [1, 3]
        assert not {context(batch).trace_id for batch in batches} & {context(it.named("queue")[0]).trace_id}


async def test_a_request_of_several_images_has_a_span_for_each_that_is_decoded() -> None:
    async with traced() as it:
        files = [("image", (f"{index}.png", grey_png(index))) for index in range(3)]
        assert (await it.service.client.post("/classify", files=files)).status_code == 200
        await until(lambda: len(it.named("answer")) == 1)
        assert sorted(attributes(span)["tome.image"] for span in it.named("decoding")) == [0, 1, 2]
        (batch,) = it.named("batch")
        assert len(batch.links) == 1 and attributes(batch)["tome.batch_size"] == 3


async def test_an_error_of_the_client_is_recorded_where_it_happened_and_is_no_fault_of_ours() -> None:
    async with traced() as it:
        response = await it.service.client.post("/classify", content=b"garbage", headers=PNG)
        assert response.status_code == 415
        server, decoding = it.one("POST /classify"), it.one("decoding")
        assert decoding.status.status_code == StatusCode.ERROR
        assert server.status.status_code == StatusCode.UNSET
        assert server.attributes is not None and server.attributes["error.type"] == "unsupported_format"
        assert [event.name for event in server.events] == ["exception"]


async def test_a_batch_that_fails_is_an_error_of_the_batch_and_of_its_request() -> None:
    async with traced() as it:
        it.service.device.failure = ValueError("broken weights")
        assert await it.ask() == 500
        assert it.one("POST /classify").status.status_code == StatusCode.ERROR
        assert it.one("batch").status.status_code == StatusCode.ERROR
        assert it.one("queue").status.status_code == StatusCode.ERROR
        assert not it.named("answer")


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("GET", "/v1/models/tiny", "GET /v1/models/{name}"),
        ("GET", "/nowhere/at/all", "GET"),
        ("PUT", "/nowhere", "PUT"),
    ],
)
async def test_a_span_is_named_by_its_route_so_that_names_are_few(method: str, path: str, name: str) -> None:
    async with traced() as it:
        await it.service.client.request(method, path)
        assert it.one(name).kind == SpanKind.SERVER


async def test_a_client_that_does_not_record_has_no_spans_and_nor_have_probes() -> None:
    async with traced() as it:
        assert await it.ask(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}) == 200
        assert (await it.service.client.get("/livez")).status_code == 200
        assert (await it.service.client.get("/readyz")).status_code == 200
        assert (await it.service.client.get("/metrics")).status_code == 200
        assert it.exporter.get_finished_spans() == ()


async def test_what_is_no_traceparent_begins_a_new_trace() -> None:
    async with traced() as it:
        assert await it.ask(headers={"traceparent": "00-zero-one-01"}) == 200
        assert it.one("POST /classify").parent is None


GOOD = [
    (f"00-{TRACE}-{PARENT}-01", None, f"00-{TRACE}-{PARENT}-01"),
    (f"00-{TRACE}-{PARENT}-00", "", f"00-{TRACE}-{PARENT}-00"),
    (f"00-{TRACE}-{PARENT}-01", "a=1,b=2", f"00-{TRACE}-{PARENT}-01 a=1,b=2"),
    (f"00-{TRACE}-{PARENT}-01", "a=" + 600 * "1", f"00-{TRACE}-{PARENT}-01"),
    (f"01-{TRACE}-{PARENT}-01-more", None, f"01-{TRACE}-{PARENT}-01-more"),
]


@pytest.mark.parametrize(("traceparent", "tracestate", "expected"), GOOD)
def test_a_traceparent_is_taken_as_it_came(traceparent: str, tracestate: str | None, expected: str) -> None:
    assert caller_of(traceparent, tracestate) == expected


BAD = [
    "",
    TRACE,
    f"ff-{TRACE}-{PARENT}-01",
    f"00-{TRACE.upper()}-{PARENT}-01",
    f"00-{'0' * 32}-{PARENT}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE}-{PARENT}-01-more",
    f"00-{TRACE}-{PARENT}-01\n",
    f"00-{TRACE}-{PARENT}",
]


@pytest.mark.parametrize("traceparent", BAD)
def test_what_is_no_traceparent_is_ignored(traceparent: str) -> None:
    assert caller_of(traceparent, "a=1") is None


ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, None),
        ({ENDPOINT: ""}, None),
        ({ENDPOINT: "http://a:4318"}, "http://a:4318/v1/traces"),
        ({ENDPOINT: "http://a:4318/"}, "http://a:4318/v1/traces"),
        ({ENDPOINT: "http://a", TRACES: "https://b/of/traces"}, "https://b/of/traces"),
        ({ENDPOINT: "http://a", "OTEL_SDK_DISABLED": "True"}, None),
        ({ENDPOINT: "http://a", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SERVICE_NAME": "mine"}, None),
    ],
)
def test_spans_are_sent_where_a_variable_says_so(variables: dict[str, str], url: str | None) -> None:
    assert traces_endpoint(variables) == url


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({ENDPOINT: "collector:4317"}, "OTEL_EXPORTER_OTLP_ENDPOINT is 'collector:4317'; it must begin with http://"),
        ({ENDPOINT: "http://a", "OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin'"),
        ({ENDPOINT: "http://a", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"),
    ],
)
def test_a_wrong_variable_stops_the_start_by_name(variables: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=f"^{named}"):
        traces_endpoint(variables)


def test_a_missing_package_stops_the_start_and_the_sentence_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.tracing.start._NEEDED", ("opentelemetry.not_there.at_all",))
    with pytest.raises(SettingsError, match=r"pip install 'tome-server\[otel\]'"):
        traces_endpoint({ENDPOINT: "http://a"})


def test_nothing_is_started_where_nothing_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENDPOINT, TRACES):
        monkeypatch.delenv(name, raising=False)
    assert start_tracing("http-0") is None


@pytest.mark.parametrize(("variables", "name"), [({}, "tome-server"), ({"OTEL_SERVICE_NAME": "mine"}, "mine")])
def test_the_service_is_named_as_the_variable_says(
    variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_RESOURCE_ATTRIBUTES", raising=False)
    for variable, text in variables.items():
        monkeypatch.setenv(variable, text)
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter), "http-3")
    tracing.serve("GET", None, {}).end()
    (span,) = exporter.get_finished_spans()
    assert (span.resource.attributes["service.name"], span.resource.attributes["tome.process"]) == (name, "http-3")


async def test_a_call_that_is_no_http_has_a_span_a_line_and_a_context_too() -> None:
    exporter, lines = InMemorySpanExporter(), list[str]()
    calls = Calls(AccessLog(lines.append, "json"), Tracing(SimpleSpanProcessor(exporter), "http-0"))
    with calls.note("grpc", "/inference.Service/ModelInfer", {**CALLER, "x-request-id": "mine"}, "10.0.0.1") as call:
        trace = current_trace()
        call.r = "8"
    assert current_trace() is None
    (span,) = exporter.get_finished_spans()
    assert span.name == "inference.Service/ModelInfer" and span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT
    assert trace == f"00-{TRACE}-{context(span).span_id:016x}-01 vendor=7"
    await asyncio.sleep(0)
    line = json.loads("".join(lines))
    assert line["message"] == "GRPC /inference.Service/ModelInfer 200"
    assert (line["r"], line["request_id"], line["trace_id"], line["client"]) == ("8", "mine", TRACE, "10.0.0.1")


@pytest.mark.parametrize(("error", "status"), [(NotFoundError("no such model"), 404), (ValueError("broken"), 500)])
async def test_a_call_that_fails_has_the_status_of_its_error(error: Exception, status: int) -> None:
    exporter, lines = InMemorySpanExporter(), list[str]()
    calls = Calls(AccessLog(lines.append, "json"), Tracing(SimpleSpanProcessor(exporter), "http-0"))
    with pytest.raises(type(error)), calls.note("grpc", "/a/b", {}):
        raise error
    with calls.note("grpc", "/a/b", {}) as call:  # one that is turned into an answer
        call.error = error
    with pytest.raises(RuntimeError), calls.note("grpc", "/a/b", {}) as call:  # and as gRPC turns it
        call.error = error
        raise RuntimeError("aborted")
    await asyncio.sleep(0)
    assert [json.loads(line)["status"] for line in "".join(lines).splitlines()] == [status] * 3
    failed = StatusCode.ERROR if status == 500 else StatusCode.UNSET
    spans = exporter.get_finished_spans()
    assert [span.status.status_code for span in spans] == [failed] * 3 and all(span.events for span in spans)


async def test_a_call_that_is_withdrawn_is_no_success() -> None:
    lines = list[str]()
    calls = Calls(AccessLog(lines.append, "json"))
    with pytest.raises(asyncio.CancelledError), calls.note("grpc", "/a/b", {}):
        raise asyncio.CancelledError
    await asyncio.sleep(0)
    assert json.loads("".join(lines))["status"] == 499


async def test_a_call_that_is_a_probe_has_neither() -> None:
    exporter, lines = InMemorySpanExporter(), list[str]()
    calls = Calls(AccessLog(lines.append, "json"), Tracing(SimpleSpanProcessor(exporter), "http-0"))
    with calls.note("grpc", "/a/ServerLive", {}, is_probe=True):
        pass
    await asyncio.sleep(0)
    assert not lines and not exporter.get_finished_spans()
