"""Spans and times outside OpenTelemetry: `Request.trace`, and seconds of the monotonic clock."""

from __future__ import annotations

import time

from opentelemetry.context import Context
from opentelemetry.trace import SpanContext
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_propagator = TraceContextTextMapPropagator()


def context_of(trace: str | None) -> Context:
    """The context of a span in the form of `Request.trace`; without one, that of a new trace."""
    if trace is None:
        return Context()
    traceparent, _, tracestate = trace.partition(" ")
    return _propagator.extract({"traceparent": traceparent, "tracestate": tracestate}, Context())


def trace_of(span: SpanContext) -> str:
    """A span in the form of `Request.trace`."""
    traceparent = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags & 1:02x}"
    return f"{traceparent} {span.trace_state.to_header()}" if span.trace_state else traceparent


def wall_ns(moment: float) -> int:
    """A time of `time.monotonic()` as wall-clock nanoseconds."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)
