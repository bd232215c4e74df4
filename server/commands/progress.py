"""The progress of a long command on standard error."""

from __future__ import annotations

import sys
import time

BETWEEN_S = 10.0
"""Seconds between two lines in a file. On a terminal, one line changes ten times a second."""

_WIDTH = 24


class Bar:
    """Shows which share of the work is done, and a text beside it."""

    def __init__(self) -> None:
        self._is_watched = sys.stderr.isatty()
        self._next = 0.0

    def __call__(self, share: float, text: str) -> None:
        """Shows the progress, unless a line was shown a moment ago. The first line and the last are always shown."""
        now = time.monotonic()
        if share < 1 and now < self._next:
            return
        self._next = now + (0.1 if self._is_watched else BETWEEN_S)
        line = f"[{'#' * int(share * _WIDTH):<{_WIDTH}}] {share:4.0%}  {text}"
        end = "\n" if share >= 1 or not self._is_watched else ""
        print(f"\r{line:<96}" if self._is_watched else line, end=end, file=sys.stderr, flush=True)


class Progress:
    """Counts images, and shows how many are done.

    Args:
        total: Number of all images.
        done: Number of images of an earlier run.

    Attributes:
        images: Number of images in this run so far.
        errors: Number of them that have an error.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._before = total, done
        self.images = self.errors = 0
        self._bar = Bar()
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start of this run."""
        return time.monotonic() - self._start

    @property
    def images_per_s(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    def add(self, images: int, errors: int) -> None:
        """Counts a batch."""
        self.images += images
        self.errors += errors
        done = self._before + self.images
        wrong = f", {self.errors:,} with errors" if self.errors else ""
        left = clock((self._total - done) / self.images_per_s)
        text = f"{done:,} of {self._total:,} images{wrong}, {self.images_per_s:,.1f} images/s, {left} left"
        self._bar(done / self._total, text)


def clock(seconds: float) -> str:
    """`0:09`, `12:34` or `1:02:03`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
