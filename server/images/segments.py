"""JPEG files without what programs have written into them beside the image.

Pillow refuses a file for a segment that is too short for what it begins as. libjpeg passes over such segments.
"""

from __future__ import annotations

from server.images.jpeg import APP0, APP1, APP14, APP15, COMMENT, SCAN, START, read_segment

_JFIF, _ADOBE = b"JFIF\0", b"Adobe"
_LENGTHS = {_JFIF: 14, _ADOBE: 12}


def without_segments(encoded: bytes) -> bytes:
    """A JPEG of the same pixels and orientation.

    What names the colours (JFIF, Adobe) stays where it is whole. So do EXIF and XMP, of which Pillow takes anything.

    Args:
        encoded: A file that begins as a JPEG.
    """
    kept, at = [START], len(START)
    while at + 4 <= len(encoded):
        mark, kind, length = read_segment(encoded, at)
        if mark != 0xFF or kind == SCAN:
            break
        if kind == 0xFF:  # one more of those before a mark
            at += 1
            continue
        end = at + 2 + length
        is_programs = APP0 <= kind <= APP15 or kind == COMMENT
        if not is_programs or _counts(kind, encoded[at + 4 : end]):
            kept.append(encoded[at:end])
        at = end
    return b"".join([*kept, encoded[at:]])


def _counts(kind: int, content: bytes) -> bool:
    name = {APP0: _JFIF, APP14: _ADOBE}.get(kind)
    return kind == APP1 or (name is not None and content.startswith(name) and len(content) >= _LENGTHS[name])
