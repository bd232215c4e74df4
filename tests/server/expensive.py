"""Small image files that are expensive to decode, each of another kind."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image


def segment(kind: int, content: bytes) -> bytes:
    """A segment of a JPEG."""
    return bytes((0xFF, kind)) + struct.pack(">H", len(content) + 2) + content


def jpeg(width: int = 64, height: int = 48, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(file, "JPEG", **options)
    return file.getvalue()


def jpeg_with(segments: bytes, encoded: bytes | None = None) -> bytes:
    """A JPEG with more segments at its start."""
    encoded = encoded or jpeg()
    return encoded[:2] + segments + encoded[2:]


def many_scans(scans: int, side: int) -> bytes:
    """A progressive JPEG in grey whose scans say, in a few bytes each, that there is nothing more."""
    frame = struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])
    # Codes of one bit: the empty difference, and a run of 2^14 + 14 bits of blocks in which nothing is left.
    codes = (bytes([kind, 1]) + bytes(15) + bytes([symbol]) for kind, symbol in ((0x10, 0xE0), (0x00, 0x00)))
    blocks, bits = ((side + 7) // 8) ** 2, ""
    while blocks > 0:
        run = max(min(blocks, 32767), 16384)
        bits += "0" + format(run - 16384, "014b")
        blocks -= run
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = segment(0xDA, bytes([1, 1, 0x00, 1, 63, 0])) + coded
    tables = segment(0xDB, b"\0" + bytes([1] * 64)) + segment(0xC2, frame) + b"".join(segment(0xC4, c) for c in codes)
    return b"\xff\xd8" + tables + scan * scans + b"\xff\xd9"


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, colours: int = 2, channels: int = 3, more: bytes = b"") -> bytes:
    """A PNG of zeros, with more chunks before its pixels."""
    packer, row = zlib.compressobj(9), bytes(1 + width * channels)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def directory(entries: int, of_bytes: int) -> bytes:
    """EXIF whose entries all have the same bytes for a value."""
    start = 10 + 12 * entries
    tags = b"".join(struct.pack("<HHII", 256 + tag, 7, of_bytes, start) for tag in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + tags + bytes(of_bytes)


def tiff_of_strips(strips: int) -> bytes:
    """A TIFF of that many rows, each a strip; all are the same bytes."""
    start = 8 + 2 + 12 * 8 + 4
    values = {256: 1, 257: strips, 258: 8, 259: 1, 262: 1, 273: None, 278: 1, 279: None}
    tags = b"".join(
        struct.pack("<HHII", tag, 3 if value is None else 4, 1 if value is not None else strips, value or start)
        for tag, value in values.items()
    )
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(values)) + tags + bytes(4) + struct.pack("<H", 8) * strips
