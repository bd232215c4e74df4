"""The directories of a TIFF: its pages, and the tags of each. `tiff.py` interprets them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from PIL import TiffImagePlugin

from server.errors import UndecodableError, UnsupportedError

WIDTH, HEIGHT = 256, 257
_KIND, _OLD_KIND, _SUB_PAGES = 254, 255, 330
_SMALLER_OR_MASK, _OLD_SMALLER = 0b101, 2

NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
"""Integer types, in the notation of `struct`."""

_MOST_PAGES, _MOST_TAGS, _MOST_VALUES = 256, 1024, 1024


class Tag(NamedTuple):
    type: int
    length: int
    field: bytes  # the values, or their place


class File(NamedTuple):
    encoded: bytes
    order: str  # byte order, in the notation of `struct`
    pointer: str  # type of an offset: I, or Q in BigTIFF
    tags: str  # type of the number of tags

    @property
    def tag(self) -> struct.Struct:
        return struct.Struct(f"{self.order}HH{self.pointer}{struct.calcsize('=' + self.pointer)}s")

    @property
    def first(self) -> int:
        """Place of the first directory's offset."""
        return 8 if self.pointer == "Q" else 4


class Page(NamedTuple):
    file: File
    tags: dict[int, Tag]
    next: int

    def values(self, number: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The first values of a tag.

        Raises:
            UndecodableError: They are not integers, or lie outside the file.
        """
        tag = self.tags.get(number)
        if tag is None:
            return default
        encoded, order, pointer, _ = self.file
        count = min(tag.length, _MOST_VALUES)
        layout = struct.Struct(f"{order}{count}{NUMBERS.get(tag.type, '')}")
        if tag.type not in NUMBERS or count == 0:
            raise UndecodableError(f"the TIFF's tag {number} holds no integer")
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
        return self.value(WIDTH) * self.value(HEIGHT)

    @property
    def is_image(self) -> bool:
        """Whether it is neither a smaller version nor a mask of another page."""
        return not self.value(_KIND) & _SMALLER_OR_MASK and self.value(_OLD_KIND) != _OLD_SMALLER


def _file(encoded: bytes) -> File:
    order = "<" if encoded[:2] == TiffImagePlugin.II else ">"
    is_big = 43 in encoded[2:4]
    if is_big and order == ">":
        raise UnsupportedError("a BigTIFF whose bytes are big-endian is not read")
    return File(encoded, order, "Q" if is_big else "I", "Q" if is_big else "H")


def _page(file: File, offset: int) -> Page:
    encoded, order, pointer, tags = file
    (count,) = struct.unpack_from(order + tags, encoded, offset)
    start = offset + struct.calcsize("=" + tags)
    end = start + min(count, _MOST_TAGS) * file.tag.size
    if end > len(encoded):
        raise UndecodableError("the TIFF's directory is cut off")
    found: dict[int, Tag] = {}
    for number, *tag in file.tag.iter_unpack(encoded[start:end]):
        found.setdefault(number, Tag(*tag))
    after = start + count * file.tag.size
    is_there = after + struct.calcsize("=" + pointer) <= len(encoded)
    return Page(file, found, struct.unpack_from(order + pointer, encoded, after)[0] if is_there else 0)


def _pages(file: File) -> Iterator[Page]:
    """All pages, each before the pages that it refers to; no page twice."""
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


def image_of(encoded: bytes) -> Page:
    pages = _pages(_file(encoded))
    first = next(pages, None)
    if first is None:
        raise UndecodableError("the TIFF has no page")
    if first.is_image:
        return first
    images = [page for page in pages if page.is_image]
    return max(images, key=lambda page: page.area, default=first)
