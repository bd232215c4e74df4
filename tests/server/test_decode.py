"""Decoding: timm's evaluation pixels exactly, every kind of image file, limits before work, no strange exceptions."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from typing import Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import create_transform

from server.errors import ServerError, TooLargeError, UndecodableError, UnsupportedError
from server.images import pillow
from server.images.pillow import FORMATS, decode
from server.images.preprocessing import Preprocessing
from tests.server.conftest import encode

MAX_PIXELS = 1_000_000
Crop = Literal["center", "squash"]
Interpolation = Literal["bicubic", "bilinear"]


def preprocessing(
    size: int = 32, crop_pct: float = 1.0, crop: Crop = "center", interpolation: Interpolation = "bicubic"
) -> Preprocessing:
    resize = int(size / crop_pct)
    half = (0.5, 0.5, 0.5)
    return Preprocessing((size, size), (resize, resize), crop, interpolation, half, half)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if len(mode) == 1 else pixels, mode=None).convert(mode)


def decoded(encoded: bytes, size: int = 32) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """As the service decodes it; `size` pixels wide and high."""
    return np.frombuffer(decode(encoded, preprocessing(size), MAX_PIXELS), np.uint8).reshape(size, size, 3)


def colour(encoded: bytes) -> list[int]:
    """The mean colour."""
    return [round(float(value)) for value in decoded(encoded).reshape(-1, 3).mean(0)]


@settings(max_examples=60)
@given(
    width=st.integers(3, 300),
    height=st.integers(3, 300),
    size=st.sampled_from([16, 17, 32, 64]),
    crop_pct=st.sampled_from([0.875, 0.9, 0.95, 1.0]),
    crop=st.sampled_from(get_args(Crop)),
    interpolation=st.sampled_from(get_args(Interpolation)),
)
@example(500, 375, 64, 0.9, "center", "bicubic")
@example(33, 32, 32, 1.0, "center", "bilinear")
@example(32, 32, 32, 1.0, "center", "bilinear")
@example(1, 300, 16, 0.9, "center", "bicubic")
@example(300, 1, 16, 0.9, "squash", "bicubic")
def test_the_pixels_equal_timms_evaluation_transform(
    width: int, height: int, size: int, crop_pct: float, crop: Crop, interpolation: Interpolation
) -> None:
    image = noise(width, height, seed=width * height)
    transform = create_transform(
        (3, size, size), is_training=False, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop,
        normalize=False,
    )  # fmt: skip
    wanted = np.asarray(transform(image)).transpose(1, 2, 0)
    assert wanted.dtype == np.uint8
    wants = preprocessing(size, crop_pct, crop, interpolation)
    got = np.frombuffer(decode(encode(image), wants, 10 * MAX_PIXELS), np.uint8).reshape(size, size, 3)
    np.testing.assert_array_equal(got, wanted)


LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True}}
LOSSY: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "AVIF": {"quality": 95}}


@pytest.mark.parametrize("format", LOSSLESS)
def test_a_lossless_format_gives_its_pixels(format: str) -> None:
    image = noise(32, 32)
    np.testing.assert_array_equal(decoded(encode(image, format, **LOSSLESS[format])), np.asarray(image))


@pytest.mark.parametrize("format", LOSSY)
def test_a_lossy_format_gives_nearly_its_pixels(format: str) -> None:
    if format not in FORMATS:
        pytest.skip(f"this Pillow reads no {format}")
    assert colour(encode(Image.new("RGB", (40, 30), (200, 100, 50)), format, **LOSSY[format])) == pytest.approx(
        [200, 100, 50], abs=3
    )


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpegs_of_all_sorts_decode_as_pillow_does(options: dict[str, Any]) -> None:
    encoded = encode(noise(32, 32), "JPEG", **options)
    np.testing.assert_array_equal(decoded(encoded), np.asarray(Image.open(io.BytesIO(encoded))))


@pytest.mark.parametrize(("mode", "value", "rgb"), [("L", 70, 70), ("1", 1, 255), ("1", 0, 0)])
def test_grey_and_black_and_white_become_rgb(mode: str, value: int, rgb: int) -> None:
    assert colour(encode(Image.new(mode, (20, 20), value))) == [rgb] * 3


@pytest.mark.parametrize(
    ("mode", "value", "over_white"),
    [
        ("RGBA", (0, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (200, 0, 0, 255), [200, 0, 0]),
        ("RGBA", (0, 0, 255, 51), [204, 204, 255]),
        ("LA", (0, 0), [255, 255, 255]),
        ("LA", (0, 51), [204, 204, 204]),
        ("LA", (90, 255), [90, 90, 90]),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_what_is_transparent_becomes_white(mode: str, value: Any, over_white: list[int], format: str) -> None:
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    assert colour(encode(Image.new(mode, (32, 32), value), format, **options)) == pytest.approx(over_white, abs=1)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGBA", {}),
        ("LA", {}),
        ("P", {"transparency": 7}),
        ("P", {"transparency": bytes(range(256))}),
        ("RGB", {"transparency": (0, 0, 0)}),
        ("L", {"transparency": 9}),
    ],
)
def test_bands_over_white_are_the_whole_over_white(mode: str, options: dict[str, Any]) -> None:
    with Image.open(io.BytesIO(encode(noise(1111, 700, "RGBA").convert(mode), **options))) as image:
        ground = Image.new("RGBA", image.size, "white")
        wanted = Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
        assert pillow._over_white(image).tobytes() == wanted.tobytes()


def palette(width: int = 32) -> Image.Image:
    """Two colours: black, and a red with index 1."""
    image = Image.new("P", (width, 32), 0)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.paste(1, (width // 2, 0, width, 32))
    return image


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_palette_gives_its_colours_and_its_transparent_entry_is_white(format: str) -> None:
    opaque, holed = decoded(encode(palette(), format)), decoded(encode(palette(), format, transparency=0))
    assert opaque[0, 0].tolist() == [0, 0, 0] and holed[0, 0].tolist() == [255, 255, 255]
    assert opaque[0, 31].tolist() == holed[0, 31].tolist() == [200, 10, 10]


def test_a_palette_with_an_alpha_for_each_entry_is_laid_over_white() -> None:
    pixels = decoded(encode(palette(), "PNG", transparency=bytes([0, 51])))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 31].tolist() == pytest.approx([244, 206, 206], abs=1)


def test_a_transparent_colour_of_an_rgb_or_grey_png_is_white() -> None:
    assert colour(encode(Image.new("RGB", (32, 32), (1, 2, 3)), transparency=(1, 2, 3))) == [255, 255, 255]
    assert colour(encode(Image.new("L", (32, 32), 7), transparency=7)) == [255, 255, 255]


RAMP = np.tile(np.linspace(0, 65535, 32, dtype=np.uint16), (32, 1))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_a_grey_ramp_of_16_bits_is_scaled_and_not_clipped(format: str) -> None:
    row = decoded(encode(Image.fromarray(RAMP), format))[5, :, 0].astype(int)
    assert all(row[1:] > row[:-1])
    np.testing.assert_allclose(row, RAMP[0] / 257, atol=1)


def test_a_big_endian_tiff_of_16_bits_is_scaled_and_not_clipped() -> None:
    pixels = RAMP.astype(">u2").tobytes()
    tags = [(256, 4, 32), (257, 4, 32), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 122)]
    tags += [(277, 3, 1), (278, 4, 32), (279, 4, len(pixels))]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, value in tags
    )
    encoded = b"MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + struct.pack(">I", 0)
    row = decoded(encoded.ljust(122, b"\0") + pixels)[5, :, 0].astype(int)
    np.testing.assert_allclose(row, RAMP[0] / 257, atol=1)


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand; `rows` with their filter bytes."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    written = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def test_a_16_bit_grey_png_with_a_transparent_value_decodes() -> None:
    row = b"\0" + struct.pack(">32H", *([65535] * 16 + [32768] * 16))
    pixels = decoded(png(32, 32, 16, 0, row * 32, (b"tRNS", struct.pack(">H", 65535))))
    assert pixels[3, 3].tolist() == [255, 255, 255] and pixels[3, 30].tolist() == pytest.approx([128] * 3, abs=1)


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_other_pngs_of_16_bits_keep_their_upper_byte(kind: int, channels: int) -> None:
    values = [0xFFFF if channels in (2, 4) and channel == channels - 1 else 0x6400 for channel in range(channels)]
    row = b"\0" + struct.pack(f">{channels}H", *values) * 32
    assert colour(png(32, 32, 16, kind, row * 32)) == pytest.approx([100] * 3, abs=1)


def test_a_cmyk_jpeg_has_its_colours() -> None:
    assert colour(encode(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95)) == pytest.approx(
        [255, 0, 0], abs=4
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_stands_upright(orientation: int, format: str) -> None:
    upright = Image.new("RGB", (48, 32))
    for index, shade in enumerate([(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250), (90, 90, 90), (0, 0, 0)]):
        x, y = 16 * (index % 3), 16 * (index // 3)
        upright.paste(shade, (x, y, x + 16, y + 16))
    turns = Image.Transpose
    undo = [
        None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE, turns.ROTATE_90,
        turns.TRANSVERSE, turns.ROTATE_270,
    ][orientation - 1]  # fmt: skip
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if format == "JPEG" else {"lossless": True}
    options = options if format in ("JPEG", "WEBP") else {}
    wants = preprocessing(32, crop="squash")
    got = np.frombuffer(decode(encode(stored, format, exif=exif, **options), wants, MAX_PIXELS), np.uint8).astype(int)
    wanted = np.frombuffer(decode(encode(upright), wants, MAX_PIXELS), np.uint8).astype(int)
    assert abs(got - wanted).max() <= 12


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_counts(format: str) -> None:
    frames = [Image.new("RGB", (32, 32), shade) for shade in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    options = {"lossless": True} if format == "WEBP" else {}
    assert colour(encode(frames[0], format, save_all=True, append_images=frames[1:], **options)) == [255, 0, 0]


def bomb(width: int, height: int) -> bytes:
    return png(width, height, 8, 2, b"")


@pytest.mark.parametrize(("width", "height"), [(10**5, 10**5), (1001, 1000), (2**31 - 1, 2**31 - 1), (10_000, 12_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as server.images.pillow does when it loads
def test_too_many_pixels_are_refused_from_the_header(width: int, height: int) -> None:
    tracemalloc.start()
    with pytest.raises(TooLargeError, match="1000000"):
        decode(bomb(width, height), preprocessing(), MAX_PIXELS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_an_image_of_just_the_limit_is_accepted() -> None:
    assert colour(encode(Image.new("RGB", (1000, 1000), (7, 7, 7)))) == [7, 7, 7]


def test_a_thin_strip_is_refused_before_the_resize_makes_it_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip of 1 x 60,000 pixels, its shorter side brought to 224, would have three thousand million."""
    sizes = []

    def resize(image: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        sizes.append(size)
        return Image.new("RGB", (224, 224))

    monkeypatch.setattr(Image.Image, "resize", resize)
    with pytest.raises(TooLargeError):
        decode(encode(Image.new("RGB", (1, 60_000))), preprocessing(224), MAX_PIXELS)
    assert sizes == []


FILES = {str(format): encode(noise(24, 20), format) for format in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
def test_every_cut_of_a_file_is_an_answer_to_the_client(format: str) -> None:
    encoded = FILES[format]
    for length in range(0, len(encoded), max(1, len(encoded) // 40)):
        try:
            decode(encoded[:length], preprocessing(), MAX_PIXELS)
        except (UndecodableError, UnsupportedError) as error:
            assert error.message
        else:
            assert length > len(encoded) // 2  # a file may end with what nobody needs
    with pytest.raises((UndecodableError, UnsupportedError)):
        decode(encoded[: len(encoded) // 2], preprocessing(), MAX_PIXELS)


@settings(max_examples=400)
@given(format=st.sampled_from(FORMATS), seed=st.integers(0, 2**32), count=st.integers(1, 12), early=st.booleans())
@pytest.mark.filterwarnings("ignore")  # Pillow warns of odd files; the answer is the same
def test_mutated_files_give_pixels_or_an_answer_to_the_client(format: str, seed: int, count: int, early: bool) -> None:
    chance, mutated = random.Random(seed), bytearray(FILES[format])
    for _ in range(count):
        mutated[chance.randrange(min(len(mutated), 120) if early else len(mutated))] = chance.randrange(256)
    try:
        pixels = decode(bytes(mutated), preprocessing(), MAX_PIXELS)
    except ServerError as error:
        assert 400 <= error.status < 500 and error.message
    else:
        assert len(pixels) == 32 * 32 * 3


@pytest.mark.parametrize("content", [b"", b"\0", b"garbage", b"<svg xmlns='http://www.w3.org/'/>", b"%PDF-1.4", b"{}"])
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises((UndecodableError, UnsupportedError)) as refusal:
        decode(content, preprocessing(), MAX_PIXELS)
    assert type(refusal.value) is (UnsupportedError if content else UndecodableError)


@pytest.mark.parametrize("format", ["PPM", "TGA", "ICO", "PCX", "EPS", "PDF"])
def test_a_format_that_is_not_on_the_list_is_unsupported_and_the_list_is_told(format: str) -> None:
    with pytest.raises(UnsupportedError, match="JPEG, PNG, WEBP") as refusal:
        decode(encode(noise(32, 32), format), preprocessing(), MAX_PIXELS)
    assert refusal.value.details["formats"] == FORMATS


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="floating-point"):
        decode(encode(Image.new("F", (8, 8), 0.5), "TIFF"), preprocessing(), MAX_PIXELS)
