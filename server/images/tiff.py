"""TIFF: selects the page of the image, with only the tags that its pixels need, if its kind is known to be read
correctly.

A dozen tags of a TIFF define the meaning of its samples, and Pillow respects only some of them: it clips 32 bits, reads
signed samples as unsigned, and mixes up uncompressed planes of 16 bits. So the tags are compared with a list of
combinations that give the right pixels, as a test proves. Every other combination is refused by its name. libtiff reads
the listed ones, with any compression, from a directory that holds nothing else: tags that do not concern the pixels
cannot prevent the reading.
"""

from __future__ import annotations

import struct

from PIL import Image, TiffImagePlugin

from server.errors import UndecodableError, UnsupportedError
from server.images import libtiff
from server.images.tiff_pages import HEIGHT, NUMBERS, WIDTH, Page, Tag, image_of

SIGNATURES = tuple(TiffImagePlugin.PREFIXES)

libtiff.silence()
TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader supports neither planes of 16 bits nor tiles of planes

_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 258, 259, 262, 266
_ORIENTATION, _SAMPLES, _PLANES, _PREDICTOR, _PALETTE = 274, 277, 284, 317, 320
_INKS, _EXTRA, _FORMAT, _SUBSAMPLING = 332, 338, 339, 530
_KEPT = frozenset(
    [WIDTH, HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION, _SAMPLES, _PLANES, _PREDICTOR]
    + [_PALETTE, _EXTRA]
    + [273, 278, 279, 322, 323, 324, 325]  # places of strips or tiles
    + [292, 293, 347, 529, 530, 531, 532]  # options of fax codes, tables of JPEG, the meaning of YCbCr
)

_WHITE, _BLACK, _RGB, _PALETTED, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_NAMES = {
    _WHITE: "grey (white is 0)", _BLACK: "grey", _RGB: "RGB", _PALETTED: "palette", 4: "mask", _CMYK: "CMYK",
    _YCBCR: "YCbCr", _LAB: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "raw sensor", 34892: "raw sensor (linear)",
}  # fmt: skip
_COLOURS = {_RGB: 3, _CMYK: 4, _YCBCR: 3, _LAB: 3}
_UNSPECIFIED, _PREMULTIPLIED, _ALPHA = 0, 1, 2

_GREYS: dict[int, list[tuple[int, ...]]] = {bits: [()] for bits in (1, 2, 4, 8, 12, 16)}
_ALPHAS: list[tuple[int, ...]] = [(), (_UNSPECIFIED,), (_PREMULTIPLIED,), (_ALPHA,)]
_READ: dict[int, dict[int, list[tuple[int, ...]]]] = {
    _WHITE: _GREYS,
    _BLACK: _GREYS | {8: _ALPHAS},
    _RGB: {8: [*_ALPHAS, *((*alpha, *more) for alpha in _ALPHAS[1:] for more in ((0,), (0, 0)))], 16: _ALPHAS},
    _PALETTED: {1: [()], 2: [()], 4: [()], 8: [(), (_UNSPECIFIED,), (_ALPHA,)]},
    _CMYK: {8: [(), (_UNSPECIFIED,), (_UNSPECIFIED, _UNSPECIFIED)], 16: [()]},
    _YCBCR: {8: [()]},
    _LAB: {8: [()]},
}
"""The supported extra samples, by photometric interpretation and bits a sample."""

_NONE, _JPEG = 1, 7
_FAX = (3, 4)  # but not 2, whose last row libtiff may lose
_PREDICTED = (5, 8, 32946, 34925, 50000)  # LZW, Deflate by both its numbers, LZMA, Zstandard
_COMPRESSIONS = (_NONE, _JPEG, *_FAX, *_PREDICTED, 32773)  # the last is PackBits
_BY_JPEG = (_BLACK, _RGB, _CMYK, _YCBCR)
_FORMATS = {2: "signed samples", 3: "floating-point samples", 5: "complex samples", 6: "complex samples"}
_UNSIGNED, _UNDEFINED = 1, 4

