"""What decoding an image will take, computed from the file's structure before anything is decoded; and the budget.

A quarter of the container's memory is for decoding. The HTTP processes share it evenly. Photos are decoded in
threads, each within a small part of it. Images that need more, and files that are not plain, are decoded apart, in
processes that share the rest and can be killed.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import TooLargeError
from server.images.limits import check_pixels
from server.images.pillow import shrink_of
from server.images.preprocessing import Preprocessing
from server.images.structure import Structure, structure_of

MOST_BLOCK_VISITS = 500_000_000
"""Blocks of a JPEG times its scans: 4 s. A photo of 50 megapixels has 2 million blocks at most."""

MOST_PARTS = 1 << 18
"""Strips or tiles of a TIFF: as many as rows, of an image that is 190 pixels wide."""

_MOST_OF_A_THREAD = 96 << 20  # what any usual photo of 24 megapixels needs, progressive ones too
_FIXED = 4 << 20


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory for decoding, in bytes.

    Attributes:
        of_a_thread: For one image that is decoded in a thread.
        apart: For all images together that are decoded in processes of their own.
    """

    of_a_thread: int
    apart: int

    @staticmethod
    def of(memory: int, processes: int, threads: int) -> Budget:
        """The part of one HTTP process.

        Args:
            memory: What all processes of the server may use together.
            processes: HTTP processes.
            threads: Of each, that decode.
        """
        whole = memory // 4 // processes
        of_a_thread = min(_MOST_OF_A_THREAD, whole // 2 // threads)
        return Budget(of_a_thread, whole - threads * of_a_thread)


@dataclass(frozen=True, slots=True)
class Cost:
    """What decoding one image takes at most.

    Attributes:
        memory: Bytes; 0 where the file does not say.
        least_memory: Bytes that it takes at least.
        is_plain: Whether that is certain, and its time is that of a usual photo.
    """

    memory: int
    least_memory: int
    is_plain: bool


_NOTHING = Cost(0, 0, True)


def cost_of(encoded: bytes, preprocessing: Preprocessing, max_pixels: int) -> Cost:
    """What decoding a file takes, in microseconds for a photo.

    Args:
        encoded: A whole image file.
        preprocessing: Sizes that the model wants: a large JPEG is decoded at a part of its size.
        max_pixels: Largest width x height.

    Raises:
        TooLargeError: It has too many pixels, or more scans or parts than decoding may take time for.
    """
    found = structure_of(encoded)
    if found is None:
        return _NOTHING  # it is refused without being decoded
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
    """How many times smaller a JPEG is decoded at least, whichever way it is turned."""
    width, height = found.width, found.height
    turns = [(width, height)] if found.is_upright else [(width, height), (height, width)]
    return min(shrink_of(size, preprocessing, found.is_upright) for size in turns)
