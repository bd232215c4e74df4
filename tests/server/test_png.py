"""PNG: the pixels of every kind, whatever stands beside them in the file."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from server.errors import UndecodableError, UnsupportedError
from server.images.png import SIGNATURE
from tests.server.conftest import encode
from tests.server.test_decode import noise
from tests.server.test_tiff import decoded, packed_rows

Array = NDArray[Any]
WIDTH, HEIGHT = 20, 10
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}


def chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png(kind: int, depth: int, samples: Array, *before: bytes) -> bytes:
    """A file by hand; `samples` are rows of pixels of channels, `before` chunks before the pixels."""
    height, width, channels = samples.shape
    if depth < 8:
        rows = packed_rows(samples[..., 0], depth)
    else:
        rows = [row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in samples]
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    half = len(packed) // 2
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    pixels = chunk(b"IDAT", packed[:half]) + chunk(b"IDAT", packed[half:])
    return b"".join([SIGNATURE, chunk(b"IHDR", head), *before, pixels, chunk(b"IEND", b"")])


KINDS = [(GREY, depth) for depth in (1, 2, 4, 8, 16)] + [(PALETTE, depth) for depth in (1, 2, 4, 8)]
KINDS += [(kind, depth) for kind in (RGB, GREY_ALPHA, RGBA) for depth in (8, 16)]


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, Array]:
    """A file of any kind, with or without transparency, and the pixels that are to come out."""
    kind, depth = draw(st.sampled_from(KINDS))
    chance = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    width, height, most = draw(st.integers(1, 40)), draw(st.integers(1, 40)), (1 << depth) - 1
    samples = chance.integers(0, most + 1, (height, width, CHANNELS[kind]))
    values = samples * 255 // most if depth < 8 else samples >> depth - 8
    alpha: Array = np.full((height, width, 1), 255)
    before = []
    if kind == PALETTE:
        palette = chance.integers(0, 256, (1 << depth, 3))
        before.append(chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
        colour = palette[samples[..., 0]]
        if draw(st.booleans()):
            alphas = chance.integers(0, 256, draw(st.integers(1, 1 << depth)))
            before.append(chunk(b"tRNS", alphas.astype(np.uint8).tobytes()))
            alpha = np.pad(alphas, (0, 256), constant_values=255)[samples]
    elif kind in (GREY_ALPHA, RGBA):
        colour, alpha = values[..., :-1], values[..., -1:]
    else:
        colour = values
        if draw(st.booleans()) and (kind, depth) != (RGB, 16):
            hidden = samples[chance.integers(height), chance.integers(width)]
            before.append(chunk(b"tRNS", struct.pack(f">{len(hidden)}H", *hidden)))
            alpha = 255 * (samples != hidden).any(-1, keepdims=True)
    wanted = (colour * alpha + 255 * (255 - alpha)) / 255
    return png(kind, depth, samples, *before), np.broadcast_to(wanted, (height, width, 3))


@settings(max_examples=200)
@given(file=files())
def test_of_every_kind_the_pixels_are_right(file: tuple[bytes, Array]) -> None:
    encoded, wanted = file
    assert abs(decoded(encoded, wanted.shape[1], wanted.shape[0]) - wanted).max() <= 1


def test_of_16_bits_one_transparent_colour_is_refused_by_its_name() -> None:
    samples = np.zeros((HEIGHT, WIDTH, 3), int)
    with pytest.raises(UnsupportedError, match="16 bits a sample and one transparent colour"):
        decoded(png(RGB, 16, samples, chunk(b"tRNS", bytes(6))), WIDTH, HEIGHT)


PLAIN = encode(noise(WIDTH, HEIGHT))
PIXELS = decoded(PLAIN, WIDTH, HEIGHT)


def having(*chunks: bytes, end: bool = False) -> bytes:
    """The plain file with more chunks, before its pixels or behind them."""
    at = PLAIN.index(b"IEND" if end else b"IDAT") - 4
    return PLAIN[:at] + b"".join(chunks) + PLAIN[at:]


LARGE = zlib.compress(bytes(2_000_000))
BROKEN: dict[str, list[bytes]] = {
    "zTXt of 2 MB": [chunk(b"zTXt", b"parameters\0\0" + LARGE)],
    "iTXt of 2 MB": [chunk(b"iTXt", b"parameters\0\1\0\0\0" + LARGE)],
    "XMP of 2 MB": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE)],
    "EXIF as text of 2 MB": [chunk(b"zTXt", b"Raw profile type exif\0\0" + LARGE)],
    "iCCP of 2 MB": [chunk(b"iCCP", b"large\0\0" + LARGE)],
    "70 MB of text": [chunk(b"zTXt", b"text %d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(70)],
    "text twice, of which the second is EXIF": [chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nnothex")] * 2,
    "zTXt that is no zlib": [chunk(b"zTXt", b"Raw profile type exif\0\0none")],
    "zTXt of an unknown method": [chunk(b"zTXt", b"Raw profile type exif\0\1none")],
    "iTXt that is cut off": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1")],
    "iTXt that is no UTF-8": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe<")],
    "animation of no frames": [chunk(b"acTL", bytes(8)), chunk(b"fcTL", b"\0")],
    "frames out of order": [chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", struct.pack(">I", 9).ljust(26))],
    "tRNS that is cut off": [chunk(b"tRNS", b"\0")],
    "wrong checksum": [chunk(b"tEXt", b"Comment\0hello", checksum=1)],
    "wrong checksum of tRNS": [chunk(b"tRNS", bytes(6), checksum=1)],
    "wrong checksum of EXIF": [chunk(b"eXIf", bytes(6), checksum=1)],
    "EXIF that is none": [chunk(b"eXIf", b"garbage garbage")],
    "EXIF of BigTIFF": [chunk(b"eXIf", b"II+\0\x08\0\0\0")],
}
BROKEN |= {
    f"{name.decode()} of {length} bytes": [chunk(name, bytes(length))]
    for name in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"iCCP", b"eXIf", b"acTL", b"tIME", b"bKGD", b"sBIT", b"caNv")
    for length in (0, 1, 3)
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("end", [False, True])
def test_metadata_never_decides_whether_pixels_are_read(name: str, end: bool) -> None:
    np.testing.assert_array_equal(decoded(having(*BROKEN[name], end=end), WIDTH, HEIGHT), PIXELS)


NAMES = [b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"acTL", b"fcTL", b"tIME"]
STARTS = [b"", b"Raw profile type exif\0", b"XML:com.adobe.xmp\0", b"exif\0", b"transparency\0", b"a\0\0", b"II*\0"]


@settings(max_examples=300)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(NAMES) | st.binary(min_size=4, max_size=4).map(lambda name: name.lower()),
            st.sampled_from(STARTS),
            st.binary(max_size=60),
            st.sampled_from([None, None, 7]),
        ),
        min_size=1,
        max_size=5,
    ),
    end=st.booleans(),
)
def test_no_chunk_that_is_none_of_the_pixels_can_break_them(
    parts: list[tuple[bytes, bytes, bytes, int | None]], end: bool
) -> None:
    chunks = [chunk(name, start + content, checksum) for name, start, content, checksum in parts]
    np.testing.assert_array_equal(decoded(having(*chunks, end=end), WIDTH, HEIGHT), PIXELS)


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("form", ["eXIf", "zTXt", "tEXt", "iTXt"])
def test_what_turns_the_image_is_kept_though_other_metadata_is_broken(form: str, end: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()
    written = b"\nexif\n%8d\n" % len(content) + content.hex().encode() + b"\n"
    turning = {
        "eXIf": chunk(b"eXIf", content[6:]),
        "zTXt": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(written)),
        "tEXt": chunk(b"tEXt", b"Raw profile type exif\0" + written),
        "iTXt": chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
    }[form]
    wanted = np.rot90(PIXELS, -1)
    got = decoded(having(chunk(b"gAMA", b""), turning, chunk(b"zTXt", b"a\0\0" + LARGE), end=end), HEIGHT, WIDTH)
    np.testing.assert_array_equal(got, wanted)


def test_a_file_without_its_end_is_read_and_one_that_lacks_rows_is_not() -> None:
    end = PLAIN.index(b"IEND") - 4
    np.testing.assert_array_equal(decoded(PLAIN[:end], WIDTH, HEIGHT), PIXELS)
    for length in (end - 40, end - 100, PLAIN.index(b"IDAT") + 4, PLAIN.index(b"IDAT") - 4):
        with pytest.raises((UndecodableError, UnsupportedError)):
            decoded(PLAIN[:length], WIDTH, HEIGHT)
