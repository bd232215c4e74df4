"""TIFF: the page that is the image, with the tags that its pixels need, if it is of a kind that is known to be read.

A dozen tags of a TIFF say how its samples are to be understood, and Pillow looks at some of them: it clips 32 bits,
takes signed samples for unsigned ones, and lays uncompressed planes of 16 bits over one another. So the tags are held
against a list of combinations whose pixels are right, as a test proves. Every other combination is refused by its name.
What is on the list is read by libtiff, whatever its compression, from a directory that holds nothing else: no tag that
says nothing of the pixels can break the reading.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, TiffImagePlugin

from server.errors import UndecodableError, UnsupportedError
from server.images import libtiff

SIGNATURES = tuple(TiffImagePlugin.PREFIXES)

libtiff.silence()
TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader knows neither planes of 16 bits nor tiles of planes

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_ORIENTATION, _SAMPLES, _PLANES, _PREDICTOR, _PALETTE, _SUB_PAGES = 274, 277, 284, 317, 320, 330
_INKS, _EXTRA, _FORMAT, _KIND_OF_PAGE, _OLD_KIND_OF_PAGE = 332, 338, 339, 254, 255
_KEPT = frozenset(
    [_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION, _SAMPLES, _PLANES, _PREDICTOR]
    + [_PALETTE, _EXTRA]
    + [273, 278, 279, 322, 323, 324, 325]  # where strips or tiles lie
    + [292, 293, 347, 529, 530, 531, 532]  # options of fax codes, tables of JPEG, how YCbCr is to be understood
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
"""What is read, by photometric interpretation and bits a sample: which samples there may be besides the colours."""

_NONE, _JPEG = 1, 7
_FAX = (2, 3, 4)
_PREDICTED = (5, 8, 32946, 34925, 50000)  # LZW, Deflate by both its numbers, LZMA, Zstandard
_COMPRESSIONS = (_NONE, _JPEG, *_FAX, *_PREDICTED, 32773)  # the last is PackBits
_FORMATS = {2: "signed samples", 3: "floating-point samples", 5: "complex samples", 6: "complex samples"}
_UNSIGNED, _UNDEFINED = 1, 4

_VALUES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # types of whole numbers
_MOST_PAGES, _MOST_TAGS, _MOST_VALUES = 256, 1024, 1024

# Kinds of grey that Pillow's table lacks; `shades` makes 8 bits of them.
for _order, _suffix in ((TiffImagePlugin.II, ""), (TiffImagePlugin.MM, "B")):
    for _shade in (_WHITE, _BLACK):
        TiffImagePlugin.OPEN_INFO[(_order, _shade, (1,), 1, (12,), ())] = ("I;16", "I;12")
        TiffImagePlugin.OPEN_INFO[(_order, _shade, (1,), 1, (16,), ())] = ("I;16" + _suffix, "I;16" + _suffix)


class _Tag(NamedTuple):
    type: int
    length: int
    field: bytes  # the values, or where they lie


class _File(NamedTuple):
    encoded: bytes
    order: str  # of bytes, as `struct` writes it
    pointer: str  # what an offset is: I, or Q in BigTIFF
    tags: str  # what the number of tags is

    @property
    def tag(self) -> struct.Struct:
        return struct.Struct(f"{self.order}HH{self.pointer}{struct.calcsize('=' + self.pointer)}s")

    @property
    def first(self) -> int:
        """Where the offset of the first directory lies."""
        return 8 if self.pointer == "Q" else 4


class _Page(NamedTuple):
    file: _File
    tags: dict[int, _Tag]
    next: int

    def values(self, number: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The first values of a tag.

        Raises:
            UndecodableError: They are no whole numbers, or lie outside the file.
        """
        tag = self.tags.get(number)
        if tag is None:
            return default
        encoded, order, pointer, _ = self.file
        count = min(tag.length, _MOST_VALUES)
        layout = struct.Struct(f"{order}{count}{_VALUES.get(tag.type, '')}")
        if tag.type not in _VALUES or count == 0:
            raise UndecodableError(f"the TIFF's tag {number} holds no whole number")
        if tag.length * (layout.size // count) <= len(tag.field):
            return layout.unpack_from(tag.field)
        (offset,) = struct.unpack(order + pointer, tag.field)
        if offset + layout.size > len(encoded):
            raise UndecodableError(f"the TIFF's tag {number} lies outside the file")
        return layout.unpack_from(encoded, offset)

    def value(self, number: int, default: int = 0) -> int:
        return self.values(number, (default,))[0]

    @property
    def area(self) -> int:
        return self.value(_WIDTH) * self.value(_HEIGHT)

    @property
    def is_image(self) -> bool:
        """It is neither a smaller version of another page nor a mask of one."""
        return not self.value(_KIND_OF_PAGE) & 0b101 and self.value(_OLD_KIND_OF_PAGE) != 2


def one_page(encoded: bytes) -> bytes:
    """A TIFF whose first directory is that of the image, with no more tags than its pixels need.

    The image is the first page; where that is a thumbnail (as in DNG), the largest page that is none.

    Args:
        encoded: A file that begins with one of `SIGNATURES`.

    Raises:
        UnsupportedError: The page is of a kind that is not known to be read right.
        UndecodableError: Its directory is broken.
    """
    try:
        page = _image_of(_opened(encoded))
        _check_kind(page)
        return _alone(page)
    except struct.error:
        raise UndecodableError("the TIFF's directory is cut off") from None


def _opened(encoded: bytes) -> _File:
    order = "<" if encoded[:2] == TiffImagePlugin.II else ">"
    is_big = 43 in encoded[2:4]
    if is_big and order == ">":
        raise UnsupportedError("a BigTIFF whose bytes are big-endian is not read")
    return _File(encoded, order, "Q" if is_big else "I", "Q" if is_big else "H")


def _page(file: _File, offset: int) -> _Page:
    encoded, order, pointer, tags = file
    (count,) = struct.unpack_from(order + tags, encoded, offset)
    start = offset + struct.calcsize("=" + tags)
    end = start + min(count, _MOST_TAGS) * file.tag.size
    if end > len(encoded):
        raise UndecodableError("the TIFF's directory is cut off")
    found: dict[int, _Tag] = {}
    for number, *tag in file.tag.iter_unpack(encoded[start:end]):
        found.setdefault(number, _Tag(*tag))
    after = start + count * file.tag.size
    is_there = after + struct.calcsize("=" + pointer) <= len(encoded)
    return _Page(file, found, struct.unpack_from(order + pointer, encoded, after)[0] if is_there else 0)


def _pages(file: _File) -> Iterator[_Page]:
    """All pages, each before the smaller ones or larger ones that it refers to; no page twice."""
    (first,) = struct.unpack_from(file.order + file.pointer, file.encoded, file.first)
    waiting, seen = [first], {0}
    while waiting and len(seen) <= _MOST_PAGES:
        offset = waiting.pop(0)
        if offset in seen:
            continue
        seen.add(offset)
        page = _page(file, offset)
        yield page
        waiting += [*page.values(_SUB_PAGES), page.next]


def _image_of(file: _File) -> _Page:
    pages = _pages(file)
    first = next(pages, None)
    if first is None:
        raise UndecodableError("the TIFF has no page")
    if first.is_image:
        return first
    images = [page for page in pages if page.is_image]
    return max(images, key=lambda page: page.area, default=first)


def _check_kind(page: _Page) -> None:
    """Refuses what is not on the list, by its name."""
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
    most = bits[0]
    if extra not in _READ[photometric].get(most, []) or samples != _COLOURS.get(photometric, 1) + len(extra):
        if photometric != _RGB or extra or samples != 4 or most not in (8, 16):
            raise UnsupportedError(
                f"a TIFF with {most} bits a sample, {samples} samples a pixel ({colour}) and extra samples "
                f"{list(extra)} is not read"
            )
    _check_coding(page, photometric, compression, most)


def _check_coding(page: _Page, photometric: int, compression: int, bits: int) -> None:
    fill_order, predictor, planes = page.value(_FILL_ORDER, 1), page.value(_PREDICTOR, 1), page.value(_PLANES, 1)
    extra = page.values(_EXTRA)
    if planes not in (1, 2) or (planes == 2 and any(extra) and (photometric != _RGB or len(extra) > 1)):
        raise UnsupportedError(f"a TIFF with planes ({planes}) of {_NAMES[photometric]} with alpha is not read")
    if compression == _JPEG and bits != 8:
        raise UnsupportedError(f"a TIFF with JPEG of {bits} bits is not read")
    if compression in _PREDICTED and (predictor not in (1, 2) or (predictor == 2 and bits not in (8, 16))):
        raise UnsupportedError(f"a TIFF with predictor {predictor} for {bits} bits a sample is not read")
    if fill_order != 1 and (fill_order != 2 or bits > 8 or compression not in (_NONE, *_FAX)):
        raise UnsupportedError(f"a TIFF with fill order {fill_order} for {bits} bits a sample is not read")
    if photometric == _CMYK and page.value(_INKS, 1) != 1:
        raise UnsupportedError("a TIFF with inks other than CMYK is not read")


def _alone(page: _Page) -> bytes:
    """The file with one more directory, behind all else, at which its header points."""
    file = page.file
    kept = {number: tag for number, tag in page.tags.items() if number in _KEPT}
    if page.value(_SAMPLES, 1) == 1:
        kept.pop(_PLANES, None)  # of one plane, which Pillow takes for three
    if page.value(_COMPRESSION, _NONE) not in _PREDICTED:
        kept.pop(_PREDICTOR, None)
    turned = kept.get(_ORIENTATION)
    if turned and (turned.type not in _VALUES or not 1 <= page.value(_ORIENTATION) <= 8):
        del kept[_ORIENTATION]
    size = len(file.encoded)
    start = size + size % 2
    behind = b""
    if page.value(_PHOTOMETRIC) == _PALETTED:
        palette = _palette(page)
        pointer = struct.calcsize("=" + file.pointer)
        end = start + struct.calcsize("=" + file.tags) + len(kept) * file.tag.size + pointer
        kept[_PALETTE] = _Tag(3, len(palette), struct.pack(file.order + file.pointer, end))
        behind = struct.pack(f"{file.order}{len(palette)}H", *palette)
    directory = struct.pack(file.order + file.tags, len(kept))
    directory += b"".join(file.tag.pack(number, *tag) for number, tag in sorted(kept.items()))
    directory += bytes(struct.calcsize("=" + file.pointer))
    head = file.encoded[:2] + struct.pack(file.order + "H", 43 if file.pointer == "Q" else 42)
    head += file.encoded[4 : file.first] + struct.pack(file.order + file.pointer, start)
    return b"".join([head, memoryview(file.encoded)[len(head) :], bytes(size % 2), directory, behind])


def _palette(page: _Page) -> tuple[int, ...]:
    """The colours in 16 bits; some programs write them in 8."""
    colours = page.values(_PALETTE)
    if len(colours) != 3 << page.value(_BITS, 1):
        raise UndecodableError(
            f"the TIFF's palette holds {len(colours)} numbers instead of {3 << page.value(_BITS, 1)}"
        )
    return colours if max(colours) > 255 else tuple(colour * 257 for colour in colours)


def shades(image: Image.Image) -> bytes:
    """What each of 65,536 greys is in 8 bits, of an image that Pillow holds in 16."""
    bits, is_white = 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits, is_white = image.tag_v2.get(_BITS, (16,))[0], image.tag_v2.get(_PHOTOMETRIC) == _WHITE
    ramp = bytes(value >> bits - 8 for value in range(1 << bits)).ljust(1 << 16, b"\xff")
    return bytes(255 - value for value in ramp) if is_white else ramp
