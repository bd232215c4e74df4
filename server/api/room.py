"""How many connections a process holds, and which of them make room for new ones."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from typing import Protocol


class Idler(Protocol):
    """A connection."""

    def drop(self) -> None:
        """Closes it, whatever is still to be sent."""


class Room:
    """Room for connections. Where there is none left, the one that has been idle for longest is closed.

    So whoever opens connections and asks for nothing closes their own older ones, and all others are answered.

    Args:
        most: How many connections there may be.

    Attributes:
        idle: Those on which no request is being answered, the one that is idle for longest first.
    """

    def __init__(self, most: int = sys.maxsize) -> None:
        self.most = most
        self.idle: dict[Idler, None] = {}

    def make(self) -> bool:
        """Closes a connection; gives whether one was idle."""
        for connection in self.idle:
            del self.idle[connection]
            connection.drop()
            return True
        return False


def most_connections() -> int:
    """How many connections the files that this process may still open allow, with one more file for each request."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, (allowed - len(os.listdir("/dev/fd"))) // 2)


def allow_many_files() -> None:
    """Raises the limit on open files as far as this process may: the usual one is made for other programs."""
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems know no such number
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
