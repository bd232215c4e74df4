"""A log handler that counts repeated lines, so that clients cannot fill the log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TextIO

WINDOW_S = 60.0
_MOST_COUNTED = 1000


@dataclass
class _Line:
    """A line that was written, and its repetitions since."""

    record: logging.LogRecord
    until: float
    more: int = 0


class CountingHandler(logging.StreamHandler[TextIO]):
    """Writes a line once a minute, and counts it for the rest of that minute.

    The count is written with the first line after that minute, or at the end of the process. Two tracebacks are the
    same if they end at the same place with the same class of error, because their messages often name a request.

    Args:
        stream: The log; standard error by default.
        clock: Monotonic seconds.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(sys.stderr if stream is None else stream)
        self._clock = clock
        self._lines: dict[Hashable, _Line] = {}  # the oldest first

    def emit(self, record: logging.LogRecord) -> None:
        """Writes or counts a record; the handler's lock is held."""
        now = self._clock()
        self._tell_counts(now)
        key = _key(record)
        line = self._lines.get(key)
        if line is not None:
            line.more += 1
            return
        self._lines[key] = _Line(_without_traceback(record), now + WINDOW_S)
        super().emit(record)

    def close(self) -> None:
        """Writes the remaining counts."""
        self.acquire()
        try:
            self._tell_counts(float("inf"))
        finally:
            self.release()
        super().close()

    def _tell_counts(self, now: float) -> None:
        while self._lines:
            key, line = next(iter(self._lines.items()))
            if line.until > now and len(self._lines) < _MOST_COUNTED:
                return
            del self._lines[key]
            if line.more:
                super().emit(_counted(line))


def _key(record: logging.LogRecord) -> Hashable:
    if record.exc_info is None or record.exc_info[1] is None:
        return record.name, record.levelno, record.getMessage()
    kind, _, place = record.exc_info
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return record.name, record.msg, kind, None if place is None else (place.tb_frame.f_code, place.tb_lineno)


def _counted(line: _Line) -> logging.LogRecord:
    times = "once" if line.more == 1 else f"{line.more} times"
    return _without_traceback(line.record, f" ({times} more within {WINDOW_S:g} s)")


def _without_traceback(record: logging.LogRecord, addition: str = "") -> logging.LogRecord:
    """A new record without a traceback, whose frames would keep images in memory."""
    text = record.getMessage().strip() + addition
    return logging.LogRecord(
        record.name, record.levelno, record.pathname, record.lineno, text, None, None, record.funcName
    )
