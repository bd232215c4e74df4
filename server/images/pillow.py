"""Image bytes to the RGB pixels that a model wants, under limits that are checked before decoding."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import AvifImagePlugin, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from server.errors import ServerError, TooLargeError, UndecodableError, UnsupportedError
from server.images import avif, bmp, png, tiff
from server.images.image import JpegFile, Pixels
from server.images.jpeg import END, ENGINE_BYTES, ENGINE_PIXELS, MOST_SCANS, SAMPLINGS, START, scans_from, usual_jpeg
from server.images.limits import check_pixels
from server.images.orientation import orientation, turn_upright
from server.images.preprocessing import Preprocessing
from server.images.segments import without_segments
from server.images.unended import ended

Image.init()
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN)
_RESAMPLING = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
}
_ALWAYS_ALLOWED = 16  # aspect ratio that is resized whatever the pixel limit is
_LYING = (5, 6, 7, 8)  # EXIF orientations that swap rows and columns
_REPAIRED = "repaired"  # in `info` of an image whose file was repaired
_LEFT_TO_RESIZE = 2  # a JPEG is decoded at no less than this times the wanted size
_BAND_PIXELS = 1 << 18
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")

# By default one AVIF takes a thread for each CPU of the machine, even if the container may use fewer.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

# The header check below reports large images to the client, and odd metadata needs no warning for each file.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def decode(encoded: bytes, preprocessing: Preprocessing, max_pixels: int) -> bytes:
    """Decodes one image and brings it to the model's input size.

    Args:
        encoded: A whole image file.
        preprocessing: The model's sizes, crop and interpolation. The result equals timm's evaluation transform; nearly
            so for a JPEG of four times the size or more, which is decoded at half its size or less, in a third of the
            time.
        max_pixels: Largest width x height, read from the header.

    Returns:
        Rows of RGB bytes, height x width x 3.

    Raises:
        UndecodableError: Empty, truncated or broken.
        UnsupportedError: Not one of `FORMATS`.
        TooLargeError: More than `max_pixels`, in the file or after a thin strip is resized.
    """
    with _opened(encoded, max_pixels) as image:
        return _pixels(image, preprocessing, max_pixels)


def read(encoded: bytes, preprocessing: Preprocessing, max_pixels: int, decodes_jpeg: bool) -> Pixels | JpegFile:
    """The engine's input for an image file: pixels as by `decode`, or a JPEG for an engine that decodes.

    Only the header of such a JPEG is read. A JPEG that the engine's decoder may not know, or might misread, is decoded
    here: four colours, RGB instead of YCbCr, EXIF orientations, several pictures in one file, and cut-off files, which
    it would fill with grey.

    Args:
        encoded: A whole image file.
        preprocessing: See `decode`.
        max_pixels: See `decode`.
        decodes_jpeg: Whether the engine decodes.

    Raises:
        UndecodableError, UnsupportedError, TooLargeError: See `decode`.
    """
    with _opened(encoded, max_pixels) as image:
        if decodes_jpeg and _is_for_the_engine(encoded, image):
            _resized_size(image.size, preprocessing, max_pixels)
            return JpegFile(encoded, *image.size)
        return Pixels(_pixels(image, preprocessing, max_pixels))


def as_it_came(encoded: bytes, preprocessing: Preprocessing, max_pixels: int) -> JpegFile | None:
    """A file for an engine that decodes, if its header is plain enough; takes microseconds. `read` handles all others.

    Raises:
        TooLargeError: See `decode`.
    """
    size = usual_jpeg(encoded)
    if size is None or size[0] * size[1] > max_pixels:
        return None
    _resized_size(size, preprocessing, max_pixels)
    return JpegFile(encoded, *size)


def _is_for_the_engine(encoded: bytes, image: Image.Image) -> bool:
    return (
        isinstance(image, JpegImageFile)
        and image.format == "JPEG"  # not MPO, a JPEG with more pictures after it
        and _REPAIRED not in image.info
        and bool(image.tile)  # nvJPEG accepts a header without a scan
        and image.mode in ("L", "RGB")
        and bytes(16 * columns + rows for _, columns, rows, _ in image.layer) in SAMPLINGS
        and image.info.get("adobe_transform") != 0
        and bytes(component[0] for component in image.layer) != b"RGB"
        and image.width * image.height <= ENGINE_PIXELS
        and len(encoded) <= ENGINE_BYTES
        and encoded.endswith(END)
        and (not image.info.get("progressive") or scans_from(encoded, 0) <= MOST_SCANS)
        and orientation(image) == 1
    )


@contextmanager
def _opened(encoded: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Opens an image file and checks its header. All errors, also later ones, become the client's."""
    if not encoded:
        raise UndecodableError("the image is empty")
    try:
        with _identified(_readable(encoded, max_pixels)) as image:
            check_pixels(*image.size, max_pixels)
            yield image
    except (ServerError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnsupportedError(
            f"not an image in one of the formats {', '.join(FORMATS)}, or damaged", formats=FORMATS
        ) from None
    except Image.DecompressionBombError:
        raise TooLargeError(f"the image has more than {max_pixels} pixels", max_pixels=max_pixels) from None
    except Exception as error:  # Pillow raises arbitrary errors on broken bytes
        raise UndecodableError(f"the image cannot be decoded: {error}") from error


def _readable(encoded: bytes, max_pixels: int) -> bytes:
    """A file of the same picture whose pixels Pillow reads correctly; an error names a kind that it would misread."""
    if encoded.startswith(START):
        return ended(encoded, max_pixels)
    if encoded.startswith(png.SIGNATURE):
        return png.only_pixels(encoded)
    if encoded.startswith(tiff.SIGNATURES):
        return tiff.one_page(encoded)
    if encoded.startswith(bmp.SIGNATURE):
        return bmp.plain(encoded, max_pixels)
    if avif.is_avif(encoded):
        return avif.without_metadata(encoded)
    return encoded


def _identified(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        if not encoded.startswith(START):
            raise
        image = Image.open(io.BytesIO(without_segments(encoded)), formats=FORMATS)
        image.info[_REPAIRED] = True
        return image


def _pixels(image: Image.Image, preprocessing: Preprocessing, max_pixels: int) -> bytes:
    shrink, (width, height) = _shrink(image, preprocessing)
    image = _to_rgb(image)
    if shrink == 1:
        width, height = image.size
    size = _resized_size((width, height), preprocessing, max_pixels)
    if image.size != size:
        box = (0, 0, width / shrink, height / shrink)
        image = image.resize(size, _RESAMPLING[preprocessing.interpolation], box)
    left, top = preprocessing.crop_corner(*size)
    height, width = preprocessing.input_size
    return image.crop((left, top, left + width, top + height)).tobytes()


def _shrink(image: Image.Image, preprocessing: Preprocessing) -> tuple[int, tuple[int, int]]:
    """Lets a large JPEG be decoded at a half, a quarter or an eighth of its size, in a third of the time.

    Returns:
        The factor of reduction, 1 for none, and the whole upright image's width and height.
    """
    if not isinstance(image, JpegImageFile):
        return 1, image.size
    turned = orientation(image)
    size = image.size[::-1] if turned in _LYING else image.size
    shrink = shrink_of(size, preprocessing, is_upright=turned == 1)
    if shrink > 1:
        image.draft(None, (image.width // shrink, image.height // shrink))
    return shrink, size


def shrink_of(size: tuple[int, int], preprocessing: Preprocessing, is_upright: bool) -> int:
    """The factor by which a JPEG is reduced in decoding; 1 for none.

    Args:
        size: Width and height of the upright image.
        preprocessing: The model's sizes.
        is_upright: Whether the file stores it upright.
    """
    width, height = size
    to_width, to_height = preprocessing.resized(width, height)
    most = min(width // max(to_width, 1), height // max(to_height, 1)) // _LEFT_TO_RESIZE
    # If a side is not a multiple, its last reduced pixel covers more than there is; in a turned image it would be the
    # first.
    exact = (shrink for shrink in (8, 4, 2) if is_upright or not (width % shrink or height % shrink))
    return next((shrink for shrink in exact if shrink <= most), 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """The first frame, upright, in 8-bit RGB; transparent pixels become white."""
    turn_upright(image)
    if image.mode in _SIXTEEN_BITS:
        image = _eight_bits(image)
    elif image.mode == "La":  # grey multiplied by its alpha, which Pillow converts to LA only
        image = image.convert("LA")
    elif image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # as browsers do: an alpha that would hide everything is ignored
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 8 bits; a plain conversion would clip everything over 255 to white."""
    whole, hidden = image.convert("I"), image.info.get("transparency")
    grey = whole.point(tiff.shades(image), "L")
    grey.info.pop("transparency", None)  # a value of 16 bits
    if hidden is None:
        return grey
    alpha = whole.point(bytes(0 if value == hidden else 255 for value in range(1 << 16)), "L")
    return Image.merge("LA", (grey, alpha))


def _over_white(image: Image.Image) -> Image.Image:
    """An image with alpha on a white ground, a band of rows at a time, because the whole at once takes three more
    copies.
    """
    opaque = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        opaque.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return opaque


def _resized_size(size: tuple[int, int], preprocessing: Preprocessing, max_pixels: int) -> tuple[int, int]:
    """Width and height before the crop, of an image of this width and height."""
    width, height = preprocessing.resized(*size)
    if width * height > max(max_pixels, _ALWAYS_ALLOWED * preprocessing.resize_size[0] ** 2):
        raise TooLargeError(
            f"the image is too thin: {size[0]} x {size[1]} would become {width} x {height} pixels; "
            f"at most {max_pixels} are allowed",
            max_pixels=max_pixels,
        )
    return width, height