# Kinds of grey that Pillow's table lacks; `shades` converts them to 8 bits.
for _order, _suffix in ((TiffImagePlugin.II, ""), (TiffImagePlugin.MM, "B")):
    for _shade in (_WHITE, _BLACK):
        TiffImagePlugin.OPEN_INFO[(_order, _shade, (1,), 1, (12,), ())] = ("I;16", "I;12")
        TiffImagePlugin.OPEN_INFO[(_order, _shade, (1,), 1, (16,), ())] = ("I;16" + _suffix, "I;16" + _suffix)


def one_page(encoded: bytes) -> bytes:
    """A TIFF whose first directory is that of the image, with only the tags that its pixels need.

    The image is the first page. If that is a thumbnail (as in DNG), the image is the largest page that is not.

    Args:
        encoded: A file that begins with one of `SIGNATURES`.

    Raises:
        UnsupportedError: The kind of the page is not known to be read correctly.
        UndecodableError: Its directory is broken.
    """
    try:
        page = image_of(encoded)
        _check_kind(page)
        return _alone(page)
    except struct.error:
        raise UndecodableError("the TIFF's directory is cut off") from None


def _check_kind(page: Page) -> None:
    """Refuses a page whose kind is not listed, and names the kind."""
    if _PHOTOMETRIC not in page.tags:
        raise UndecodableError("the TIFF does not say what its samples mean (no PhotometricInterpretation)")
    photometric, compression = page.value(_PHOTOMETRIC), page.value(_COMPRESSION, _NONE)
    samples, bits, extra = page.value(_SAMPLES, 1), page.values(_BITS, (1,)), page.values(_EXTRA)
    colour = _NAMES.get(photometric, f"photometric interpretation {photometric}")
    if photometric not in _READ:
        raise UnsupportedError(f"a TIFF with {colour} pixels is not read")
    if compression not in _COMPRESSIONS or (compression in _FAX and bits != (1,)):
        raise UnsupportedError(f"a TIFF with compression {compression} is not read")
    for format in page.values(_FORMAT, (_UNSIGNED,)):
        if format not in (_UNSIGNED, _UNDEFINED):
            raise UnsupportedError(f"a TIFF with {_FORMATS.get(format, f'samples of format {format}')} is not read")
    if min(bits) != max(bits) or len(bits) not in (1, samples):
        raise UnsupportedError(f"a TIFF with samples of {', '.join(map(str, bits[:8]))} bits is not read")
    if photometric == _RGB and samples == 4 and not extra:
        extra = (_ALPHA,)  # as all readers interpret an undeclared fourth sample
    if extra not in _READ[photometric].get(bits[0], []) or samples != _COLOURS.get(photometric, 1) + len(extra):
        more = f" and extra samples {list(extra)}" if extra else ""
        raise UnsupportedError(f"a TIFF with {bits[0]} bits a sample, {samples} a pixel ({colour}){more} is not read")
    _check_layout(page, photometric, extra)
    _check_coding(page, photometric, compression, bits[0])


def _check_layout(page: Page, photometric: int, extra: tuple[int, ...]) -> None:
    planes = page.value(_PLANES, 1)
    if planes not in (1, 2):
        raise UnsupportedError(f"a TIFF with planes of kind {planes} is not read")
    has_odd_alpha = any(extra) and (photometric != _RGB or extra != page.values(_EXTRA)[:1])
    if planes == 2 and (has_odd_alpha or photometric == _LAB):
        raise UnsupportedError(f"a TIFF with planes of {_NAMES[photometric]}{' and alpha' * any(extra)} is not read")
    if page.value(_COMPRESSION, _NONE) == _JPEG and (extra or planes == 2 or photometric not in _BY_JPEG):
        raise UnsupportedError(f"a TIFF with JPEG of {_NAMES[photometric]}, planes or extra samples is not read")
    if photometric == _CMYK and page.value(_INKS, 1) != 1:
        raise UnsupportedError("a TIFF with inks other than CMYK is not read")


