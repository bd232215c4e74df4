"""JPEG files that lack nothing but their end.

Some programs and some broken connections leave the end mark off. libjpeg waits for it, and Pillow calls such a file
truncated though all rows are there. Whether they are is found out by decoding twice: bits behind the last row change no
pixel.
"""

from __future__ import annotations

import io
import re
import struct

from PIL import Image

from server.images.jpeg import END, START
from server.images.limits import check_pixels

_ANY_BITS = bytes(range(1, 255, 3)) * 8  # codes of many lengths, and no mark
_LAST_ROWS = 64  # the highest blocks have 32

_FRAMES = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE, _SCAN = 0xC2, 0xDA
_ALL_COEFFICIENTS = (1 << 64) - 1
_next_mark = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL).search


def ended(encoded: bytes, max_pixels: int) -> bytes:
    """A JPEG with its end mark, where that alone was missing; else the file as it is.

    Args:
        encoded: A file that begins as a JPEG.
        max_pixels: Largest width x height.

    Raises:
        TooLargeError: The end is missing, and the image has more than `max_pixels`.
        Exception: Whatever Pillow raises of a broken file.
    """
    if encoded.endswith(END) or encoded.rfind(END) > encoded.rfind(bytes((0xFF, _SCAN))):
        return encoded
    whole = encoded.rstrip(b"\xff")  # half a mark
    if not _has_all_scans(whole):
        return encoded
    with_end = whole + END
    lacks_rows = _last_rows(with_end, max_pixels) != _last_rows(whole + _ANY_BITS + END, max_pixels)
    return encoded if lacks_rows else with_end


def _last_rows(encoded: bytes, max_pixels: int) -> bytes:
    with Image.open(io.BytesIO(encoded), formats=("JPEG",)) as image:
        check_pixels(*image.size, max_pixels)
        return image.crop((0, max(image.height - _LAST_ROWS, 0), *image.size)).tobytes()


def _has_all_scans(encoded: bytes) -> bool:
    """Whether a scan has begun for the last bit of each coefficient of each component."""
    at, seen, progressive = len(START), {}, False
    try:
        while mark := _next_mark(encoded, at):
            kind = encoded[mark.end() - 1]
            content = mark.end() + 2
            (length,) = struct.unpack_from(">H", encoded, mark.end())
            at = mark.end() + length
            if kind in _FRAMES:
                progressive = kind == _PROGRESSIVE
                seen = dict.fromkeys(encoded[content + 6 : at : 3], 0)
            elif kind == _SCAN:
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
