"""JPEG files that lack only their end.

Some programs and some broken connections leave out the end mark. libjpeg waits for it, and Pillow calls such a file
truncated even if all rows are present. To find out, the file is decoded with different bits after the last one: they do
not change the pixels of a complete image.
"""

from __future__ import annotations

import io
import random
import re
import struct
import zlib

from PIL import Image

from server.images.jpeg import END, SCAN, START
from server.images.limits import check_pixels


def _any_bits(seed: int) -> bytes:
    """Codes of all lengths, and each of the eight marks at which a decoder may resume."""
    bits = bytes(random.Random(seed).choices(range(0xFF), k=200))
    return bits + b"".join(bytes((0xFF, restart)) + bits[:20] for restart in range(0xD0, 0xD8))


# with one seed, a hundredth of the files that lack a few bytes look complete
_ANY_BITS = [_any_bits(seed) for seed in (1, 2)]
_ROWS = 64

_FRAMES = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE = 0xC2
_ALL_COEFFICIENTS = (1 << 64) - 1
_MOST_SCANS = 100  # ten times what programs write; each costs time
_next_mark = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL).search


def ended(encoded: bytes, max_pixels: int) -> bytes:
    """A JPEG with its end mark, if only that was missing; otherwise the file unchanged.

    Args:
        encoded: A file that begins like a JPEG.
        max_pixels: Largest width x height.

    Raises:
        TooLargeError: The end is missing, and the image has more than `max_pixels`.
        Exception: Any error of Pillow on a broken file.
    """
    if has_end(encoded):
        return encoded
    whole = encoded.rstrip(b"\xff")  # half a mark
    if not _has_all_scans(whole):
        return encoded
    with_end = whole + END
    pixels = _checksum(with_end, max_pixels)
    is_whole = all(_checksum(whole + bits + END, max_pixels) == pixels for bits in _ANY_BITS)
    return with_end if is_whole else encoded


def has_end(encoded: bytes) -> bool:
    """Whether an end mark is at the end of a JPEG, or anywhere after its last scan."""
    return encoded.endswith(END) or encoded.rfind(END) > encoded.rfind(bytes((0xFF, SCAN)))


def _checksum(encoded: bytes, max_pixels: int) -> int:
    """A checksum of the pixels, which are copied a few rows at a time."""
    with Image.open(io.BytesIO(encoded), formats=("JPEG",)) as image:
        check_pixels(*image.size, max_pixels)
        checksum = 0
        for top in range(0, image.height, _ROWS):
            rows = image.crop((0, top, image.width, min(top + _ROWS, image.height)))
            checksum = zlib.crc32(rows.tobytes(), checksum)
        return checksum


def _has_all_scans(encoded: bytes) -> bool:
    """Whether a scan has begun for the last bit of each coefficient of each component."""
    at, seen, progressive, scans = len(START), {}, False, 0
    try:
        while mark := _next_mark(encoded, at):
            kind = encoded[mark.end() - 1]
            content = mark.end() + 2
            (length,) = struct.unpack_from(">H", encoded, mark.end())
            at = mark.end() + length
            if kind in _FRAMES:
                progressive = kind == _PROGRESSIVE
                seen = dict.fromkeys(encoded[content + 6 : at : 3], 0)
            elif kind == SCAN:
                scans += 1
                if scans > _MOST_SCANS:
                    return False
                count = encoded[content]
                first, last, bits = encoded[content + 1 + 2 * count : content + 4 + 2 * count]
                sent = _ALL_COEFFICIENTS
                if progressive:
                    sent = (2 << last) - (1 << first) if bits & 15 == 0 else 0
                for component in encoded[content + 1 : content + 1 + 2 * count : 2]:
                    seen[component] |= sent
    except (struct.error, IndexError, ValueError, KeyError):  # it ends within a segment
        return False
    return bool(seen) and all(sent == _ALL_COEFFICIENTS for sent in seen.values())
