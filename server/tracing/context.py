"""The request of the present task: its id and its trace, for log lines, spans and the engine."""

from __future__ import annotations

import random
import re
from contextvars import ContextVar
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from server.tracing.server_span import ServerSpan

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LONGEST_STATE = 512
"""A longer `tracestate` is dropped; the specification requires this much."""


class RequestContext(Struct):
    """A request that is being served.

    Attributes:
        request_id: Its id.
        caller: The client's span: a `traceparent`, and after a blank the `tracestate` if there is one.
        span: Its own span, if this process traces.
    """

    request_id: str
    caller: str | None = None
    span: ServerSpan | None = None

    @property
    def trace(self) -> str | None:
        """The parent span for the work on this request, in the form of `caller`."""
        return self.caller if self.span is None else self.span.trace

    @property
    def trace_id(self) -> str | None:
        """The id of its trace."""
        trace = self.trace
        return None if trace is None else trace[3:35]


def request_id_of(borne: str | None) -> str:
    """The id of a request: the client's if it is valid, else a new one."""
    return borne if borne and _REQUEST_ID.fullmatch(borne) else f"{random.getrandbits(128):032x}"


CURRENT: ContextVar[RequestContext | None] = ContextVar("request", default=None)
"""The context of the running task; None outside a request."""


def current_span() -> ServerSpan | None:
    """The span of the present request; None without tracing."""
    context = CURRENT.get()
    return None if context is None else context.span


def current_trace() -> str | None:
    """The value for `Request.trace`."""
    context = CURRENT.get()
    return None if context is None else context.trace


def caller_of(traceparent: str, tracestate: str | None) -> str | None:
    """The client's span by its headers of W3C Trace Context; None if `traceparent` is invalid, which is then ignored.

    Args:
        traceparent: The client's header.
        tracestate: The client's header; None if there is none.
    """
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None or (found[2] is not None and traceparent.startswith("00")):
        return None
    if not tracestate or len(tracestate) > _LONGEST_STATE:
        return traceparent
    return f"{traceparent} {tracestate}"
