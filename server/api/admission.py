"""Permits for images: taken before any pixel is decoded, and always returned."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import QueueFullError, TooLargeError, UnavailableError
from server.metrics import IN_FLIGHT

_WINDOW_S = 5.0
"""Window over which the pace of answers is measured, in seconds with work."""

_KNOWN = 30
"""Answers after which the pace is known; the first ones are slow because the device is cold."""

_LONGEST = 4.0
"""Longest counted time between two answers, in expected times: a stall is not the pace."""

_SLACK = 0.7
"""Largest share of its time that a request may wait for earlier ones; the batcher gives the rest to its batch."""

LONGEST_TURN_S = 30.0
"""Longest delay that a refusal asks for, because many clients never come back."""


class Admission:
    """Counts images in flight and how fast they leave, so that a refusal can say when to retry.

    Args:
        max_images: Most images admitted at once.
        clock: Monotonic seconds.
    """

    def __init__(self, max_images: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_images, self._clock = max_images, clock
        self._in_flight = 0
        self._num_answered, self._recent, self._busy_s = 0, 0.0, 0.0
        self._free_at = 0.0
        self._answered_at = self._clock()

    @property
    def in_flight(self) -> int:
        """Images admitted and not yet answered."""
        return self._in_flight

    @contextmanager
    def permit(self, images: int, timeout_s: float) -> Iterator[None]:
        """Holds places for the images of one request.

        Args:
            images: Number of images.
            timeout_s: Seconds until their answer is useless.

        Raises:
            QueueFullError: There are not enough places, or earlier images would take all of the time. It says when to
                retry.
            TooLargeError: There are never enough places.
        """
        if images > self._max_images:
            raise TooLargeError(f"the request holds {images} images; at most {self._max_images} fit in the queue")
        if self._in_flight + images > self._max_images:
            raise QueueFullError(
                f"{self._in_flight} images are in flight; at most {self._max_images} may be",
                retry_after_s=self._turn_of(images),
            )
        wait_s, may_wait_s = self._in_flight * self._per_image_s, _SLACK * timeout_s
        if wait_s > may_wait_s and self._num_answered >= _KNOWN:  # decoding it would only delay the others
            raise QueueFullError(
                f"{self._in_flight} images are in flight, {wait_s:.3g} s of work; to answer within {timeout_s:.3g} s, "
                f"at most {may_wait_s:.3g} s may be ahead",
                retry_after_s=self._turn_of(images, may_wait_s),
            )
        if self._in_flight == 0:
            self._begin()
        self._in_flight += images
        IN_FLIGHT.inc(images)
        try:
            yield
            self._answered(images)
        except UnavailableError:  # time without an engine is not time of its work
            self._answered_at = self._clock()
            raise
        finally:
            self._in_flight -= images
            IN_FLIGHT.dec(images)

    def _begin(self) -> None:
        """Starts a period of work. Earlier measurements lose weight with the length of the pause."""
        now = self._clock()
        weight = math.exp((self._answered_at - now) / _WINDOW_S)
        self._busy_s *= weight
        self._recent *= weight
        self._answered_at = now

    def _answered(self, images: int) -> None:
        """Measures how fast work is done. Requests that leave without an answer do not count."""
        now = self._clock()
        passed_s = now - self._answered_at
        if self._num_answered >= _KNOWN and self._recent:
            passed_s = min(passed_s, _LONGEST * self._in_flight * self._per_image_s)
        weight = math.exp(-passed_s / _WINDOW_S)  # by time and not by image, because a batch is answered at once
        self._busy_s = weight * self._busy_s + passed_s
        self._recent = weight * self._recent + images
        self._num_answered += images
        self._answered_at = now

    @property
    def _per_image_s(self) -> float:
        return self._busy_s / self._recent if self._recent else 0.0

    def _turn_of(self, images: int, may_wait_s: float = 0.0) -> float:
        """Seconds after which a refused request may retry: after all images in flight and all earlier refused requests.

        Args:
            images: Its number of images.
            may_wait_s: Seconds that it may wait here after its return.
        """
        now = self._clock()
        self._free_at = max(self._free_at, now + self._in_flight * self._per_image_s)
        turn_s = min(self._free_at - now, LONGEST_TURN_S)
        self._free_at = now + turn_s + images * self._per_image_s
        return max(turn_s - may_wait_s, 0.0)
