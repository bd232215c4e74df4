"""JPEG headers, read without Pillow: whether an engine can decode a file, and the size of its image.

The answer is no in any doubt; then Pillow looks again, in ten times the time. Pillow's header reader accepts every file
that passes here (a test compares the two). All usual photos of cameras and image programs pass.
"""

from __future__ import annotations

import re
import struct

ENGINE_PIXELS = 1 << 24
ENGINE_BYTES = 1 << 22
"""The largest JPEG for the engine: a photo of 16 megapixels, and a weight that a full queue can hold."""

MOST_SEGMENTS = 256
"""Most segments before the first scan. Cameras that keep a depth map in XMP write some 60."""

MOST_SCANS = 20
"""Most scans: each may visit the whole image, for a few bytes. libjpeg writes 10, other encoders up to about 16."""

_LEAST_SCAN = 10  # bytes
_BLOCK_VISITS = 1 << 25
"""Blocks of 8 x 8 times scans that take negligible time: a third of a second of libjpeg."""
_MOST_SEARCHED = 1 << 18  # bytes, in 0.15 ms
_WINDOW = 1 << 20

START, END = b"\xff\xd8", b"\xff\xd9"

_FRAMES = (0xC0, 0xC2)  # baseline and progressive, 8 bits, Huffman; others are rare
SCAN, _QUANTIZATION, _HUFFMAN, _RESTARTS, COMMENT = 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
APP0, APP1, APP2, APP13, APP14, APP15 = 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xEF
_YCBCR = (bytes((1, 2, 3)), bytes((0, 1, 2)))
"""Names of components that all decoders read as luminance and two colours."""

SAMPLINGS = frozenset(map(bytes, [(0x11,), *((luminance, 0x11, 0x11) for luminance in (0x11, 0x21, 0x22, 0x12))]))
"""Samplings of components (columns, then rows, half a byte each) for which libjpeg and nvJPEG are known to agree."""

_scan_marks = re.compile(rb"\xff\xda").findall  # 0.5 ms a megabyte; bytes.count takes three times as long
read_segment = struct.Struct(">BBH").unpack_from
"""255, the kind of a segment, and its length, which includes itself."""
read_frame = struct.Struct(">BHHB").unpack_from
"""The start of a frame: bits a sample, height, width and components."""
_said_by_xmp = re.compile(rb'tiff:Orientation(?:="|>)([0-9])').search
_ORIENTATION, _SHORT = 0x0112, 3


def usual_jpeg(encoded: bytes) -> tuple[int, int] | None:
    """Reads the header of a file, up to its first scan.

    Returns:
        Width and height if the file is a complete JPEG of one or three colours, upright, with one picture, within the
        engine's limits; otherwise, or in doubt, None.
    """
    if not (encoded.startswith(START) and encoded.endswith(END) and len(encoded) <= ENGINE_BYTES):
        return None
    try:
        return _read(encoded)
    except (struct.error, IndexError):  # it ends within its header
        return None


def _read(encoded: bytes) -> tuple[int, int] | None:
    size: tuple[int, int] | None = None
    samplings, components, baseline, exifs = b"", 0, False, 0
    at = len(START)
    for _ in range(MOST_SEGMENTS):
        mark, kind, length = read_segment(encoded, at)
        start, at = at + 4, at + 2 + length
        if mark != 0xFF or length < 2 or at > len(encoded):
            return None
        if kind == _QUANTIZATION:
            # Tables of 8 bits, each after its number.
            if (length - 2) % 65 or max(encoded[start:at:65], default=0) > 3:
                return None
        elif kind in (_HUFFMAN, COMMENT, _RESTARTS):
            pass
        elif kind in _FRAMES:
            bits, height, width, components = read_frame(encoded, start)
            names = encoded[start + 6 : at : 3]
            if size or bits != 8 or length != 8 + 3 * components or not 0 < width * height <= ENGINE_PIXELS:
                return None
            samplings = encoded[start + 7 : at : 3]
            if samplings not in SAMPLINGS or (components == 3 and names not in _YCBCR):
                return None
            size, baseline = (width, height), kind == _FRAMES[0]
        elif kind == SCAN:
            scanned = encoded[start]
            together = scanned == components or not baseline
            is_whole = together and length == 6 + 2 * scanned and at < len(encoded) - len(END)
            if size is None or not is_whole:
                return None
            return size if baseline or _has_few_scans(encoded, at, blocks_of(samplings, *size)) else None
        elif kind == APP1:
            content = encoded[start:at]
            exifs += content.startswith(b"Exif\0\0")
            if exifs > 1 or not is_upright(content):
                return None
        elif not (APP0 <= kind <= APP15 and _is_harmless(kind, encoded[start:at])):
            return None
    return None


def blocks_of(samplings: bytes, width: int, height: int) -> int:
    """Blocks of 8 x 8 samples of all components, by their samplings: columns, then rows, half a byte each."""
    across = max((sampling >> 4 for sampling in samplings), default=1) or 1
    down = max((sampling & 15 for sampling in samplings), default=1) or 1
    units = -(-width // (8 * across)) * -(-height // (8 * down))  # the units that are coded together
    return units * sum((sampling >> 4) * (sampling & 15) for sampling in samplings)


def scans_from(encoded: bytes, at: int) -> int:
    """Counts the scans of a JPEG from a place on.

    Coded data never contains a scan's mark, because each of its bytes 255 is followed by 0. Segments between scans may,
    so the count may be too high, but never too low. The search goes by windows, so that other threads get Python's lock
    between them.
    """
    windows = range(at, len(encoded), _WINDOW)
    return sum(len(_scan_marks(encoded, start, start + _WINDOW + 1)) for start in windows)


def _has_few_scans(encoded: bytes, at: int, blocks: int) -> bool:
    """Whether a progressive file has few enough scans for its size; False if counting them takes long."""
    if (len(encoded) - at) // _LEAST_SCAN * blocks <= _BLOCK_VISITS:
        return True
    return len(encoded) - at <= _MOST_SEARCHED and 1 + scans_from(encoded, at) <= MOST_SCANS


def _is_harmless(kind: int, content: bytes) -> bool:
    """Whether an application's segment neither describes the image nor makes Pillow fail."""
    if kind == APP0:
        return not content.startswith(b"JFIF") or len(content) >= 12
    if kind == APP2:  # a profile, or a list of more pictures
        return not content.startswith(b"MPF") and (not content.startswith(b"ICC_PROFILE\0") or len(content) >= 14)
    if kind == APP13:
        return content[-6:-2] != b"8BIM"
    if kind == APP14:
        return not content.startswith(b"Adobe") or content[11:12] == b"\1"  # luminance and two colours
    return True


def is_upright(content: bytes) -> bool:
    """Whether neither EXIF nor XMP turns the image."""
    if content.startswith(b"http://ns.adobe.com/xap/"):
        said = _said_by_xmp(content)
        return said is None or said[1] == b"1"
    if not content.startswith(b"Exif\0\0"):
        return True
    tiff = content[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return False
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, first)
    entries = tiff[first + 2 : first + 2 + 12 * count]
    return len(entries) == 12 * count and all(
        (kind, number, value) == (_SHORT, 1, 1)
        for tag, kind, number, value in struct.iter_unpack(order + "HHIH2x", entries)
        if tag == _ORIENTATION
    )
