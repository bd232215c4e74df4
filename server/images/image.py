"""An image on its way to a model: pixels, or a JPEG file for an engine that decodes."""

from __future__ import annotations

from msgspec import Struct


class Pixels(Struct, frozen=True, array_like=True, gc=False, tag="pixels"):
    """A resized and cropped image, not yet normalised.

    Attributes:
        data: RGB bytes, height x width x 3.
    """

    data: bytes


class JpegFile(Struct, frozen=True, array_like=True, gc=False, tag="jpeg"):
    """A JPEG file as the client sent it; its header has been checked.

    Attributes:
        data: The file.
        width: Pixels, by its header.
        height: Pixels, by its header.
    """

    data: bytes
    width: int
    height: int


Image = Pixels | JpegFile
