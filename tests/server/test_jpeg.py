"""Which files an engine that decodes gets as they came: the header parser beside Pillow's verdict, and `read`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from server.errors import ServerError
from server.images import jpeg
from server.images import pillow as pillow_module
from server.images.image import JpegFile, Pixels
from server.images.jpeg import usual_jpeg
from server.images.pillow import decode, read
from server.images.preprocessing import Preprocessing
from tests.server.conftest import encode
from tests.server.test_decode import noise, preprocessing

MAX_PIXELS = 1_000_000
SCAN = b"\xff\xda"


def file(mode: str = "RGB", **options: Any) -> bytes:
    return encode(noise(40, 30, mode), "JPEG", **options)


def exif(orientation: int | None = None) -> bytes:
    said = Image.Exif()
    said[0x010F], said[0x0132] = "a camera", "2026:11:26 00:00:00"
    if orientation is not None:
        said[0x0112] = orientation
    return said.tobytes()


def segment(mark: int, content: bytes) -> bytes:
    return bytes((0xFF, mark)) + (len(content) + 2).to_bytes(2, "big") + content


def having(mark: int, content: bytes, encoded: bytes | None = None) -> bytes:
    """A file with one more segment before its tables."""
    encoded = encoded or file()
    at = encoded.index(b"\xff\xdb")
    return encoded[:at] + segment(mark, content) + encoded[at:]


def xmp(said: str) -> bytes:
    return b"http://ns.adobe.com/xap/1.0/\0" + f'<x:xmpmeta xmlns:tiff="t" {said}/>'.encode()


def big_endian(orientation: int) -> bytes:
    entry = b"\x01\x12\0\x03\0\0\0\x01" + bytes((0, orientation)) + b"\0\0"
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + entry + bytes(4)


USUAL = {
    "colours": file(),
    "grey": file("L"),
    "progressive": file(progressive=True),
    "whole colours": file(subsampling=0),
    "half as wide": file(subsampling=1),
    "best": file(quality=100),
    "restarts": file(restart_marker_blocks=2),
    "own tables": file(optimize=True),
    "comment": file(comment=b"taken on a Thursday"),
    "profile": file(icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "camera": file(exif=exif()),
    "upright": file(exif=exif(1)),
    "upright, big-endian": having(0xE1, big_endian(1)),
    "described": having(0xE1, xmp("")),
    "described as upright": having(0xE1, xmp('tiff:Orientation="1"')),
    "of Photoshop": having(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\x02ab"),
    "of Adobe": having(0xEE, b"Adobe\0d\0\0\0\0\x01"),
}
OTHERS = {
    "png": encode(noise(40, 30)),
    "grey, sampled doubly": file("L", subsampling=2),
    "four colours": encode(noise(40, 30, "CMYK"), "JPEG"),
    "red, green and blue": file(keep_rgb=True),
    "of Adobe, red, green and blue": having(0xEE, b"Adobe\0d\0\0\0\0\0"),
    "several pictures": encode(noise(40, 30), "MPO", save_all=True, append_images=[noise(40, 30, seed=1)]),
    "more behind its end": file() + b"more",
    "described as lying": having(0xE1, xmp('tiff:Orientation="6"')),
    **{f"orientation {each}": file(exif=exif(each)) for each in range(2, 9)},
    "orientation 3, big-endian": having(0xE1, big_endian(3)),
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_files_are_known_and_pillow_agrees(name: str) -> None:
    assert usual_jpeg(USUAL[name]) == (40, 30)
    assert pillow_takes(USUAL[name]) == (40, 30)


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_not(name: str) -> None:
    assert usual_jpeg(OTHERS[name]) is None


def pillow_takes(encoded: bytes) -> tuple[int, int] | None:
    """What Pillow's header reader says of it."""
    try:
        with warnings.catch_warnings(action="ignore"), pillow_module._opened(encoded, 1 << 40) as image:
            return image.size if pillow_module._is_for_the_engine(encoded, image) else None
    except ServerError:
        return None


