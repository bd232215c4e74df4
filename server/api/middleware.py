"""The outermost middleware: ids, and limits on a body that apply while it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.access_log import PROBES, AccessLog
from server.api.compression import Inflater, inflater_of
from server.api.patience import Sender, client_of
from server.errors import ClientGoneError, QueueFullError, TooLargeError, TooSlowError, UnsupportedError, shown
from server.tracing.context import CURRENT, RequestContext, caller_of, request_id_of

if TYPE_CHECKING:
    from server.tracing.provider import Tracing


_ASGI = {"version": "3.0", "spec_version": "2.4"}
"""With this version Starlette does not read the body while it sends a file, to learn whether the client leaves.

Data for a client that has left is dropped. An error of the body would come after the answer has begun.
"""

SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
"""Headers of every answer, for browsers: no type guessing, no frames, no Referer."""

_NOT_KEPT = (b"cache-control", b"no-store")
"""For answers that do not set it: they change, and may need a key. Caches never keep an answer to a POST."""

LARGEST_BODIES = 8
"""Most bodies of the largest size in memory."""

LEAST_BYTES_PER_S = 1024
"""Least average speed of a body."""


class Front:
    """Wraps every request of this process. One layer does all of it, because each layer costs each request time.

    It gives the request an id (the client's own if it is valid) and returns it as `x-request-id`, with the common
    headers. It guards bodies while they arrive: their length, their speed, the memory of all of them, and that they are
    not compressed. For protocols whose clients compress, it inflates bodies here, so that the limits apply to the
    result. It sets the context for all work on the request, and writes the log line and span when the request is
    answered.

    Args:
        app: The wrapped application.
        max_bytes: Most bytes of a body. A longer one is refused; at once if its length is announced.
        client_timeout_s: Longest time without data. A few bytes do not extend it.
        inflates: Whether the bodies of a path may be compressed.
        access_log: Gets a line a request; None for no lines.
        tracing: Makes spans; None for none.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        client_timeout_s: float,
        inflates: Callable[[str], bool] = lambda path: False,
        access_log: AccessLog | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._app, self._inflates, self._access_log, self._tracing = app, inflates, access_log, tracing
        self.max_bytes, self.client_timeout_s = max_bytes, client_timeout_s
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        borne = announced = encoding = traceparent = tracestate = None
        for name, value in scope["headers"]:
            if name == b"content-length" and announced is None:
                announced = value
            elif name == b"x-request-id" and borne is None:
                borne = value
            elif name == b"content-encoding" and value.lower() != b"identity":
                encoding = value
            elif name == b"traceparent" and traceparent is None:
                traceparent = value
            elif name == b"tracestate":
                tracestate = value if tracestate is None else tracestate + b"," + value
        scope["asgi"] = _ASGI
        context = RequestContext(request_id_of(borne and borne.decode("latin-1")))
        request_id = context.request_id.encode()
        scope.setdefault("state", {})["request_id"] = context.request_id
        if traceparent is not None:
            context.caller = caller_of(traceparent.decode("latin-1"), tracestate and tracestate.decode("latin-1"))
        if self._tracing is not None and _path(scope) not in PROBES:
            context.span = self._tracing.serve(scope["method"], context.caller, _asked(scope, context))
        start: Message | None = None

        async def named(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                headers = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
                if scope["method"] != "POST" and all(name != b"cache-control" for name, _ in headers):
                    headers.append(_NOT_KEPT)
                message["headers"] = [*headers, *SAFE, (b"x-request-id", request_id)]
            await send(message)

        inflater = None
        if encoding is not None and self._inflates(_path(scope)):
            inflater = inflater_of(encoding.decode("latin-1"))
        body = _Body(receive, self, announced, encoding, inflater, client_of(scope))
        token = CURRENT.set(context)
        try:
            await self._app(scope, body.receive, named)
        except Exception as error:
            if context.span is not None:
                context.span.fail(error)
            raise
        finally:
            self.held -= body.received
            CURRENT.reset(token)
            if self._access_log is not None:
                _note(self._access_log, scope, start, body.age_s, context)
            if context.span is not None:
                status = 500 if start is None else start["status"]
                context.span.end(*_answered(scope, status), is_our_fault=status >= 500)


def _path(scope: Scope) -> str:
    """The path, independent of where the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _asked(scope: Scope, context: RequestContext) -> dict[str, str]:
    """The attributes of a span when its request arrives."""
    asked = {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "url.scheme": scope["scheme"],
        "tome.request_id": context.request_id,
    }
    client = scope.get("client")
    return {**asked, "client.address": client[0]} if client else asked


def _answered(scope: Scope, status: int) -> tuple[str, dict[str, str | int]]:
    """The name of a request's span, and its attributes when the request is answered."""
    route = getattr(scope.get("route"), "path", None)
    answered: dict[str, str | int] = {"http.response.status_code": status}
    if route is None:
        return scope["method"], answered  # an unknown path may be anything, and span names must be few
    return f"{scope['method']} {route}", {**answered, "http.route": route}


def _note(access_log: AccessLog, scope: Scope, start: Message | None, took_s: float, context: RequestContext) -> None:
    """Logs a request.

    Args:
        access_log: The log.
        scope: The request.
        start: The start of its answer; None if it failed before.
        took_s: Seconds from its head to the end of its answer.
        context: Its ids.
    """
    size = r = None
    if start is not None:
        for name, value in start["headers"]:
            if name == b"content-length":
                size = int(value)
            elif name == b"x-r":
                r = value.decode("latin-1")
    client, raw_path = scope.get("client"), scope.get("raw_path")
    access_log.note(
        scope["method"],
        scope["path"] if raw_path is None else raw_path.decode("latin-1"),
        500 if start is None else start["status"],
        took_s,
        context,
        size=size,
        r=r,
        client=client[0] if client else None,
    )


class _Body:
    """A body while it arrives.

    Args:
        receive: Gives its pieces.
        limits: The limits, and the memory of all bodies.
        announced: Its length, as its client says.
        encoding: Its Content-Encoding, if it has one.
        inflater: Inflates it. A body with an encoding and no inflater is refused.
        client: The sender, if it is known.
    """

    __slots__ = (
        "_began_at",
        "_client",
        "_encoding",
        "_inflater",
        "_is_complete",
        "_is_too_long",
        "_limits",
        "_receive",
        "received",
    )

    def __init__(
        self,
        receive: Receive,
        limits: Front,
        announced: bytes | None,
        encoding: bytes | None,
        inflater: Inflater | None,
        client: Sender | None,
    ) -> None:
        self._receive, self._limits, self._encoding, self._client = receive, limits, encoding, client
        self._inflater = inflater
        self._began_at = asyncio.get_running_loop().time()
        self._is_too_long = announced is not None and announced.isdigit() and int(announced[:20]) > limits.max_bytes
        self._is_complete = False
        self.received = 0

    @property
    def age_s(self) -> float:
        """Seconds since its request arrived."""
        return asyncio.get_running_loop().time() - self._began_at

    async def receive(self) -> Message:
        """The next piece, as an ASGI message; after the last piece, the client's disconnect."""
        if self._is_complete:
            return await self._receive()  # waits as long as necessary
        if self._is_too_long:
            raise self._too_large()  # before the server asks for it with 100 Continue
        if self._encoding is not None and self._inflater is None:
            raise UnsupportedError(
                f"Content-Encoding is {shown(self._encoding.decode('latin-1'))}; send the body without one"
            )
        if self._client is not None and self._client.has_sent_all:
            message = await self._receive()  # returns at once
        else:
            message = await self._patiently(self._began_at + self.received / LEAST_BYTES_PER_S)
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client hung up before its body was complete")
        self._is_complete = not message.get("more_body", False)
        if self._inflater is not None:
            message = await self._inflated(message, self._inflater)
        size, limits = len(message.get("body", b"")), self._limits
        self.received += size
        limits.held += size
        if self.received > limits.max_bytes:
            raise self._too_large()
        if limits.held > LARGEST_BODIES * limits.max_bytes:
            raise QueueFullError(
                f"requests hold {limits.held} bytes; at most {LARGEST_BODIES * limits.max_bytes} may be held at once",
                retry_after_s=1,
            )
        return message

    async def _inflated(self, message: Message, inflater: Inflater) -> Message:
        """Inflates a piece. In a thread, because a small piece may inflate to many bytes."""
        most = self._limits.max_bytes - self.received + 1
        body = await asyncio.to_thread(inflater.feed, message.get("body", b""), most, self._is_complete)
        return {**message, "body": body}

    def _too_large(self) -> TooLargeError:
        most = self._limits.max_bytes
        return TooLargeError(f"the body is larger than {most} bytes", max_body_bytes=most)

    async def _patiently(self, due: float) -> Message:
        """The next piece. `due` is when, on the loop's clock, the bytes so far had to arrive."""
        now, timeout_s = asyncio.get_running_loop().time(), self._limits.client_timeout_s
        try:
            async with asyncio.timeout_at(min(now, due) + timeout_s):
                return await self._receive()
        except TimeoutError:
            raise TooSlowError(
                f"the body stopped arriving for {timeout_s:g} s, or arrives at less than {LEAST_BYTES_PER_S} bytes/s"
            ) from None
