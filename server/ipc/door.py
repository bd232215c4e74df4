"""The connection to an engine process: an unnamed socket pair, which the supervisor makes and all processes share.

To connect, an HTTP process makes a pair of connected sockets and sends one of them through the door. There is no file
that somebody could remove, a full disk could prevent, or another user could open. Connections sent while no engine runs
wait for the next one.
"""

from __future__ import annotations

import contextlib
import socket


class Door:
    """HTTP processes send connections through it (`knock`) and the engine receives them (`take`). It never blocks.

    A process gets it as an argument.
    """

    def __init__(self) -> None:
        self._inside, self._outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for each in (self._inside, self._outside):
            each.setblocking(False)  # in all processes, because send_fds and recv_fds ignore flags

    def fileno(self) -> int:
        """A descriptor that is readable while a connection waits."""
        return self._inside.fileno()

    def knock(self) -> socket.socket:
        """Makes a connection and sends the engine its end; returns the other end.

        Raises:
            OSError: Too many connections wait, or there are no descriptors left.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                socket.send_fds(self._outside, [b"\0"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return ours

    def take(self) -> socket.socket | None:
        """The engine's end of a waiting connection; None if none waits, or no descriptor is left."""
        with contextlib.suppress(OSError):
            _, descriptors, _, _ = socket.recv_fds(self._inside, 1, 1)
            if descriptors:
                return socket.socket(fileno=descriptors[0])
        return None

    def close(self) -> None:
        """Closes this process's ends; other processes keep theirs."""
        self._inside.close()
        self._outside.close()
