"""The span of a request in the process that serves it, and the stages of that request."""

from __future__ import annotations

import time

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import Attributes

from server.errors import ServerError
from server.tracing.written import trace_of, wall_ns


class ServerSpan:
    """A request that is being served.

    Args:
        tracer: Makes its spans.
        name: The endpoint, as far as it is known.
        parent: The client's span, or an empty context.
        attributes: Known attributes.

    Attributes:
        trace: The span in the form of `Request.trace`.
    """

    __slots__ = ("_context", "_span", "_tracer", "trace")

    def __init__(self, tracer: Tracer, name: str, parent: Context, attributes: Attributes) -> None:
        self._tracer = tracer
        self._span: Span = tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        self._context = set_span_in_context(self._span, Context())
        self.trace = trace_of(self._span.get_span_context())

    def stage(self, name: str, since: float, error: Exception | None = None, attributes: Attributes = None) -> None:
        """Records a stage that has just ended.

        Args:
            name: Its name.
            since: When it began, in seconds of `time.monotonic()`.
            error: The error that ended it.
            attributes: More attributes.
        """
        if self._span.is_recording():
            stage = self._tracer.start_span(name, self._context, attributes=attributes, start_time=wall_ns(since))
            if error is not None:
                fail(stage, error)
            stage.end()

    def tell(self, attributes: Attributes) -> None:
        """Adds attributes."""
        if attributes:
            self._span.set_attributes(attributes)

    def fail(self, error: BaseException) -> None:
        """Records why the request failed."""
        _note(self._span, error)

    def end(self, name: str | None = None, attributes: Attributes = None, *, is_our_fault: bool = False) -> None:
        """Ends the span.

        Args:
            name: The endpoint.
            attributes: More attributes.
            is_our_fault: The answer is an error of the server.
        """
        if name is not None:
            self._span.update_name(name)
        self.tell(attributes)
        if is_our_fault:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(time.time_ns())


def fail(span: Span, error: BaseException) -> None:
    """Records the error that ended a span."""
    _note(span, error)
    span.set_status(Status(StatusCode.ERROR, str(error)))


def _note(span: Span, error: BaseException) -> None:
    span.record_exception(error)
    span.set_attribute("error.type", error.code if isinstance(error, ServerError) else type(error).__qualname__)
