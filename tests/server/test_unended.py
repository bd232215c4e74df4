"""JPEG files without their end mark: read where all rows are there, refused where some are missing."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import TooLargeError, UndecodableError, UnsupportedError
from server.images.image import Pixels
from server.images.jpeg import usual_jpeg
from server.images.pillow import read
from server.images.unended import ended
from tests.server.conftest import encode
from tests.server.test_decode import MAX_PIXELS, noise, preprocessing
from tests.server.test_tiff import decoded

SCAN = b"\xff\xda"

OPTIONS = st.fixed_dictionaries(
    {"quality": st.sampled_from([30, 75, 92, 100]), "progressive": st.booleans()},
    optional={"subsampling": st.sampled_from([0, 1, 2]), "restart_marker_blocks": st.integers(1, 5)},
)


@settings(max_examples=100)
@given(
    width=st.integers(1, 100),
    height=st.integers(1, 100),
    mode=st.sampled_from(["L", "RGB", "CMYK"]),
    options=OPTIONS,
    missing=st.sampled_from([1, 2]),
)
def test_a_file_that_lacks_only_its_end_has_its_pixels(
    width: int, height: int, mode: str, options: dict[str, Any], missing: int
) -> None:
    encoded = encode(noise(width, height).convert(mode), "JPEG", **options)
    assert encoded.endswith(b"\xff\xd9")
    np.testing.assert_array_equal(decoded(encoded[:-missing], width, height), decoded(encoded, width, height))


@settings(max_examples=100)
@given(
    width=st.integers(40, 100),
    height=st.integers(40, 100),
    mode=st.sampled_from(["L", "RGB"]),
    options=OPTIONS,
    part=st.floats(0.05, 0.95),
)
def test_one_that_lacks_rows_is_refused(
    width: int, height: int, mode: str, options: dict[str, Any], part: float
) -> None:
    encoded = encode(noise(width, height).convert(mode), "JPEG", **options)
    scan = encoded.index(SCAN)
    with pytest.raises((UndecodableError, UnsupportedError)):
        decoded(encoded[: scan + int(part * (len(encoded) - scan))], width, height)


def test_a_progressive_file_whose_last_scan_is_missing_is_refused() -> None:
    encoded = encode(noise(64, 64), "JPEG", progressive=True)
    with pytest.raises(UndecodableError, match="truncated"):
        decoded(encoded[: encoded.rindex(SCAN)], 64, 64)


def test_a_thumbnails_end_is_not_the_images() -> None:
    thumbnail, encoded = encode(noise(16, 16), "JPEG"), encode(noise(64, 64), "JPEG")
    content = b"Exif\0\0" + thumbnail
    with_thumbnail = encoded[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + encoded[2:]
    np.testing.assert_array_equal(decoded(with_thumbnail[:-2], 64, 64), decoded(encoded, 64, 64))


def test_a_whole_file_is_left_alone() -> None:
    encoded = encode(noise(64, 64), "JPEG")
    for whole in (encoded, encoded + b"\0\0 more of a program's"):
        assert ended(whole, MAX_PIXELS) is whole


def test_an_engine_that_decodes_does_not_get_it() -> None:
    encoded = encode(noise(64, 64), "JPEG")[:-2]
    assert usual_jpeg(encoded) is None
    assert isinstance(read(encoded, preprocessing(), MAX_PIXELS, decodes_jpeg=True), Pixels)


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    encoded = bytearray(encode(noise(64, 64), "JPEG")[:-2])
    frame = encoded.index(b"\xff\xc0")
    encoded[frame + 5 : frame + 9] = struct.pack(">HH", 400, 400)
    with pytest.raises(TooLargeError, match="400 x 400"):
        decoded(bytes(encoded), 64, 64)
