"""Limits on the size of an image, checked by its header before decoding."""

from __future__ import annotations

from server.errors import TooLargeError


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuses an image of more pixels than are allowed.

    Raises:
        TooLargeError: width x height is more than `max_pixels`.
    """
    if width * height > max_pixels:
        raise TooLargeError(
            f"the image has {width} x {height} pixels; at most {max_pixels} are allowed", max_pixels=max_pixels
        )
