"""A client's connection: uvicorn's, which by itself waits forever for a head, and holds all that a client sends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.patience import CLIENT

_LONGEST_HEAD = 64 << 10
"""Bytes that may come in a row and are no part of a body: heads, what stands between chunks, and trailers."""

_MOST_PIPELINED = 32
"""Requests of a connection that wait for the one before them to be answered."""


class Connection(HttpToolsProtocol):
    """Closes a connection on which no whole head arrives within uvicorn's `timeout_keep_alive`.

    Bytes do not extend that time. It also holds for the rest of a body whose request is answered already, as one that
    was refused: that is read away so that the client sees the answer, but not for long. Nor is more held of a
    connection than one body, one head and a few requests more; trailers, which nobody reads, are not kept at all.

    Args:
        args: As uvicorn's.
        on_lost: Is called when the connection is lost.
        kwargs: As uvicorn's.
    """

    def __init__(self, *args: Any, on_lost: Callable[[], None] = lambda: None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_lost = on_lost
        self._is_in_body = False
        self._head_bytes = 0
        self._running: RequestResponseCycle | None = None
        self._tell_gone: Callable[[], None] | None = None
        self._awaited: str | None = None
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)  # begins to count anew with a part of a body, and where a head or a message ends
        if self._head_bytes > _LONGEST_HEAD and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")
        self._watch()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= _MOST_PIPELINED:
            raise ValueError("too many requests wait for their turn")  # httptools stops here, and uvicorn answers 400
        self._is_in_body = True
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        held: bytes | bytearray = self.cycle.body
        if not held and not self.cycle.response_complete:
            self.cycle.body, body = body, b""  # type: ignore[assignment]  # as it is: uvicorn copies a bytearray twice
        elif isinstance(held, bytes):
            self.cycle.body = bytearray(held)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_body = False
        self._head_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        cycle.scope["extensions"] = {CLIENT: self}  # type: ignore[dict-item]
        super()._start_asgi_task(cycle, app)

    @property
    def has_sent_all(self) -> bool:
        """Whether nothing of the request that is being answered is still to come."""
        return self._running is not None and not self._running.more_body

    def when_gone(self, tell: Callable[[], None] | None) -> None:
        """Calls a function when the client has left, soon where it has already; or, with None, calls none any more."""
        self._tell_gone = tell
        if tell is None or self._running is None:
            return
        self.flow.resume_reading()  # else it would not be seen
        if self._running.disconnected:
            self.loop.call_soon(self._tell)

    def _tell(self) -> None:
        if self._tell_gone is not None:
            self._tell_gone()

    def connection_lost(self, exc: Exception | None) -> None:
        # uvicorn tells the newest request alone that its client has left; that one may not have begun.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
            self._tell()
        self.pipeline.clear()
        super().connection_lost(exc)
        if self._patience is not None:
            self._patience.cancel()
        self._on_lost()

    def _watch(self) -> None:
        """Starts to count when something else is awaited of the client than before."""
        awaited = None
        if self.cycle is None or self.cycle.response_complete:
            awaited = "rest of a body" if self._is_in_body else "head"
        if awaited == self._awaited:
            return
        self._awaited = awaited
        if self._patience is not None:
            self._patience.cancel()
        if awaited is not None:
            self._patience = self.loop.call_later(self.timeout_keep_alive, self.transport.close)
