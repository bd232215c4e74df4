"""The orientation of an image by its EXIF or XMP. Unreadable metadata is ignored."""

from __future__ import annotations

from PIL import ExifTags, Image, ImageOps


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, from 1 (upright) to 8; 1 if none can be read."""
    try:
        said = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow raises arbitrary errors on broken bytes
        return 1
    return said if isinstance(said, int) and 1 <= said <= 8 else 1


def turn_upright(image: Image.Image) -> None:
    """Decodes an image and turns its pixels in place, without a second copy of them."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # only the metadata is broken
        pass
