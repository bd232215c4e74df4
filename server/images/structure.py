"""The structure of an image file, read without a decoder: its size, memory for each pixel, and whether it is plain.

A file is plain if its size in pixels tells how much memory and time decoding takes. It has a common format, and no more
segments, scans or metadata than cameras and image programs write. Other small files can take seconds or gigabytes:
directories whose entries all point to the same bytes, thousands of scans, comments in many pieces. TIFF and AVIF are
never plain: they are rare, and can be expensive in too many ways.

Each reader looks at a bounded number of fields. In doubt, the file is not plain.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from server.images import bmp
from server.images.avif import is_avif
from server.images.jpeg import (
    APP1,
    APP2,
    APP13,
    MOST_SCANS,
    MOST_SEGMENTS,
    SCAN,
    START,
    blocks_of,
    is_upright,
    read_frame,
    read_segment,
    scans_from,
)
from server.images.unended import has_end

_MOST_CHUNKS = 4096
_MOST_METADATA = 1 << 20
_MOST_EXIF = 4096
_MOST_DIRECTORY = 128  # entries: each may take as many bytes as the whole segment has
_MOST_RESOURCES = 8
_MOST_BLOCKS = 1024
_MOST_ENTRIES = 512


@dataclass(frozen=True, slots=True)
class Structure:
    """Facts about an image file before decoding.

    Attributes:
        width, height: Pixels; 0 if unknown.
        bytes_per_pixel: Most bytes that decoding holds at once.
        is_plain: Whether memory and time follow from the size.
        copies: Most copies of the file that its reader makes.
        coefficients: Bytes that a decoder holds besides the pixels, like libjpeg for several scans.
        blocks, scans: Of a JPEG: its blocks of 8 x 8 samples, and its scans, each of which may visit every block.
        parts: Strips or tiles of a TIFF; otherwise 0.
        may_shrink: Whether it is a JPEG, which can be decoded at a reduced size.
        is_upright: Whether no metadata turns it.
    """

    width: int
    height: int
    bytes_per_pixel: float
    is_plain: bool
    copies: int = 0
    coefficients: int = 0
    blocks: int = 0
    scans: int = 0
    parts: int = 0
    may_shrink: bool = False
    is_upright: bool = False


_ANY = Structure(0, 0, 18, False, copies=3)
_OF_JPEG = 8.5
_chunk = struct.Struct(">I4s").unpack_from
_riff = struct.Struct("<4sI").unpack_from


def structure_of(encoded: bytes) -> Structure | None:
    """Reads the structure of a file. The result is None for a file of another format, which costs nothing to refuse."""
    read = next((read for starts, read in _READERS if encoded.startswith(starts)), None)
    if read is None:
        if not is_avif(encoded):
            return None
        read = _avif
    try:
        return read(encoded)
    except (struct.error, IndexError):  # it ends within a field
        return _ANY


def _jpeg(encoded: bytes) -> Structure:
    width = height = blocks = components = exifs = resources = 0
    progressive, upright, plain, at = False, True, True, len(START)
    for _ in range(MOST_SEGMENTS):
        mark, kind, length = read_segment(encoded, at)
        start, at = at + 4, at + 2 + length
        if mark != 0xFF or length < 2 or kind < 0xC0 or 0xD0 <= kind <= 0xD9:
            break
        if kind == SCAN:
            # For several scans the decoder keeps all coefficients, 2 bytes each, until the last scan.
            several = progressive or encoded[start] < components
            scans = 1 + (scans_from(encoded, at) if several else 0)
            plain = plain and blocks > 0 and scans <= MOST_SCANS
            kept = 128 * blocks if several else 0
            if not has_end(encoded):  # `unended.py` decodes it several times, at its full size
                return Structure(width, height, _OF_JPEG, False, 4, kept, blocks, scans, 0, False, upright)
            return Structure(width, height, _OF_JPEG, plain, 1, kept, blocks, scans, 0, True, upright)
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            plain = plain and kind <= 0xC2 and not blocks
            bits, height, width, components = read_frame(encoded, start)
            plain = plain and bits == 8 and components in (1, 3, 4)
            progressive, blocks = kind > 0xC1, blocks_of(encoded[start + 7 : at : 3], width, height)
        elif kind == APP1:
            content = encoded[start:at]
            if content.startswith(b"Exif\0\0"):
                exifs += 1
                plain = plain and exifs == 1 and _directory(content[6:]) <= _MOST_DIRECTORY
            upright = upright and _is_upright(content)
        elif kind == APP2:
            plain = plain and (length <= _MOST_EXIF or not encoded.startswith(b"MPF", start))
        elif kind == APP13:
            resources += 1
            plain = plain and resources <= _MOST_RESOURCES
    return Structure(width, height, _OF_JPEG, False, may_shrink=True)


def _is_upright(content: bytes) -> bool:
    try:
        return is_upright(content)
    except struct.error:  # broken metadata, which may say anything
        return False


def _directory(tiff: bytes) -> int:
    """The declared number of entries in the first EXIF directory."""
    order = ">" if tiff.startswith(b"MM") else "<"
    try:
        (first,) = struct.unpack_from(order + "I", tiff, 4)
        return int(struct.unpack_from(order + "H", tiff, first)[0])
    except struct.error:
        return 0


def _png(encoded: bytes) -> Structure:
    width, height, bits, colours = struct.unpack_from(">IIBB", encoded, 16)
    if encoded[12:16] != b"IHDR":  # the header is misplaced, so its fields are not read here
        return _ANY
    at, metadata, plain, transparent = 8, 0, True, colours in (4, 6)
    for _ in range(_MOST_CHUNKS):
        if at + 8 > len(encoded):
            break
        length, kind = _chunk(encoded, at)
        if kind == b"IEND":
            break
        if kind != b"IDAT":
            metadata += length
            transparent = transparent or kind == b"tRNS"
            is_profile = kind in (b"tEXt", b"zTXt", b"iTXt") and encoded.startswith(b"Raw profile", at + 8)
            if kind in (b"acTL", b"fdAT") or is_profile or (kind == b"eXIf" and length > _MOST_EXIF):
                plain = False
        at += 12 + length
    else:
        plain = False
    if bits == 16 and transparent:
        bytes_per_pixel = 15.5
    elif bits == 16 or transparent:
        bytes_per_pixel = 10.5
    else:
        bytes_per_pixel = 8.5 if colours == 2 else 6.0
    return Structure(width, height, bytes_per_pixel, plain and metadata <= _MOST_METADATA, copies=1)


def _webp(encoded: bytes) -> Structure:
    at, width, height, plain = 12, 0, 0, encoded[8:12] == b"WEBP"
    for _ in range(16):
        if at + 8 > len(encoded):
            break
        kind, length = _riff(encoded, at)
        start = at + 8
        if kind == b"VP8X":
            plain = plain and not encoded[start] & 2  # an animation
            width, height = (
                1 + int.from_bytes(encoded[place : place + 3], "little") for place in (start + 4, start + 7)
            )
        elif kind == b"VP8 " and not width:
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", encoded, start + 6))
        elif kind == b"VP8L" and not width:
            (sides,) = struct.unpack_from("<I", encoded, start + 1)
            width, height = 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
        elif kind == b"EXIF":
            plain = plain and length <= _MOST_EXIF
        at = start + length + length % 2
    else:
        plain = False
    return Structure(width, height, 18, plain, copies=3)


def _gif(encoded: bytes) -> Structure:
    width, height, flags = struct.unpack_from("<HHB", encoded, 6)
    at = 13 + (3 << 1 + (flags & 7) if flags & 0x80 else 0)
    steps = iter(range(_MOST_BLOCKS))  # for both loops together
    for _ in steps:
        if encoded[at] == 0x2C:
            left, top, columns, rows = struct.unpack_from("<HHHH", encoded, at + 1)
            return Structure(max(width, left + columns), max(height, top + rows), 6.5, True)
        if encoded[at] != 0x21:
            break
        at += 2
        for _ in steps:
            length = encoded[at]
            at += 1 + length
            if not length:
                break
    return Structure(width, height, 6.5, False)


def _bmp(encoded: bytes) -> Structure:
    (header,) = struct.unpack_from("<I", encoded, 14)
    if header < 16:
        width, height = struct.unpack_from("<HH", encoded, 18)
        return Structure(width, height, 9, header == 12, copies=1)
    width, height, _, _, compression = struct.unpack_from("<iiHHI", encoded, 18)
    return Structure(abs(width), abs(height), 9, compression in (0, 3), copies=1)  # others are unpacked in Python


def _tiff(encoded: bytes) -> Structure:
    order = ">" if encoded.startswith(b"MM") else "<"
    version, first = struct.unpack_from(order + "HI", encoded, 2)
    if version != 42:
        return _ANY
    (count,) = struct.unpack_from(order + "H", encoded, first)
    sides, parts = {256: 0, 257: 0}, 0
    for at in range(first + 2, first + 2 + 12 * min(count, _MOST_ENTRIES), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", encoded, at)
        if tag in sides:
            (sides[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), encoded, at + 8)
        elif tag in (273, 279, 324, 325):  # places and lengths of strips or tiles
            parts = max(parts, number)
    return replace(_ANY, width=sides[256], height=sides[257], parts=parts)


def _avif(encoded: bytes) -> Structure:
    """The size of the largest part; the parts of a grid have sizes of their own."""
    largest, at = (0, 0), 0
    for _ in range(_MOST_ENTRIES):
        at = encoded.find(b"ispe", at) + 4
        if at < 4:
            break
        largest = max(largest, struct.unpack_from(">II", encoded, at + 4), key=lambda size: size[0] * size[1])
    return replace(_ANY, width=largest[0], height=largest[1])


_READERS: tuple[tuple[tuple[bytes, ...], Callable[[bytes], Structure]], ...] = (
    ((START,), _jpeg),
    ((b"\x89PNG",), _png),
    ((b"RIFF",), _webp),
    ((b"GIF8",), _gif),
    ((bmp.SIGNATURE,), _bmp),
    ((b"II", b"MM"), _tiff),
)
