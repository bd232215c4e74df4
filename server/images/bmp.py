"""BMP files, rewritten in the few forms that Pillow reads correctly.

Among the many kinds of header, palette and run-length code, Pillow silently misreads some: a palette of black and white
for 8 bits a pixel, one of greys for 4, rows that a run-length code skips. So the header is parsed here, a palette gets
all its entries, and runs are expanded. A kind that is not listed is refused by its name.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from server.errors import UndecodableError, UnsupportedError
from server.images.limits import check_pixels

SIGNATURE = b"BM"

_RAW, _RLE8, _RLE4, _MASKS, _MASKS_WITH_ALPHA = 0, 1, 2, 3, 6
_OS2, _OS2_LONG = 12, 64
_HEADERS = (_OS2, 40, 52, 56, _OS2_LONG, 108, 124)
_LAYOUTS = {
    16: [(0xF800, 0x7E0, 0x1F, 0), (0x7C00, 0x3E0, 0x1F, 0)],
    24: [(0xFF0000, 0xFF00, 0xFF, 0)],
    32: [
        (0xFF0000, 0xFF00, 0xFF, 0),
        (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
        (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
        (0xFF000000, 0xFF0000, 0xFF00, 0),
        (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
    ],
}
"""The masks of red, green, blue and alpha in a pixel, by its bits."""

_header = struct.Struct("<IiiHHIIiiII")
_GREYLESS = b"\1\2\3\0"  # Pillow would drop a palette of greys only


class _Bitmap(NamedTuple):
    width: int
    height: int  # negative: the first row is the topmost
    bits: int
    compression: int
    palette: bytes  # blue, green, red, 0
    masks: tuple[int, ...]
    pixels: memoryview


def plain(encoded: bytes, max_pixels: int) -> bytes:
    """A BMP of the same pixels with a header of 56 bytes, without runs.

    Args:
        encoded: A file that begins with `SIGNATURE`.
        max_pixels: Largest width x height.

    Raises:
        UnsupportedError: Its kind is not read.
        TooLargeError: It has more than `max_pixels`.
        UndecodableError: It is cut off.
    """
    try:
        bitmap = _read(encoded, max_pixels)
    except struct.error:
        raise UndecodableError("the BMP is cut off in its header") from None
    width, height, bits, compression, palette, masks, pixels = bitmap
    if compression in (_RLE8, _RLE4):
        pixels, bits, compression = memoryview(_spelled_out(bitmap)), 8, _RAW
    if bits <= 8:
        palette = palette.ljust(4 << bits, b"\0") + (_GREYLESS if bits < 8 else b"")
    start = 14 + 56 + len(palette)
    head = struct.pack("<2sIII", SIGNATURE, start + len(pixels), 0, start)
    head += _header.pack(56, width, height, 1, bits, compression, len(pixels), 0, 0, len(palette) // 4, 0)
    return b"".join([head, struct.pack("<IIII", *masks), palette, pixels])


def _read(encoded: bytes, max_pixels: int) -> _Bitmap:
    offset, size = struct.unpack_from("<II", encoded, 10)
    if size not in _HEADERS:
        raise UnsupportedError(f"a BMP with a header of {size} bytes is not read")
    if size == _OS2:
        width, height, _, bits = struct.unpack_from("<HHHH", encoded, 18)
        compression, colours = _RAW, 0
    else:
        _, width, height, _, bits, compression, _, _, _, colours, _ = _header.unpack_from(encoded, 14)
    if width <= 0 or height == 0:
        raise UndecodableError(f"the BMP has {width} x {height} pixels")
    check_pixels(width, abs(height), max_pixels)
    end = 14 + size
    masks = (0, 0, 0, 0)
    if compression in (_MASKS, _MASKS_WITH_ALPHA):
        count = 4 if size >= 56 or compression == _MASKS_WITH_ALPHA else 3
        masks = (*struct.unpack_from(f"<{count}I", encoded, 54), 0)[:4]
        end = max(end, 54 + 4 * count)
    _check_kind(size, bits, compression, masks, height)
    palette = b""
    if bits <= 8:
        entry = 3 if size == _OS2 else 4
        last = end + entry * min(colours or 1 << bits, 1 << bits)
        if end < offset < last:
            last = offset
        palette = b"".join(encoded[at : at + 3] + b"\0" for at in range(end, last - entry + 1, entry))
        end = last
    if masks == (0, 0, 0, 0):
        compression = _RAW if compression in (_MASKS, _MASKS_WITH_ALPHA) else compression
    else:
        compression = _MASKS
    return _Bitmap(width, height, bits, compression, palette, masks, memoryview(encoded)[max(offset, end) :])


def _check_kind(size: int, bits: int, compression: int, masks: tuple[int, ...], height: int) -> None:
    """Refuses a combination that is not listed, by its name."""
    if compression in (_MASKS, _MASKS_WITH_ALPHA) and size != _OS2_LONG:
        is_read = bits in (16, 24, 32) and (not any(masks) or masks in _LAYOUTS[bits])
        what = f"{bits} bits a pixel and the masks {', '.join(f'{mask:x}' for mask in masks)}"
    else:
        bits_read = {_RAW: (1, 4, 8, 16, 24, 32), _RLE8: (8,), _RLE4: (4,)}.get(compression, ())
        is_read = bits in bits_read and (compression == _RAW or height > 0)
        what = f"{bits} bits a pixel and compression {compression}"
    if not is_read:
        raise UnsupportedError(f"a BMP with {what} is not read")


def _spelled_out(bitmap: _Bitmap) -> bytes:
    """Expands a run-length code to rows of 8 bits a pixel. Skipped pixels have the first colour, as on Windows."""
    width, height, four_bits = bitmap.width, bitmap.height, bitmap.compression == _RLE4
    code, stride = bytes(bitmap.pixels), -(-width // 4) * 4
    rows = bytearray(stride * height)
    at = x = y = 0
    try:
        while y < height:
            count, value = code[at], code[at + 1]
            at += 2
            if count == 0 and value <= 2:
                if value == 0:
                    x, y = 0, y + 1
                elif value == 1:
                    break
                else:
                    x, y = x + code[at], y + code[at + 1]
                    at += 2
                continue
            if count:
                run = (bytes((value >> 4, value & 15)) * 128 if four_bits else bytes((value,)) * count)[:count]
            else:
                count = value
                length = (count + 1) // 2 if four_bits else count
                run = code[at : at + length]
                if len(run) < length:
                    raise IndexError
                at += length + length % 2
                if four_bits:
                    run = bytes(half for pair in run for half in (pair >> 4, pair & 15))[:count]
            shown = run[: max(width - x, 0)]
            rows[y * stride + x : y * stride + x + len(shown)] = shown
            x += count
    except IndexError:
        if x < width or y < height - 1:
            raise UndecodableError("the BMP is cut off") from None
    return bytes(rows)
