"""The limit on the connections of a process, and the choice of connections to close for new ones."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from typing import Protocol


class Idler(Protocol):
    """A connection."""

    def drop(self) -> None:
        """Closes it, even with unsent data."""


class Room:
    """Room for connections. When there is none left, the connection that has been idle for longest is closed.

    So a client that opens many connections and sends nothing mostly loses its own; all other clients are answered.

    Args:
        most: Most connections.

    Attributes:
        idle: Connections without a request in progress; the first has been idle for longest.
    """

    def __init__(self, most: int = sys.maxsize) -> None:
        self.most = most
        self.idle: dict[Idler, None] = {}

    def make(self) -> bool:
        """Closes the connection that has been idle for longest; returns False if none is idle."""
        for connection in self.idle:
            del self.idle[connection]
            connection.drop()
            return True
        return False


def most_connections() -> int:
    """The connections for which this process may still open files, at two files each."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, (allowed - len(os.listdir("/dev/fd"))) // 2)


def allow_many_files() -> None:
    """Raises the limit on open files as far as this process may. The default is too low for a server."""
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems do not accept the number
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
