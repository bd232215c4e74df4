"""Standard error for a log that stops nothing: whoever reads it may be slow, stand still, or be gone."""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import TextIO, cast

logger = logging.getLogger(__name__)

MOST_WAITING = 1 << 20
"""Bytes that wait for a slow reader; what comes beyond is lost, and counted."""

_PIECE = select.PIPE_BUF
"""A pipe that is ready to be written takes so much at once, and from several processes without mixing it."""

_FINISH_S = 1.0
_STDERR = 2


class LogStream(io.TextIOBase):
    """Writes to a file descriptor as long as that blocks nobody. What must wait is left to a thread.

    Text that is written at once leaves at once, in this thread, where the descriptor is ready. The rest, and what comes
    meanwhile, leaves in order by a thread that ends when nothing waits any more.

    Args:
        fd: The descriptor.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._ready = fd, _poll(fd)
        self._lock = threading.RLock()
        self._waiting: deque[bytes] = deque()
        self._num_waiting = self._num_lost = 0
        self._thread: threading.Thread | None = None
        atexit.register(self._finish)

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            if self._num_waiting + len(data) > MOST_WAITING:
                self._num_lost += text.count("\n")
                return len(text)
            for piece in _pieces(data):
                if self._waiting or self._thread is not None or not self._ready.poll(0):
                    self._waiting.append(piece)
                    self._num_waiting += len(piece)
                else:
                    self._put(piece)
            if self._waiting and self._thread is None:
                self._thread = threading.Thread(target=self._write_waiting, name="log", daemon=True)
                self._thread.start()
        return len(text)

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        """Does nothing: it might wait."""

    def _put(self, piece: bytes) -> None:
        with contextlib.suppress(OSError):  # its reader is gone
            while piece:
                piece = piece[os.write(self._fd, piece) :]

    def _write_waiting(self) -> None:
        ready = _poll(self._fd)  # of its own: two threads cannot share one
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread, lost, self._num_lost = None, self._num_lost, 0
                    break
                piece = self._waiting[0]  # it stays there, so that nothing overtakes it
            ready.poll()
            self._put(piece)  # without the lock: another process may have filled the pipe meanwhile
            with self._lock:
                self._waiting.popleft()
                self._num_waiting -= len(piece)
        if lost:
            logger.warning("%d lines of the log are lost: whoever reads it was too slow", lost)

    def _finish(self) -> None:
        """Gives what waits some time at the end of the process."""
        thread = self._thread
        if thread is not None:
            thread.join(_FINISH_S)


def log_stream() -> TextIO:
    """Where the log of this process goes: standard error, unless a program has put something else in its place."""
    if sys.stderr is None:  # closed before the process began; its descriptor may be that of something else by now
        return open(os.devnull, "w")
    if sys.stderr is not sys.__stderr__:
        return sys.stderr
    return cast(TextIO, LogStream(_STDERR))


def _poll(fd: int) -> select.poll:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return poll


def _pieces(data: bytes) -> Iterator[bytes]:
    """Pieces that a pipe takes whole, whole lines where those are short enough."""
    while len(data) > _PIECE:
        end = data.rfind(b"\n", 0, _PIECE) + 1 or _PIECE
        yield data[:end]
        data = data[end:]
    yield data
