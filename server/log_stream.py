"""Standard error for a log that never blocks, even if its reader is slow, stopped or gone."""

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
"""Most bytes that wait for a slow reader. Lines beyond that are lost and counted."""

_PIECE = select.PIPE_BUF
"""A pipe that is ready takes this much at once, and does not mix the writes of several processes."""

_FINISH_S = 1.0
_STDERR = 2


class LogStream(io.TextIOBase):
    """Writes to a file descriptor without blocking; a thread writes what must wait.

    If the descriptor is ready, text is written at once, in the calling thread. The rest, and later text, is written in
    order by a thread that ends when nothing waits.

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
        """Does nothing, because it might block."""

    def _put(self, piece: bytes) -> None:
        with contextlib.suppress(OSError):  # its reader is gone
            while piece:
                piece = piece[os.write(self._fd, piece) :]

    def _write_waiting(self) -> None:
        ready = _poll(self._fd)  # its own, because two threads cannot share one
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread, lost, self._num_lost = None, self._num_lost, 0
                    break
                piece = self._waiting[0]  # it stays in the queue, so that nothing overtakes it
            ready.poll()
            self._put(piece)  # without the lock, because another process may have filled the pipe meanwhile
            with self._lock:
                self._waiting.popleft()
                self._num_waiting -= len(piece)
        if lost:
            logger.warning("%d lines of the log are lost: its reader was too slow", lost)

    def _finish(self) -> None:
        """Waits a limited time for the rest of the log at the end of the process."""
        thread = self._thread
        if thread is not None:
            thread.join(_FINISH_S)


def log_stream() -> TextIO:
    """The log of this process: standard error, unless a program has replaced `sys.stderr`."""
    if sys.stderr is None:  # closed before the process began; its descriptor may belong to another file now
        return open(os.devnull, "w")
    if sys.stderr is not sys.__stderr__:
        return sys.stderr
    return cast(TextIO, LogStream(_STDERR))


def _poll(fd: int) -> select.poll:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return poll


def _pieces(data: bytes) -> Iterator[bytes]:
    """Splits data into pieces that a pipe takes at once, at line ends where possible."""
    while len(data) > _PIECE:
        end = data.rfind(b"\n", 0, _PIECE) + 1 or _PIECE
        yield data[:end]
        data = data[end:]
    yield data
