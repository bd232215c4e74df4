"""An image on its way to a model: pixels, or a JPEG file for an engine that decodes."""

from __future__ import annotations

from msgspec import Struct


class Pixels(Struct, frozen=True, array_like=True, gc=False, tag="pixels"):
    """An image as a model's preprocessing leaves it, not yet normalised.

    Attributes:
        data: RGB bytes, height x width x 3.
    """

    data: bytes


class JpegFile(Struct, frozen=True, array_like=True, gc=False, tag="jpeg"):
    """A JPEG file as it came; its header has been read.

    Attributes:
        data: The file.
        width: In pixels, as the header says.
        height: In pixels, as the header says.
    """

    data: bytes
    width: int
    height: int


Image = Pixels | JpegFile
