"""Frames on a stream: a length and a message. Messages of one turn of the event loop leave in one write."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import Generic, TypeVar

from server.ipc.messages import Call, Reply, to_bytes

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("!I")
_LONGEST = 1 << 30
"""Most bytes of a message: many times the largest request. A longer one is not ours."""
_ROOM = 256 << 10
"""Bytes received at once: the buffer of a Unix socket, so that one turn takes all messages that have arrived."""

Received = TypeVar("Received")


class Frames(asyncio.BufferedProtocol, Generic[Received]):
    """One end of a connection that carries messages both ways.

    Args:
        decode: Turns bytes into a message that shares no memory with them.
        received: Gets every message.
        lost: Called once, when the connection is gone, or given up because of a bad message.
        greeting: Returns the first message to send.

    Attributes:
        is_open: Whether messages reach the other end.
    """

    def __init__(
        self,
        decode: Callable[[memoryview], Received],
        received: Callable[[Received], None],
        lost: Callable[[], None],
        greeting: Callable[[], Reply] | None = None,
    ) -> None:
        self._decode, self._received, self._lost, self._greeting = decode, received, lost, greeting
        self._transport: asyncio.Transport | None = None
        self._is_gone = False
        self._unsent = bytearray()
        self._room, self._filled = bytearray(_ROOM), 0

    def send(self, message: Call | Reply) -> None:
        """Queues a message; on a connection that is gone it is lost."""
        if self._is_gone:
            return  # uvloop's transports would raise
        start = len(self._unsent)
        if start == 0:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += bytes(_LENGTH.size)
        try:
            to_bytes(message, self._unsent)
        except Exception:  # the messages beside it still arrive
            del self._unsent[start:]
            raise
        _LENGTH.pack_into(self._unsent, start, len(self._unsent) - start - _LENGTH.size)

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._is_gone

    @property
    def num_unsent(self) -> int:
        """Bytes that the other end has not taken yet."""
        assert self._transport is not None
        return len(self._unsent) + self._transport.get_write_buffer_size()

    def close(self) -> None:
        """Sends what is queued, then closes."""
        assert self._transport is not None
        self._flush()
        self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        if self._greeting is not None:
            self.send(self._greeting())

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_gone = True
        self._lost()

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._room)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        try:
            self._take_messages()
        except Exception:  # any bad message: a new connection may do better
            logger.exception("a connection is closed after a bad message")
            assert self._transport is not None
            self._transport.abort()

    def _flush(self) -> None:
        assert self._transport is not None
        unsent, self._unsent = self._unsent, bytearray()
        if unsent and not self._is_gone and not self._transport.is_closing():
            self._transport.write(unsent)

    def _take_messages(self) -> None:
        """Delivers the complete messages, and makes room for the rest of an incomplete one."""
        start, came, wanted = 0, memoryview(self._room)[: self._filled], _ROOM
        while len(came) - start >= _LENGTH.size:
            begin = start + _LENGTH.size
            end = begin + int(_LENGTH.unpack_from(came, start)[0])
            if end - begin > _LONGEST:
                raise ValueError(f"a message of {end - begin} bytes is announced; the limit is {_LONGEST}")
            if end > len(came):
                wanted = max(_ROOM, end - start)
                break
            self._received(self._decode(came[begin:end]))
            start = end
        if start == 0 and len(self._room) == wanted:
            return  # the rest of a long message follows
        left = bytes(came[start:])
        if len(self._room) != wanted:
            self._room = bytearray(wanted)
        self._room[: len(left)] = left
        self._filled = len(left)
