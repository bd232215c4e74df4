"""Permits for images: taken before any pixel is decoded, given back whatever happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import QueueFullError, TooLargeError
from server.metrics import IN_FLIGHT

_KNOWN = 30
"""After so many departures their pace is known, and the mean goes over the last ones; the first is of a cold device."""

LONGEST_TURN_S = 30.0
"""The refused are put off by no more than this, for many never come back."""


class Admission:
    """Counts images in flight, and how fast they leave, so that a refusal can say when to come back.

    Args:
        max_images: Most images admitted at once.
    """

    def __init__(self, max_images: int) -> None:
        self._max_images = max_images
        self._in_flight = 0
        self._num_left, self._per_image_s = 0, 0.0
        self._free_at = 0.0
        self._left_at = time.monotonic()

    @property
    def in_flight(self) -> int:
        """Images admitted and not yet answered."""
        return self._in_flight

    @contextmanager
    def permit(self, images: int, timeout_s: float) -> Iterator[None]:
        """Holds places for the images of one request.

        Args:
            images: How many.
            timeout_s: Time until their answer is worth nothing.

        Raises:
            QueueFullError: There are not that many places, or those before would take all of the time; it says when to
                come back.
            TooLargeError: There never are.
        """
        if images > self._max_images:
            raise TooLargeError(f"the request holds {images} images; at most {self._max_images} fit in the queue")
        if self._in_flight + images > self._max_images:
            raise QueueFullError(
                f"{self._in_flight} images are in flight; at most {self._max_images} may be",
                retry_after_s=self._turn_of(images),
            )
        wait_s = self._in_flight * self._per_image_s
        if wait_s > timeout_s and self._num_left == _KNOWN:  # decoding it would only delay the others
            raise QueueFullError(
                f"{self._in_flight} images are in flight, {wait_s:.3g} s of work; the deadline is {timeout_s:.3g} s",
                retry_after_s=wait_s - timeout_s,
            )
        if self._in_flight == 0:
            self._left_at = time.monotonic()
        self._in_flight += images
        IN_FLIGHT.inc(images)
        try:
            yield
        finally:
            self._in_flight -= images
            IN_FLIGHT.dec(images)
            now = time.monotonic()
            # A moving mean of the time between departures.
            for _ in range(min(images, _KNOWN)):
                self._num_left = min(self._num_left + 1, _KNOWN)
                self._per_image_s += ((now - self._left_at) / images - self._per_image_s) / self._num_left
            self._left_at = now

    def _turn_of(self, images: int) -> float:
        """Seconds until the refused may come: after what is in flight, and after those who were told so before."""
        now = time.monotonic()
        self._free_at = max(self._free_at, now + self._in_flight * self._per_image_s)
        turn_s = min(self._free_at - now, LONGEST_TURN_S)
        self._free_at = now + turn_s + images * self._per_image_s
        return turn_s