def _check_coding(page: Page, photometric: int, compression: int, bits: int) -> None:
    fill_order, predictor = page.value(_FILL_ORDER, 1), page.value(_PREDICTOR, 1)
    if compression == _JPEG and bits != 8:
        raise UnsupportedError(f"a TIFF with JPEG of {bits} bits is not read")
    if compression in _PREDICTED and (predictor not in (1, 2) or (predictor == 2 and bits not in (8, 16))):
        raise UnsupportedError(f"a TIFF with predictor {predictor} for {bits} bits a sample is not read")
    if fill_order != 1 and (fill_order != 2 or bits > 8 or compression not in (_NONE, *_FAX)):
        raise UnsupportedError(f"a TIFF with fill order {fill_order} for {bits} bits a sample is not read")
    if photometric == _YCBCR and compression != _JPEG and page.values(_SUBSAMPLING, (2, 2)) != (1, 1):
        raise UnsupportedError("a TIFF with subsampled YCbCr that is not JPEG is not read")


def _alone(page: Page) -> bytes:
    """The file with one more directory at its end, to which its header points."""
    file = page.file
    kept = {number: tag for number, tag in page.tags.items() if number in _KEPT}
    if page.value(_SAMPLES, 1) == 1:
        kept.pop(_PLANES, None)  # describes a single plane, which Pillow would read as three
    if page.value(_COMPRESSION, _NONE) not in _PREDICTED:
        kept.pop(_PREDICTOR, None)
    turned = kept.get(_ORIENTATION)
    if turned and (turned.type not in NUMBERS or not 1 <= page.value(_ORIENTATION) <= 8):
        del kept[_ORIENTATION]
    size = len(file.encoded)
    start = size + size % 2
    behind = b""
    if page.value(_PHOTOMETRIC) == _PALETTED:
        palette = _palette(page)
        pointer = struct.calcsize("=" + file.pointer)
        end = start + struct.calcsize("=" + file.tags) + len(kept) * file.tag.size + pointer
        kept[_PALETTE] = Tag(3, len(palette), struct.pack(file.order + file.pointer, end))
        behind = struct.pack(f"{file.order}{len(palette)}H", *palette)
    directory = struct.pack(file.order + file.tags, len(kept))
    directory += b"".join(file.tag.pack(number, *tag) for number, tag in sorted(kept.items()))
    directory += bytes(struct.calcsize("=" + file.pointer))
    head = file.encoded[:2] + struct.pack(file.order + "H", 43 if file.pointer == "Q" else 42)
    head += file.encoded[4 : file.first] + struct.pack(file.order + file.pointer, start)
    return b"".join([head, memoryview(file.encoded)[len(head) :], bytes(size % 2), directory, behind])


def _palette(page: Page) -> tuple[int, ...]:
    """The colours in 16 bits; some programs write them in 8."""
    colours = page.values(_PALETTE)
    if len(colours) != 3 << page.value(_BITS, 1):
        raise UndecodableError(
            f"the TIFF's palette holds {len(colours)} numbers instead of {3 << page.value(_BITS, 1)}"
        )
    return colours if max(colours) > 255 else tuple(colour * 257 for colour in colours)


def shades(image: Image.Image) -> bytes:
    """The 8-bit value of each of 65,536 greys, for an image that Pillow holds in 16 bits."""
    bits, is_white = 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits, is_white = image.tag_v2.get(_BITS, (16,))[0], image.tag_v2.get(_PHOTOMETRIC) == _WHITE
    ramp = bytes(value >> bits - 8 for value in range(1 << bits)).ljust(1 << 16, b"\xff")
    return bytes(255 - value for value in ramp) if is_white else ramp
