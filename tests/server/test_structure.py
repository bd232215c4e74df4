"""What an image file's structure says: usual files are plain and have a size; what is expensive is not plain."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.images.jpeg import MOST_SEGMENTS, usual_jpeg
from server.images.structure import structure_of
from tests.server.conftest import encode
from tests.server.expensive import chunk, directory, jpeg, jpeg_with, many_scans, png, segment, tiff_of_strips

TURNED = Image.Exif()
TURNED[0x0112] = 6

USUAL: list[tuple[str, str, dict[str, Any]]] = [
    *[("JPEG", mode, options) for mode in ("L", "RGB", "CMYK") for options in ({}, {"progressive": True})],
    ("JPEG", "RGB", {"subsampling": 0}),
    ("JPEG", "RGB", {"exif": TURNED, "comment": b"by a camera", "dpi": (72, 72)}),
    *[("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    ("PNG", "RGB", {"exif": TURNED}),
    ("PNG", "P", {"transparency": 3}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGB", {"exif": TURNED}),
    ("GIF", "P", {}),
    ("GIF", "P", {"transparency": 3, "comment": b"a comment"}),
    *[("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
]


def noise(width: int, height: int, mode: str) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return image.convert("L").convert(mode) if mode == "I;16" else image.convert("RGB").convert(mode)


@pytest.mark.parametrize(("format", "mode", "options"), USUAL)
@pytest.mark.parametrize("size", [(1, 1), (37, 50), (640, 200)])
def test_a_usual_file_is_plain(size: tuple[int, int], format: str, mode: str, options: dict[str, Any]) -> None:
    found = structure_of(encode(noise(*size, mode), format, **options))
    assert found is not None
    assert (found.width, found.height, found.is_plain) == (*size, True)


@pytest.mark.parametrize("format", ["TIFF", "AVIF"])
def test_tiff_and_avif_are_never_plain_but_have_a_size(format: str) -> None:
    found = structure_of(encode(noise(80, 60, "RGB"), format))
    assert found is not None
    assert (found.width, found.height, found.is_plain) == (80, 60, False)


def animation(format: str, **options: Any) -> bytes:
    frames = [noise(20, 20, "RGB"), noise(21, 20, "RGB").crop((0, 0, 20, 20))]
    return encode(frames[0], format, save_all=True, append_images=frames[1:], **options)


def broken_gif(blocks: int) -> bytes:
    """A GIF with a comment in many pieces before its image."""
    encoded = encode(noise(20, 20, "P"), "GIF")
    at = 13 + 768
    return encoded[:at] + b"\x21\xfe" + b"\x01a" * blocks + b"\0" + encoded[at:]


def run_length_bmp() -> bytes:
    encoded = bytearray(encode(noise(20, 20, "P"), "BMP"))
    encoded[30:34] = struct.pack("<I", 1)
    return bytes(encoded)


EXPENSIVE = {
    "scans": many_scans(30, 64),
    "segments": jpeg_with(segment(0xFE, b"") * MOST_SEGMENTS),
    "two EXIF segments": jpeg_with(2 * segment(0xE1, b"Exif\0\0" + directory(1, 8))),
    "a large directory": jpeg_with(segment(0xE1, b"Exif\0\0" + directory(2000, 30000))),
    "a large directory of pictures": jpeg_with(segment(0xE2, b"MPF\0" + directory(2000, 30000))),
    "image resources": jpeg_with(segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 5000) * 20),
    "arithmetic coding": jpeg().replace(b"\xff\xc0", b"\xff\xc9"),
    "an animated PNG": animation("PNG"),
    "an animated WebP": animation("WEBP"),
    "EXIF in text": png(9, 9, more=chunk(b"zTXt", b"Raw profile type exif\0\0" + bytes(50))),
    "large EXIF in a PNG": png(9, 9, more=chunk(b"eXIf", directory(2000, 30000))),
    "chunks": png(9, 9, more=chunk(b"tEXt", b"a\0b") * 5000),
    "large metadata": png(9, 9, more=chunk(b"iTXt", bytes(2 << 20))),
    "a comment in pieces": broken_gif(5000),
    "run lengths": run_length_bmp(),
    "strips": tiff_of_strips(100),
}


@pytest.mark.parametrize("encoded", EXPENSIVE.values(), ids=EXPENSIVE)
def test_what_may_be_expensive_is_not_plain(encoded: bytes) -> None:
    found = structure_of(encoded)
    assert found is not None and not found.is_plain


def test_a_png_whose_header_is_not_first_gets_no_size_from_another_chunk() -> None:
    encoded = encode(noise(40, 30, "RGB"), "PNG")
    found = structure_of(encoded[:8] + chunk(b"CgBI", b"\x50\0\x20\x02") + encoded[8:])
    assert found is not None
    assert (found.width, found.height, found.is_plain) == (0, 0, False)


def test_the_scans_of_a_jpeg_are_counted() -> None:
    for scans in (1, 7, 3000):
        found = structure_of(many_scans(scans, 100))
        assert found is not None
        assert (found.scans, found.blocks, found.coefficients) == (scans, 169, 169 * 128)


def test_a_mark_between_two_windows_of_the_search_counts_once() -> None:
    encoded = bytearray(many_scans(1, 64)[:-2] + bytes(3 << 20))
    for at in (1 << 20, 2 << 20):
        encoded[at - 40 : at + 40] = b"\xff\xda" * 40
    found = structure_of(bytes(encoded))
    assert found is not None and found.scans == 1 + 2 * 40


def test_the_canvas_of_a_gif_grows_with_its_first_frame() -> None:
    encoded = bytearray(encode(noise(20, 20, "P"), "GIF"))
    encoded[6:10] = struct.pack("<HH", 3, 4)
    found = structure_of(bytes(encoded))
    assert found is not None and (found.width, found.height) == (20, 20) == Image.open(io.BytesIO(encoded)).size


@pytest.mark.parametrize("scans", [200, 40000])
def test_no_jpeg_of_many_scans_is_left_to_an_engine(scans: int) -> None:
    assert usual_jpeg(many_scans(4, 4096)) == (4096, 4096)
    assert usual_jpeg(many_scans(scans, 4096)) is None


def test_no_jpeg_of_many_segments_is_left_to_an_engine() -> None:
    assert usual_jpeg(jpeg_with(segment(0xFE, b"") * 10)) == (64, 48)
    assert usual_jpeg(jpeg_with(segment(0xFE, b"") * MOST_SEGMENTS)) is None


STARTS = [
    b"",
    b"\xff\xd8",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\x10\0\0\0WEBP",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x20ftyp",
]


@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=200))
def test_any_bytes_have_a_structure_or_none(start: bytes, rest: bytes) -> None:
    found = structure_of(start + rest)
    assert found is None or (found.width >= 0 and found.height >= 0)


@given(data=st.data(), which=st.integers(0, len(USUAL) - 1))
def test_any_damaged_file_has_a_structure_or_none(data: st.DataObject, which: int) -> None:
    format, mode, options = USUAL[which]
    encoded = bytearray(encode(noise(16, 12, mode), format, **options))
    for at in data.draw(st.lists(st.integers(0, min(len(encoded), 100) - 1), max_size=5)):
        encoded[at] = data.draw(st.integers(0, 255))
    structure_of(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]))
