"""Removes everything but pixels from PNG files, so that text, profiles, times and animation cannot prevent decoding.

Pillow refuses a file with a comment of more than a MiB, or with a metadata chunk that is cut off or has a wrong
checksum. Browsers show such a file, and so does Pillow without the chunk. Metadata that turns the image (EXIF and XMP)
stays if it is intact and small.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from server.errors import UnsupportedError

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_EXIF_AS_TEXT, _XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"
_ORDER = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", _EXIF_AS_TEXT, _XMP)
"""Chunks that stay besides the pixels, in their order; text chunks by their keyword."""

_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MOST_TEXT = 1 << 20  # Pillow's own limit for unpacked text
_GREY, _RGB, _PALETTE = 0, 2, 3
_FRAME = 12  # bytes of a chunk besides its content: length, name, checksum

_length_and_name = struct.Struct(">I4s")


def only_pixels(encoded: bytes) -> bytes:
    """A PNG of the same pixels and orientation.

    Args:
        encoded: A file that begins with `SIGNATURE`. If it is cut off, the present part is kept.

    Raises:
        UnsupportedError: An RGB image of 16 bits has a transparent colour. Pillow compares only 8 of the bits.
    """
    kept: dict[bytes, bytes | memoryview] = {}
    pixels: list[memoryview] = []
    for name, chunk in _chunks(memoryview(encoded)):
        content = chunk[8:-4]
        if name == b"IDAT":
            pixels.append(chunk)
        elif name in (b"IHDR", b"PLTE"):
            kept.setdefault(name, chunk)
        elif name == b"tRNS" and _is_intact(chunk):
            depth, kind = kept.get(b"IHDR", bytes(_FRAME + 13))[16:18]
            if (said := _transparency(bytes(content), depth, kind)) is not None:
                kept.setdefault(name, _chunk(name, said))
        elif name == b"eXIf" and _is_intact(chunk):
            kept.setdefault(name, chunk)
        elif name in _TEXTS and (keyword := _keyword(content)) in _ORDER and _is_small_text(name, chunk):
            kept.setdefault(keyword, chunk)
    return b"".join([SIGNATURE, *(kept[name] for name in _ORDER if name in kept), *pixels])


def _chunks(view: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Names and whole chunks up to the end of the image; the last may be cut off."""
    at = len(SIGNATURE)
    while at + 8 <= len(view):
        length, name = _length_and_name.unpack_from(view, at)
        if name == b"IEND":
            return
        yield name, view[at : at + _FRAME + length]
        at += _FRAME + length


def _chunk(name: bytes, content: bytes) -> bytes:
    return _length_and_name.pack(len(content), name) + content + struct.pack(">I", zlib.crc32(name + content))


def _is_intact(chunk: memoryview) -> bool:
    (length,) = struct.unpack_from(">I", chunk)
    return len(chunk) == _FRAME + length and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _transparency(said: bytes, depth: int, kind: int) -> bytes | None:
    """The content of a tRNS chunk in Pillow's form; None if libpng ignores the chunk."""
    if kind == _PALETTE:
        return said[:256]
    if kind == _GREY and len(said) == 2:
        (grey,) = struct.unpack(">H", said)
        grey &= (1 << depth) - 1
        return struct.pack(">H", grey if depth >= 8 else grey * 255 // ((1 << depth) - 1))  # Pillow spreads the pixels
    if kind == _RGB and len(said) == 6:
        if depth == 16:
            raise UnsupportedError("a PNG with 16 bits a sample and one transparent colour is not read")
        return bytes(value for low in said[1::2] for value in (0, low))
    return None


def _keyword(content: memoryview) -> bytes:
    return bytes(content[:80]).partition(b"\0")[0]


def _is_small_text(name: bytes, chunk: memoryview) -> bool:
    """Whether a text chunk is intact, and small enough for Pillow when unpacked."""
    if len(chunk) > _MOST_TEXT or not _is_intact(chunk):
        return False
    _, _, content = bytes(chunk[8:-4]).partition(b"\0")
    if name == b"zTXt":
        return content[:1] == b"\0" and _unpacks(content[1:])
    if name == b"iTXt" and content[:1] not in (b"", b"\0"):
        return _unpacks(content[2:].split(b"\0", 2)[-1])
    return True


def _unpacks(packed: bytes) -> bool:
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, _MOST_TEXT)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail
