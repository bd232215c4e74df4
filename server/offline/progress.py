"""What a long run tells while it works: one line that changes where a person looks on, else a line now and then."""

from __future__ import annotations

import sys
import time

BETWEEN_S = 10.0
"""Seconds between lines where nobody looks on; a line that changes does so ten times a second at most."""

_WIDTH = 24


class Progress:
    """Counts images, and tells of them on standard error.

    Args:
        total: Images in all.
        done: Those of an earlier run.

    Attributes:
        images: Of this run, so far.
        errors: Those among them that have an error.
        seconds: Since the first was asked for.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._before = total, done
        self.images = self.errors = 0
        self._is_watched = sys.stderr.isatty()
        self._start = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def images_per_s(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    def add(self, images: int, errors: int) -> None:
        """Counts a batch; tells of it where it is time."""
        self.images += images
        self.errors += errors
        is_whole = self._before + self.images == self._total
        if is_whole or time.monotonic() - self._told >= (0.1 if self._is_watched else BETWEEN_S):
            self._told = time.monotonic()
            end = "\n" if is_whole or not self._is_watched else ""
            text = self._line()
            print(f"\r{text:<96}" if self._is_watched else text, end=end, file=sys.stderr, flush=True)

    def _line(self) -> str:
        done = self._before + self.images
        share = done / self._total
        left = clock((self._total - done) / self.images_per_s)
        errors = f", {self.errors:,} with errors" if self.errors else ""
        counted = f"{done:,} of {self._total:,} images{errors}, {self.images_per_s:,.1f} images/s, {left} left"
        return f"[{'#' * int(share * _WIDTH):<{_WIDTH}}] {share:4.0%}  {counted}"


def clock(seconds: float) -> str:
    """`0:09`, `12:34` or `1:02:03`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
