"""Frames on a stream: two lengths, a JSON head and raw bytes, which are received in one piece however long they are."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_LENGTHS = struct.Struct("!II")
_ROOM = 64 << 10
"""Bytes received at once, of heads and small bodies: many frames where many wait."""


class Frames(asyncio.BufferedProtocol):
    """One end of a connection that carries frames both ways.

    Args:
        received: Gets every frame that has come: its head, and its body.
        lost: Called once, when the connection is gone, or given up for what came over it.
        greeting: The head of a frame that is sent before all others.
    """

    def __init__(
        self,
        received: Callable[[dict[str, Any], bytes], None],
        lost: Callable[[], None],
        greeting: dict[str, Any] | None = None,
    ) -> None:
        self._received, self._lost, self._greeting = received, lost, greeting
        self._transport: asyncio.Transport | None = None
        self._is_gone = False
        self._room, self._filled = bytearray(_ROOM), 0
        self._head: dict[str, Any] = {}
        self._body: bytearray | None = None  # of the frame that is under way, where it is longer than what has come
        self._body_filled = 0

    def send(self, head: dict[str, Any], body: bytes = b"") -> None:
        """Queues one frame for sending; one for a connection that is gone is lost."""
        assert self._transport is not None
        if self._is_gone:
            return  # uvloop's transports would raise
        encoded = json.dumps(head).encode()
        self._transport.write(_LENGTHS.pack(len(encoded), len(body)) + encoded)
        if body:
            self._transport.write(body)

    def close(self) -> None:
        """Leaves, after what is queued is sent."""
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        if self._greeting is not None:
            self.send(self._greeting)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_gone = True
        self._lost()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._body is not None:
            return memoryview(self._body)[self._body_filled :]
        return memoryview(self._room)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        try:
            if self._body is None:
                self._filled += nbytes
                self._take_frames()
                return
            self._body_filled += nbytes
            if self._body_filled == len(self._body):
                body, self._body = bytes(self._body), None
                self._received(self._head, body)
        except Exception:  # whatever came over it: a new connection may do better
            logger.exception("a connection is given up for what came over it")
            assert self._transport is not None
            self._transport.abort()

    def _take_frames(self) -> None:
        """Hands over the frames that are whole, and makes room for the rest of the one that is not."""
        start, came = 0, memoryview(self._room)[: self._filled]
        while len(came) - start >= _LENGTHS.size:
            head_length, body_length = _LENGTHS.unpack_from(came, start)
            body_at = start + _LENGTHS.size + head_length
            if body_at > len(came):
                if body_at - start > len(self._room):
                    self._room = bytearray(body_at - start)
                break
            head = json.loads(bytes(came[body_at - head_length : body_at]))
            rest = came[body_at : body_at + body_length]
            start = body_at + len(rest)
            if len(rest) < body_length:
                self._head, self._body, self._body_filled = head, bytearray(body_length), len(rest)
                self._body[: len(rest)] = rest
                break
            self._received(head, bytes(rest))
        left = bytes(came[start:])
        self._room[: len(left)] = left
        self._filled = len(left)
