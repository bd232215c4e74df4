"""The cost of decoding an image, computed from the file's structure before decoding; and the budget.

A quarter of the container's memory is for decoding. The HTTP processes share it evenly. Photos are decoded in threads,
each within a small part of it. Images that need more, and files that are not plain, are decoded in separate processes,
which share the rest and can be killed.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import TooLargeError
from server.images.limits import check_pixels
from server.images.pillow import shrink_of
from server.images.preprocessing import Preprocessing
from server.images.structure import Structure, structure_of

MOST_BLOCK_VISITS = 500_000_000
"""Most blocks times scans of a JPEG: 4 s. A photo of 50 megapixels has at most 2 million blocks."""

MOST_PARTS = 1 << 18
"""Most strips or tiles of a TIFF: one a row of an image that is 190 pixels wide."""

_MOST_OF_A_THREAD = 96 << 20  # enough for any usual photo of 24 megapixels, also progressive
_FIXED = 4 << 20


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory for decoding, in bytes.

    Attributes:
        of_a_thread: For one image in a thread.
        apart: For all images together in separate processes.
    """

    of_a_thread: int
    apart: int

    @staticmethod
    def of(memory: int, processes: int, threads: int) -> Budget:
        """The budget of one HTTP process.

        Args:
            memory: Bytes that all processes of the server may use together.
            processes: Number of HTTP processes.
            threads: Number of decoding threads of each.
        """
        whole = memory // 4 // processes
        of_a_thread = min(_MOST_OF_A_THREAD, whole // 2 // threads)
        return Budget(of_a_thread, whole - threads * of_a_thread)


@dataclass(frozen=True, slots=True)
class Cost:
    """Upper bounds on the cost of decoding one image.

    Attributes:
        memory: Bytes; 0 if the file does not tell.
        least_memory: Lower bound, in bytes.
        is_plain: Whether `memory` is certain and its time is that of a usual photo.
    """

    memory: int
    least_memory: int
    is_plain: bool


_NOTHING = Cost(0, 0, True)


def cost_of(encoded: bytes, preprocessing: Preprocessing, max_pixels: int) -> Cost:
    """The cost of decoding a file. Takes microseconds for a photo.

    Args:
        encoded: A whole image file.
        preprocessing: The model's sizes: a large JPEG is decoded at a reduced size.
        max_pixels: Largest width x height.

    Raises:
        TooLargeError: It has too many pixels, or more scans or parts than the time for decoding allows.
    """
    found = structure_of(encoded)
    if found is None:
        return _NOTHING  # it is refused without decoding
    width, height = found.width, found.height
    check_pixels(width, height, max_pixels)
    if found.blocks * found.scans > MOST_BLOCK_VISITS:
        raise TooLargeError(
            f"the JPEG has {found.scans} scans of {width} x {height} pixels; of that size at most "
            f"{MOST_BLOCK_VISITS // found.blocks} are allowed",
            max_scans=MOST_BLOCK_VISITS // found.blocks,
        )
    if found.parts > MOST_PARTS:
        raise TooLargeError(
            f"the TIFF has {found.parts} strips or tiles; at most {MOST_PARTS} are allowed", max_parts=MOST_PARTS
        )
    if not width or not height:
        return Cost(0, 0, False)
    shrink = _shrink(found, preprocessing) if found.may_shrink else 1
    pixels = width * height // shrink**2 + width + height
    to_width, to_height = preprocessing.resized(width, height)
    # Columns are resized before rows.
    resized = 4 * min(to_width * (height // shrink + to_height), 2 * max(max_pixels, pixels))
    held = int(pixels * found.bytes_per_pixel) + found.coefficients + found.copies * len(encoded)
    return Cost(held + resized + _FIXED, 4 * pixels, found.is_plain)


def _shrink(found: Structure, preprocessing: Preprocessing) -> int:
    """The smallest factor by which a JPEG is reduced in decoding, for any orientation."""
    width, height = found.width, found.height
    turns = [(width, height)] if found.is_upright else [(width, height), (height, width)]
    return min(shrink_of(size, preprocessing, found.is_upright) for size in turns)