HEADS = [b"", b"JFIF\0", b"Exif\0\0", b"MPF\0", b"ICC_PROFILE\0", b"Adobe", b"Photoshop 3.0\x008BIM", xmp("")]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A usual file, some bytes of whose header are others, are not there, or are there twice."""
    encoded = bytearray(draw(st.sampled_from(list(USUAL.values()))))
    for _ in range(draw(st.integers(1, 4))):
        # One byte in three is of what a segment begins with.
        marks = [at for at in range(len(encoded) - 20) if encoded[at] == 0xFF and 0xC0 <= encoded[at + 1] <= 0xFE]
        near = st.builds(int.__add__, st.sampled_from(marks), st.integers(0, 20)) if marks else st.just(2)
        at = draw(near | st.integers(0, encoded.index(SCAN) + 14 if SCAN in encoded else 100))
        how = draw(st.sampled_from(["byte", "without", "twice", "foreign"]))
        length = draw(st.integers(1, 40))
        if how == "byte" and at < len(encoded):
            encoded[at] = draw(st.integers(0, 255) | st.sampled_from([0, 1, 3, 6, 0xFF, 0xC0, 0xC2, 0xD8, 0xDA]))
        elif how == "without":
            del encoded[at : at + length]
        elif how == "twice":
            encoded[at:at] = encoded[at : at + length]
        else:
            heads = [
                b"",
                b"JFIF\0",
                b"Exif\0\0",
                b"MPF\0",
                b"ICC_PROFILE\0",
                b"Adobe",
                b"Photoshop 3.0\x008BIM",
                xmp(""),
            ]
            content = draw(st.sampled_from(heads)) + draw(st.binary(max_size=30))
            at = bytes(encoded).find(b"\xff\xdb")
            encoded[max(at, 0) : max(at, 0)] = segment(draw(st.sampled_from([0xC0, *range(0xDB, 0xFF)])), content)
    return bytes(encoded)


@settings(max_examples=400)
@given(mutated())
@example(having(0xED, b"Photoshop 3.0\x008BIM\x04\x04"))
@example(having(0xE0, b"JFIF\0"))
@example(having(0xE1, b"Exif\0\0II*\0\xff\xff\0\0"))
@example(having(0xE1, exif(1), file(exif=exif())))
@example(having(0xE2, b"ICC_PROFILE\0"))
@example(file().replace(b"\xff\xc0", b"\xff\xc1"))
def test_what_passes_passes_pillow_too(encoded: bytes) -> None:
    size = usual_jpeg(encoded)
    assert size is None or size == pillow_takes(encoded)


@settings(max_examples=100)
@given(st.sampled_from(list(USUAL.values())), st.integers(0, 2000))
def test_a_header_that_is_cut_off_is_not_known(encoded: bytes, length: int) -> None:
    assert usual_jpeg(encoded[: min(length, encoded.index(SCAN))] + jpeg.END) is None
    assert usual_jpeg(encoded[:length]) is None or encoded[:length].endswith(jpeg.END)


def read_here(encoded: bytes, decodes_jpeg: bool = True) -> Pixels | JpegFile:
    return read(encoded, preprocessing(), MAX_PIXELS, decodes_jpeg)


@pytest.mark.parametrize("name", USUAL)
def test_a_usual_jpeg_goes_to_an_engine_that_decodes_as_it_came(name: str) -> None:
    encoded = USUAL[name]
    assert read_here(encoded) == JpegFile(encoded, 40, 30)
    assert read_here(encoded, decodes_jpeg=False) == Pixels(decode(encoded, preprocessing(), MAX_PIXELS))


def test_what_the_parser_does_not_know_pillow_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pillow_module, "usual_jpeg", lambda encoded: None)
    for encoded in USUAL.values():
        assert read_here(encoded) == JpegFile(encoded, 40, 30)


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_engines_decoder_may_not_know_is_decoded_here(name: str) -> None:
    assert read_here(OTHERS[name]) == Pixels(decode(OTHERS[name], preprocessing(), MAX_PIXELS))


@pytest.mark.parametrize(("limit", "least"), [("ENGINE_PIXELS", 40 * 30), ("ENGINE_BYTES", len(file()))])
def test_a_jpeg_larger_than_the_engine_takes_is_decoded_here(
    limit: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (jpeg, pillow_module):
        monkeypatch.setattr(module, limit, least)
    assert isinstance(read_here(file()), JpegFile)
    for module in (jpeg, pillow_module):
        monkeypatch.setattr(module, limit, least - 1)
    assert read_here(file()) == Pixels(decode(file(), preprocessing(), MAX_PIXELS))


def too_large(width: int, height: int) -> Callable[[], bytes]:
    return lambda: encode(Image.new("L", (width, height)), "JPEG")


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"",
        lambda: b"garbage",
        lambda: file()[:-300],
        lambda: file()[:30],
        lambda: file()[: file().index(SCAN)] + jpeg.END,
        too_large(1001, 1000),
        too_large(2, 30_000),
    ],
    ids=["empty", "garbage", "cut off", "half a header", "no scan", "too many pixels", "too thin"],
)
def test_what_is_refused_is_refused_alike_before_the_engine(make: Callable[[], bytes]) -> None:
    with pytest.raises(ServerError) as by_pillow:
        decode(make(), preprocessing(), MAX_PIXELS)
    with pytest.raises(ServerError) as refused:
        read_here(make())
    assert type(refused.value) is type(by_pillow.value)
    assert re.sub("0x[0-9a-f]+", "", refused.value.message) == re.sub("0x[0-9a-f]+", "", by_pillow.value.message)
    assert refused.value.details == by_pillow.value.details


def test_the_preprocessing_is_the_models() -> None:
    half = (0.5, 0.5, 0.5)
    wants = Preprocessing((4, 6), (4, 6), "squash", "bilinear", half, half)
    assert read(file(), wants, MAX_PIXELS, False) == Pixels(decode(file(), wants, MAX_PIXELS))
