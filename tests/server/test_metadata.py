"""Metadata never decides whether the pixels of a JPEG, a WebP or an AVIF are read. `test_png.py` and `test_tiff.py`."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from server.images.image import Pixels
from server.images.pillow import FORMATS, read
from tests.server.conftest import encode
from tests.server.test_decode import MAX_PIXELS, noise, preprocessing
from tests.server.test_tiff import decoded

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as server.images.pillow does when it loads

WIDTH, HEIGHT = 32, 24
TEXT = b"x" * 60
BEFORE_TEXT = 26  # of EXIF: a header, and a directory whose one entry is the text
FORMATS_WITH_EXIF: list[str] = [format for format in ("JPEG", "WEBP", "AVIF") if format in FORMATS]


def with_exif(format: str) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = TEXT.decode()
    return encode(noise(WIDTH, HEIGHT), format, exif=exif.tobytes())


FILES = {format: with_exif(format) for format in FORMATS_WITH_EXIF}
PIXELS = {format: decoded(encoded, WIDTH, HEIGHT) for format, encoded in FILES.items()}

BROKEN = [
    b"garbage garbage", b"", b"Exif\0\0", b"II*\0", b"II*\0\xff\xff\xff\x7f", b"http://ns.adobe.com/xap/1.0/\0",
    b"Exif\0\0Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0", b"MM\0*\0\0\0\x08\0\0\0\0\0\0", b"II*\0\x08\0\0\0\xff\xff",
    b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
]  # fmt: skip


def with_broken_exif(format: str, content: bytes) -> bytes:
    """A file with this at the beginning of its EXIF, or instead of it all, and nothing else changed."""
    encoded = FILES[format]
    at = encoded.index(TEXT) - BEFORE_TEXT
    length = BEFORE_TEXT + len(TEXT)
    return encoded[:at] + content.ljust(length, b"\0")[:length] + encoded[at + length :]


@pytest.mark.parametrize("format", FORMATS_WITH_EXIF)
@pytest.mark.parametrize("content", BROKEN)
def test_an_image_with_broken_exif_is_read_and_upright(format: str, content: bytes) -> None:
    np.testing.assert_array_equal(decoded(with_broken_exif(format, content), WIDTH, HEIGHT), PIXELS[format])


@settings(max_examples=150)
@given(format=st.sampled_from(FORMATS_WITH_EXIF), content=st.binary(min_size=8, max_size=80))
def test_no_bytes_of_exif_can_break_the_pixels(format: str, content: bytes) -> None:
    np.testing.assert_array_equal(decoded(with_broken_exif(format, content), WIDTH, HEIGHT), PIXELS[format])


@pytest.mark.skipif("WEBP" not in FORMATS, reason="this Pillow reads no WebP")
@pytest.mark.parametrize("content", BROKEN)
def test_a_webp_with_exif_of_any_length_is_read(content: bytes) -> None:
    image = noise(WIDTH, HEIGHT)
    encoded = encode(image, "WEBP", lossless=True, exif=content or b"\0")
    np.testing.assert_array_equal(decoded(encoded, WIDTH, HEIGHT), np.asarray(image))


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_turned_by_its_own_properties(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, TEXT.decode()
    encoded = bytearray(encode(noise(WIDTH, HEIGHT), "AVIF", quality=100, subsampling="4:4:4", exif=exif.tobytes()))
    size = (HEIGHT, WIDTH) if orientation > 4 else (WIDTH, HEIGHT)
    wanted = decoded(bytes(encoded), *size)
    by_hand = encode(noise(WIDTH, HEIGHT), "PNG", exif=exif.tobytes())
    assert abs(wanted - decoded(by_hand, *size)).mean() < 6
    at = encoded.index(TEXT)
    encoded[at - BEFORE_TEXT : at] = bytes(BEFORE_TEXT)
    np.testing.assert_array_equal(decoded(bytes(encoded), *size), wanted)


NAMES = [
    b"",
    b"JFIF\0",
    b"Exif\0\0",
    b"http://ns.adobe.com/xap/1.0/\0",
    b"ICC_PROFILE\0",
    b"MPF\0",
    b"Adobe",
    b"FPXR\0",
]
NAMES += [b"MPF\0II*\0\x08\0\0\0", b"Photoshop 3.0\0", b"Photoshop 3.0\x008BIM\x03\xed\0\0"]


def segment(mark: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, mark, len(content) + 2) + content


@settings(max_examples=300)
@given(
    segments=st.lists(
        st.builds(
            segment,
            st.sampled_from([*range(0xE0, 0xEE), 0xEF, 0xFE]),
            st.builds(bytes.__add__, st.sampled_from(NAMES), st.binary(max_size=30)),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_segment_that_a_program_wrote_can_break_a_jpeg(segments: list[bytes]) -> None:
    encoded = FILES["JPEG"]
    broken = encoded[:2] + b"".join(segments) + encoded[2:]
    np.testing.assert_array_equal(decoded(broken, WIDTH, HEIGHT), PIXELS["JPEG"])


SHORT = {"JFIF": segment(0xE0, b"JFIF\0"), "ICC": segment(0xE2, b"ICC_PROFILE\0"), "Adobe": segment(0xEE, b"Adobe")}


@pytest.mark.parametrize("name", SHORT)
def test_a_jpeg_that_was_repaired_is_not_left_to_the_engine(name: str) -> None:
    encoded = FILES["JPEG"][:2] + SHORT[name] + FILES["JPEG"][2:]
    np.testing.assert_array_equal(decoded(encoded, WIDTH, HEIGHT), PIXELS["JPEG"])
    assert isinstance(read(encoded, preprocessing(), MAX_PIXELS, decodes_jpeg=True), Pixels)
