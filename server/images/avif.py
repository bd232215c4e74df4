"""AVIF files without EXIF and XMP: libavif gives up a file whose EXIF is broken, and neither of them turns an AVIF.

What turns it are its own properties (`irot`, `imir`), as the format's specification says and browsers do.
"""

from __future__ import annotations

import re

_METADATA = re.compile(rb"(infe[\2\3]\0\0.(?:..|\0\0..)\0\0)(?:Exif|mime)", re.DOTALL)
"""The entry of such an item in the file's list: version, flags, number, protection, kind."""


def is_avif(encoded: bytes) -> bool:
    """Whether a file begins as AVIF does."""
    return encoded[4:8] == b"ftyp"


def without_metadata(encoded: bytes) -> bytes:
    """The file with its EXIF and XMP declared as items of no known kind, which decoders leave alone."""
    return _METADATA.sub(rb"\1free", encoded)
