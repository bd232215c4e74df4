"""AVIF files without EXIF and XMP: libavif refuses a file with broken EXIF, and neither of them orients an AVIF.

Its own properties (`irot`, `imir`) orient it, by the specification and in browsers.
"""

from __future__ import annotations

import re

_METADATA = re.compile(rb"(infe[\2\3]\0\0.(?:..|\0\0..)\0\0)(?:Exif|mime)", re.DOTALL)
"""The entry of such an item in the file's list: version, flags, number, protection, kind."""


def is_avif(encoded: bytes) -> bool:
    """Whether a file begins like an AVIF."""
    return encoded[4:8] == b"ftyp"


def without_metadata(encoded: bytes) -> bytes:
    """The file with its EXIF and XMP declared as items of an unknown kind, which decoders ignore."""
    return _METADATA.sub(rb"\1free", encoded)
