"""Shares new connections among the HTTP processes of one listening socket: those with the fewest go first.

Without this, the kernel gives a burst to the process that wakes first. So each process accepts one connection a turn,
and a process with more than the mean leaves new ones to the others for some milliseconds. It then takes what is left,
so nothing depends on the others.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import socket
from collections.abc import Callable, Sequence

from server.api.room import Room
from server.unnamed import SharedNumbers

logger = logging.getLogger(__name__)

_AWAY = -1
_LONGEST_WAIT_S = 0.01
_WAIT_S = 0.001
"""A turn of most event loops. A process comes later by this much for each connection above the mean."""

_PATIENCE_S = 0.1
"""Seconds after which a process with fewer connections is no longer waited for. The first request of a process may take
it this long.
"""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RETRY_S = 0.2
_SAID_FOR_S = 60.0


class Places:
    """The HTTP processes' knowledge of each other, in shared memory. Each process writes only its own place.

    Args:
        count: Number of processes.
    """

    def __init__(self, count: int) -> None:
        self._held = SharedNumbers("i", [_AWAY] * count)
        self._looks = SharedNumbers("Q", [0] * count)
        self._opened = SharedNumbers("b", [0] * count)

    def held(self) -> list[int | None]:
        """Connections of each process; None for a process that accepts none."""
        return [None if held == _AWAY else held for held in self._held.all()]

    def hold(self, index: int, connections: int) -> None:
        """Records that a process accepts, and how many connections it holds."""
        self._held[index] = connections
        self._opened[index] = 1

    def leave(self, index: int) -> None:
        """Records that a process has stopped accepting, or has died."""
        self._held[index] = _AWAY

    def was_ever_open(self, index: int) -> bool:
        """Whether a process at this place has ever accepted connections."""
        return bool(self._opened[index])

    def look(self, index: int) -> None:
        """Records that a process has seen a waiting connection."""
        self._looks[index] += 1

    def looks(self) -> list[int]:
        """How often each process has seen a waiting connection."""
        return self._looks.all()


def wait_s(mine: int, others: Sequence[int]) -> float:
    """Seconds for which a process leaves a connection to the others.

    Args:
        mine: Connections that it holds.
        others: Connections of each other process that is expected to accept.
    """
    mean = (mine + sum(others)) / (1 + len(others))
    return min(_WAIT_S * math.ceil(mine - mean), _LONGEST_WAIT_S) if mine > mean else 0.0


class Acceptor:
    """Accepts the connections of one process.

    A process that does not even look while this one waits for it is busy or stopped. After a tenth of a second it is
    ignored until it looks again.

    Args:
        listener: The socket that all processes share.
        places: The processes' knowledge of each other.
        index: The place of this process.
        protocol: Makes the protocol of a connection, given the function to call when the connection is lost.
        room: The limit on connections, and which of them make room for new ones.
    """

    def __init__(
        self,
        listener: socket.socket,
        places: Places,
        index: int,
        protocol: Callable[[Callable[[], None]], asyncio.Protocol],
        room: Room | None = None,
    ) -> None:
        self._listener, self._places, self._index, self._protocol = listener, places, index, protocol
        self._room = room or Room()
        self._loop = asyncio.get_running_loop()
        self._held = 0
        self._silent: dict[int, tuple[int, float]] = {}  # other processes: how often each had looked, and since when
        self._later: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._is_taking = False
        self._quiet_until = 0.0

    def open(self) -> None:
        """Begins to accept."""
        self._is_taking = True
        self._listener.setblocking(False)
        self._places.hold(self._index, self._held)
        self._loop.add_reader(self._listener.fileno(), self._look)

    async def close(self) -> None:
        """Stops accepting, and returns when all accepted connections have their protocol."""
        self._loop.remove_reader(self._listener.fileno())
        if self._later is not None:
            self._later.cancel()
        self._is_taking = False
        self._places.leave(self._index)
        self._listener.close()
        if self._opening:
            await asyncio.wait(self._opening)

    def _lose(self) -> None:
        self._held -= 1
        if self._is_taking:
            self._places.hold(self._index, self._held)

    def _look(self) -> None:
        self._places.look(self._index)
        looks, now = self._places.looks(), self._loop.time()
        others = {}
        for index, held in enumerate(self._places.held()):
            looked, since = self._silent.get(index, (-1, now))
            is_silent = looked == looks[index] and now - since >= _PATIENCE_S
            if held is not None and index != self._index and not is_silent:
                others[index] = held
        leave_s = wait_s(self._held, list(others.values()))
        if leave_s > 0:
            fewer = {index: looks[index] for index, held in others.items() if held < self._held}
            self._pause(leave_s, lambda: self._resume(fewer, now))
        else:
            self._accept()

    def _pause(self, seconds: float, then: Callable[[], None]) -> None:
        """Stops watching the socket, which would otherwise wake this process again at once."""
        self._loop.remove_reader(self._listener.fileno())
        self._later = self._loop.call_later(seconds, then)

    def _resume(self, fewer: dict[int, int], since: float) -> None:
        """Takes what is left after a wait for `fewer`: processes with fewer connections, and how often each had looked
        before.
        """
        self._loop.add_reader(self._listener.fileno(), self._look)
        if self._accept():
            looks = self._places.looks()
            for index, looked in fewer.items():
                if looks[index] == looked and self._silent.get(index, (-1, since))[0] != looked:
                    self._silent[index] = (looked, since)

    def _accept(self) -> bool:
        """Takes one connection if one is left."""
        if self._held >= self._room.most and not self._room.idle:
            self._recover(f"all {self._held} are busy")
            return False
        connection = None
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                if not self._room.make():  # otherwise the loop tries again at once
                    self._recover(os.strerror(error.errno))
                return False
            # Any other error: another process was faster, or the client has left.
        self._is_taking = True
        self._held += connection is not None
        self._places.hold(self._index, self._held)
        if connection is None:
            return False
        if self._held > self._room.most:
            self._room.make()
        connection.setblocking(False)
        opening = self._loop.create_task(self._open(connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        return True

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: self._protocol(self._lose), connection)
        except OSError as error:  # its protocol has never heard of it
            logger.warning("a connection could not be opened: %s", error)
            connection.close()
            self._lose()

    def _recover(self, reason: str) -> None:
        """Leaves the socket to the others for a while, because there are no files or memory for another connection."""
        if self._loop.time() >= self._quiet_until:
            logger.error("no connection can be accepted: %s; trying again every %g s", reason, _RETRY_S)
            self._quiet_until = self._loop.time() + _SAID_FOR_S
        self._is_taking = False
        self._places.leave(self._index)
        self._pause(_RETRY_S, lambda: self._resume({}, 0.0))
