"""Finds out whether a client that has closed its sending side has left, or still waits for its answer."""

from __future__ import annotations

import asyncio
import socket

_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
_FIRST_LOOK_S = 0.001
_LONGEST_PAUSE_S = 0.5
_CLOSED = 7
"""Linux' TCP_CLOSE: the other side has reset the connection."""


class Departure:
    """Watches a connection whose client has closed its direction, until the client has left.

    A client that has closed its socket answers data with a reset; a waiting client does not. So an interim response is
    sent, which an HTTP/1.1 client ignores (RFC 9110, 15.2). A reset then ends the connection.

    Args:
        loop: The loop of the connection.
        transport: Its transport.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        self._loop, self._transport = loop, transport
        self._next: asyncio.TimerHandle | None = None

    def watch(self, has_begun: bool) -> None:
        """Begins to watch.

        Args:
            has_begun: Whether an answer is being sent, which an interim response must not interrupt.
        """
        if not has_begun:
            self._transport.write(_INTERIM)
        self._look_after(_FIRST_LOOK_S)

    def forget(self) -> None:
        """Stops watching."""
        if self._next is not None:
            self._next.cancel()

    def _look_after(self, pause_s: float) -> None:
        self._next = self._loop.call_later(pause_s, self._look, pause_s)

    def _look(self, pause_s: float) -> None:
        if self._is_reset():
            self._transport.abort()
        else:
            self._look_after(min(2 * pause_s, _LONGEST_PAUSE_S))

    def _is_reset(self) -> bool:
        peer = self._transport.get_extra_info("socket")
        if peer is None or not hasattr(socket, "TCP_INFO"):
            return False
        return bool(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSED)
