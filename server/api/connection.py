"""A client's connection: uvicorn's, with limits on time and memory, all rules of framing, and an orderly end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.departure import Departure
from server.api.framing import fault_of, refusal, without_upgrade
from server.api.middleware import SAFE
from server.api.patience import CLIENT
from server.api.room import Room

_LONGEST_HEAD = 64 << 10
"""Most successive bytes that are not part of a body: heads, chunk headers and trailers."""

_MOST_PIPELINED = 32
"""Most requests of a connection that wait for the one before them."""


class Connection(HttpToolsProtocol):
    """Closes a connection on which no whole head arrives within uvicorn's `timeout_keep_alive`.

    Single bytes do not extend that time. A connection holds at most one body, one head and a few more requests;
    trailers, which nobody reads, are not kept.

    A request to upgrade to another protocol is ignored. A request that cannot be parsed is refused in its turn, and the
    rest of the connection is not parsed. Such an answer ends the connection, and so does every answer that is given
    before its request is complete. The bytes that still arrive are then discarded, at most for the time of a head:
    unread bytes make the kernel reset the connection, and the client may lose its answer.

    Args:
        args: Arguments of uvicorn.
        on_lost: Called when the connection is lost.
        room: The limit that it belongs to; an idle connection may be closed there.
        kwargs: Arguments of uvicorn.
    """

    def __init__(
        self, *args: Any, on_lost: Callable[[], None] = lambda: None, room: Room | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._on_lost = on_lost
        self._idle = (room or Room()).idle
        self._is_in_body = False
        self._head_bytes = 0
        self._keeps_alive = False  # whether the newest request asks to keep the connection
        self._fault: str | None = None  # the fault that a callback of the parser has found
        self._refused: str | None = None  # the refusal to answer after all earlier requests
        self._is_deaf = False
        self._is_ending = False
        self._running: RequestResponseCycle | None = None
        self._tell_gone: Callable[[], None] | None = None
        self._line: _Line | None = None
        self._departure: Departure | None = None
        self._awaited: str | None = None
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._line = _Line(transport, self._hang_up)
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unset_keepalive_if_required()
        self._head_bytes += len(data)
        try:
            self._parse(data)  # resets the count at a part of a body, and at the end of a head or message
        except httptools.HttpParserError as error:
            if isinstance(error, httptools.HttpParserCallbackError):
                self._refuse(self._fault or "the target of the request cannot be parsed")
            else:
                self._refuse(f"the request is not HTTP/1.1: {error}")
        else:
            if self._head_bytes > _LONGEST_HEAD:
                self._refuse("the head of the request is too long")
        self._watch()

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                method, version = self.parser.get_method(), self.parser.get_http_version()
                data = without_upgrade(method, self.url, version, self.headers) + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)  # the old parser stops after `Connection: close`
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's parser

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        method, version = self.parser.get_method(), self.parser.get_http_version()
        self._fault = fault_of(method, version, self.headers)
        if len(self.pipeline) >= _MOST_PIPELINED:
            self._fault = "too many requests wait for their turn"
        if self._fault is not None:
            raise ValueError(self._fault)  # makes httptools stop
        if self.parser.should_upgrade():
            return  # the head is parsed again, without the upgrade
        if version == "1.0":
            self.expect_100_continue = False
        self._head_bytes = 0
        super().on_headers_complete()
        self._is_in_body = True
        self.cycle.transport = self._line  # type: ignore[assignment]  # we close it, in order
        self._keeps_alive, self.cycle.keep_alive = self.cycle.keep_alive, False

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        held: bytes | bytearray = self.cycle.body
        if not held and not self.cycle.response_complete:
            self.cycle.body, body = body, b""  # type: ignore[assignment]  # not copied: uvicorn copies a bytearray twice
        elif isinstance(held, bytes):
            self.cycle.body = bytearray(held)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_in_body:
            return  # a head that is parsed again
        self._is_in_body = False
        self._head_bytes = 0
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keeps_alive
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._refused is not None and not self._is_answering:
            self._answer_refused()
        self._watch()

    @property
    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _refuse(self, fault: str) -> None:
        """Refuses a broken request in its turn, and closes the connection, because the next request's start is
        unknown.
        """
        self.logger.warning("a connection is closed: %s", fault)
        self._is_deaf = True
        self._refused = fault
        if self._is_in_body:
            self._is_in_body = False
            broken = self.cycle
            if broken is self._running:
                if broken.response_started:
                    self._refused = None  # it already has an answer
                broken.disconnected, broken.waiting_for_100_continue = True, False
                broken.message_event.set()
                self._answer_refused()
                return
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._running  # type: ignore[assignment]
        if not self._is_answering:
            self._answer_refused()

    def _answer_refused(self) -> None:
        if self._refused is not None and not self.transport.is_closing():
            self.transport.write(refusal(self._refused, (*self.server_state.default_headers, *SAFE)))
        self._hang_up()

    def _hang_up(self) -> None:
        """Closes the connection. If bytes of the client may be unread, it first gets time to read its answer."""
        self._refused = None
        self.pipeline.clear()
        if not (self._is_in_body or self._is_deaf) or self._departure is not None:
            self.transport.close()
        elif not self._is_ending and not self.transport.is_closing():
            self._is_deaf = self._is_ending = True
            self.transport.write_eof()
            self.flow.resume_reading()
            self._watch()

    def drop(self) -> None:
        """Closes the connection at once."""
        self.transport.abort()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Handles a client that has closed its sending side; returns whether it may still wait for an answer."""
        running = self._running
        if running is None or running.response_complete or self._is_ending or running.scope["http_version"] == "1.0":
            return False
        if self._departure is None:
            self._departure = Departure(self.loop, self.transport)
            if not self._is_deaf and self._is_in_body:
                self._refuse("the request ends before its body does")
            elif not self._is_deaf:
                self._is_deaf, self.cycle.keep_alive = True, False
            if not self.transport.is_closing():
                self._departure.watch(has_begun=running.response_started)
        return not self.transport.is_closing()

    def shutdown(self) -> None:
        self._keeps_alive = False
        super().shutdown()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        cycle.scope["extensions"] = {CLIENT: self}  # type: ignore[dict-item]
        super()._start_asgi_task(cycle, app)

    @property
    def has_sent_all(self) -> bool:
        """Whether the request in progress has arrived completely."""
        return self._running is not None and not self._running.more_body

    def when_gone(self, tell: Callable[[], None] | None) -> None:
        """Sets the function to call when the client has left (soon, if it already has); None calls none."""
        self._tell_gone = tell
        if tell is None or self._running is None:
            return
        self.flow.resume_reading()  # otherwise the end would not be seen
        if self._running.disconnected:
            self.loop.call_soon(self._tell)

    def _tell(self) -> None:
        if self._tell_gone is not None:
            self._tell_gone()

    def connection_lost(self, exc: Exception | None) -> None:
        # uvicorn tells only the newest request that its client has left, and that one may not have begun.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
            self._tell()
        self.pipeline.clear()
        super().connection_lost(exc)
        if self._patience is not None:
            self._patience.cancel()
        if self._departure is not None:
            self._departure.forget()
        self._idle.pop(self, None)
        self._on_lost()

    def _watch(self) -> None:
        """Restarts the timer when the connection waits for something else than before."""
        awaited = None
        if self._is_ending:
            awaited = "end"
        elif self.cycle is None or self.cycle.response_complete:
            awaited = "head"
        if awaited == self._awaited:
            return
        self._awaited = awaited
        if self._patience is not None:
            self._patience.cancel()
        if awaited is None:
            self._idle.pop(self, None)
        else:
            self._idle[self] = None
            self._patience = self.loop.call_later(self.timeout_keep_alive, self.transport.close)


class _Line:
    """The transport that a connection's answers use.

    Args:
        transport: The connection's transport.
        hang_up: Closes the connection.
    """

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, hang_up: Callable[[], None]) -> None:
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, hang_up
