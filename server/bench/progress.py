"""A progress line for a load, on a terminal."""

from __future__ import annotations

import sys
import time

from server.bench.load import Reply

EVERY_S = 0.2


class Progress:
    """Watches the replies of a load. It writes nothing if standard error is not a terminal.

    Args:
        label: What runs.
        seconds: How long it will run.
    """

    def __init__(self, label: str, seconds: float) -> None:
        self._label, self._seconds = label, seconds
        self._start = self._drawn = time.perf_counter()
        self._answered = self._others = self._before = 0
        self._shown = sys.stderr.isatty()

    def __call__(self, reply: Reply) -> None:
        if reply.status == 200:
            self._answered += 1
        else:
            self._others += 1
        now = time.perf_counter()
        if self._shown and now - self._drawn >= EVERY_S:
            per_s = (self._answered - self._before) / (now - self._drawn)
            self._drawn, self._before = now, self._answered
            _show(
                f"{self._label}: {now - self._start:.0f} of {self._seconds:.0f} s, {self._answered} answers, "
                f"{per_s:.0f}/s, {self._others} refused or failed"
            )

    def end(self) -> None:
        """Clears the line."""
        if self._shown:
            _show("")


def tell(message: str) -> None:
    """Writes a line that stays, on a terminal."""
    if sys.stderr.isatty():
        print(message, file=sys.stderr, flush=True)


def _show(line: str) -> None:
    print(f"\r\x1b[K{line[:119]}", end="", file=sys.stderr, flush=True)
