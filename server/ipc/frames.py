"""Frames on a stream: a length, and a message. What is sent in one turn of the event loop leaves in one write."""

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
"""Bytes of a message: many times what a request may hold. What announces more is no message of ours."""
_ROOM = 256 << 10
"""Bytes received at once: as many as a Unix socket holds, so that one turn takes all messages that have come."""

Received = TypeVar("Received")


class Frames(asyncio.BufferedProtocol, Generic[Received]):
    """One end of a connection that carries messages both ways.

    Args:
        decode: Bytes to a message; what it makes shares no memory with them.
        received: Gets every message that has come.
        lost: Called once, when the connection is gone, or given up for what came over it.
        greeting: Gives a message that is sent before all others.

    Attributes:
        is_open: Messages arrive at the other end.
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
        """Queues a message for sending; one for a connection that is gone is lost."""
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
        """Leaves, after what is queued is sent."""
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
        except Exception:  # whatever came over it: a new connection may do better
            logger.exception("a connection is given up for what came over it")
            assert self._transport is not None
            self._transport.abort()

    def _flush(self) -> None:
        assert self._transport is not None
        unsent, self._unsent = self._unsent, bytearray()
        if unsent and not self._is_gone and not self._transport.is_closing():
            self._transport.write(unsent)

    def _take_messages(self) -> None:
        """Hands over the messages that are whole, and makes room for the rest of the one that is not."""
        start, came, wanted = 0, memoryview(self._room)[: self._filled], _ROOM
        while len(came) - start >= _LENGTH.size:
            begin = start + _LENGTH.size
            end = begin + int(_LENGTH.unpack_from(came, start)[0])
            if end - begin > _LONGEST:
                raise ValueError(f"a message of {end - begin} bytes is announced; at most {_LONGEST} are one of ours")
            if end > len(came):
                wanted = max(_ROOM, end - start)
                break
            self._received(self._decode(came[begin:end]))
            start = end
        if start == 0 and len(self._room) == wanted:
            return  # the rest of a long message comes behind what is there
        left = bytes(came[start:])
        if len(self._room) != wanted:
            self._room = bytearray(wanted)
        self._room[: len(left)] = left
        self._filled = len(left)
