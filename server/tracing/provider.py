"""The tracing of one process. It uses its own provider, never OpenTelemetry's global one."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.util.types import Attributes

from server import __version__
from server.tracing.engine_spans import EngineSpans
from server.tracing.server_span import ServerSpan
from server.tracing.written import context_of
from server.types import ModelInfo

_FLUSH_S = 3.0
"""Longest wait for a collector at the end of a process."""


class Tracing:
    """The spans of one process.

    Args:
        processor: Gets the spans that have ended.
        process: The name of the process.
        follows: Records exactly the children of recorded requests. Otherwise OTEL_TRACES_SAMPLER decides for each
            request.

    Attributes:
        tracer: Makes spans.
    """

    def __init__(self, processor: SpanProcessor, process: str, *, follows: bool = False) -> None:
        self._provider = TracerProvider(
            sampler=ALWAYS_ON if follows else None, resource=_resource(process), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer("tome_server", __version__)

    def serve(self, name: str, caller: str | None, attributes: Attributes) -> ServerSpan:
        """Begins the span of a request.

        Args:
            name: The endpoint, as far as it is known.
            caller: The client's span, as `RequestContext.caller`.
            attributes: Known attributes.
        """
        return ServerSpan(self.tracer, name, context_of(caller), attributes)

    def of_engine(self, models: Mapping[str, ModelInfo]) -> EngineSpans:
        """The observer of an engine that serves these models."""
        return EngineSpans(self.tracer, models)

    def close(self) -> None:
        """Sends the remaining spans, but waits at most `_FLUSH_S` for the collector."""
        closing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(_FLUSH_S)


def sending_to(endpoint: str) -> SpanProcessor:
    """Sends spans to a collector on a thread of its own; other OTEL_* variables configure it."""
    return BatchSpanProcessor(OTLPSpanExporter(endpoint))


def _resource(process: str) -> Resource:
    resource = Resource.create({SERVICE_VERSION: __version__, "tome.process": process})
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):  # no variable names the service
        resource = resource.merge(Resource({SERVICE_NAME: "tome-server"}))
    return resource
