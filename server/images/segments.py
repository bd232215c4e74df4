"""JPEG files without the application segments besides the image.

Pillow refuses a file with a segment that is too short for its kind. libjpeg ignores such segments.
"""

from __future__ import annotations

from server.images.jpeg import APP0, APP1, APP14, APP15, COMMENT, SCAN, START, read_segment

_JFIF, _ADOBE = b"JFIF\0", b"Adobe"
_LENGTHS = {_JFIF: 14, _ADOBE: 12}


def without_segments(encoded: bytes) -> bytes:
    """A JPEG of the same pixels and orientation.

    Segments that define the colours (JFIF, Adobe) stay if they are complete. EXIF and XMP stay, because Pillow accepts
    any content in them.

    Args:
        encoded: A file that begins like a JPEG.
    """
    kept, at = [START], len(START)
    while at + 4 <= len(encoded):
        mark, kind, length = read_segment(encoded, at)
        if mark != 0xFF or kind == SCAN:
            break
        if kind == 0xFF:  # padding before a mark
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
