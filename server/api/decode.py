"""Image bytes to the RGB pixels that a model wants, under limits that are checked before anything is decoded."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

from server.errors import ServerError, TooLargeError, UndecodableError, UnsupportedError
from server.types import Preprocessing

Image.init()
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN)
_RESAMPLING = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
}
_ALWAYS_ALLOWED = 16  # aspect ratio that is resized whatever the pixel cap is
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")

# The header check below is stricter than Pillow's warning and gives the client an answer.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def decode(encoded: bytes, preprocessing: Preprocessing, max_pixels: int) -> bytes:
    """Decodes one image and brings it to the model's input size.

    Args:
        encoded: A whole image file.
        preprocessing: Sizes, crop and interpolation of the model; its result equals timm's evaluation transform.
        max_pixels: Largest width x height, read from the header.

    Returns:
        Rows of RGB bytes, height x width x 3.

    Raises:
        UndecodableError: Empty, truncated or broken.
        UnsupportedError: Not one of `FORMATS`.
        TooLargeError: More than `max_pixels`: in the file, or once the shorter side of a thin strip fits the model.
    """
    if not encoded:
        raise UndecodableError("the image is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise TooLargeError(
                    f"the image has {image.width} x {image.height} pixels; at most {max_pixels} are allowed",
                    max_pixels=max_pixels,
                )
            resized = _resized(_to_rgb(image), preprocessing, max_pixels)
            return _crop(resized, preprocessing).tobytes()
    except (ServerError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnsupportedError(
            f"not an image in one of the formats {', '.join(FORMATS)}, or damaged", formats=FORMATS
        ) from None
    except Image.DecompressionBombError:
        raise TooLargeError(f"the image has more than {max_pixels} pixels", max_pixels=max_pixels) from None
    except Exception as error:  # Pillow's readers raise whatever broken bytes lead them to
        raise UndecodableError(f"the image cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """The first frame, upright, in 8-bit RGB; what is transparent becomes white."""
    mode = image.mode
    image = ImageOps.exif_transpose(image)
    if mode in _SIXTEEN_BITS:
        # A plain conversion would clip everything over 255 to white.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif mode == "F":
        raise UndecodableError("floating-point images have no defined brightness; send 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _resized(image: Image.Image, preprocessing: Preprocessing, max_pixels: int) -> Image.Image:
    """The shorter side, or both to squash, at the model's size; rounds as torchvision does."""
    height, width = preprocessing.resize_size
    if preprocessing.crop_mode == "center":
        short = min(image.size)
        width, height = (height if side == short else int(height * side / short) for side in image.size)
    if width * height > max(max_pixels, _ALWAYS_ALLOWED * preprocessing.resize_size[0] ** 2):
        raise TooLargeError(
            f"the image is too thin: {image.width} x {image.height} would become {width} x {height} pixels; "
            f"at most {max_pixels} are allowed",
            max_pixels=max_pixels,
        )
    if image.size == (width, height):
        return image
    return image.resize((width, height), _RESAMPLING[preprocessing.interpolation])


def _crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """The centre of the image, at the model's input size; rounds as torchvision does."""
    height, width = preprocessing.input_size
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
