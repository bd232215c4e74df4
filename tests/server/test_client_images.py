"""What the client makes of pixels: files that the server reads as it would have read the original."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.client.images import Encoded, encode
from server.errors import UnsupportedError
from server.images.pillow import decode
from tests.server.conftest import encode as file_of
from tests.server.conftest import model_info

SEEN = model_info().preprocessing


def noise(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(), (3,)]), st.integers(0, 5))
def test_an_array_is_sent_without_loss(height: int, width: int, channels: tuple[int, ...], seed: int) -> None:
    array = noise(height, width, *channels, seed=seed)
    with Image.open(io.BytesIO(encode(array).content)) as image:
        sent = np.asarray(image.convert("RGB"))
    assert (sent == (array if channels else array[..., None])).all()


def test_a_strip_that_webp_has_no_room_for_is_sent_without_loss() -> None:
    array = noise(2, 16384, 3)
    with Image.open(io.BytesIO(encode(array).content)) as image:
        assert (np.asarray(image) == array).all()


def _colours(mode: str) -> Image.Image:
    return Image.fromarray(noise(9, 13, 3)).convert(mode)


def _with_palette_transparency() -> Image.Image:
    image = _colours("P")
    image.info["transparency"] = 3
    return image


FILES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "bilevel": (_colours("1"), "PNG", {}),
    "grey": (_colours("L"), "PNG", {}),
    "grey alpha": (Image.merge("LA", [Image.fromarray(noise(9, 13, seed=s)) for s in (0, 1)]), "PNG", {}),
    "palette": (_colours("P"), "PNG", {}),
    "palette transparency": (_with_palette_transparency(), "PNG", {"transparency": 3}),
    "alpha": (Image.merge("RGBA", [Image.fromarray(noise(9, 13, seed=s)) for s in range(4)]), "PNG", {}),
    "cmyk": (_colours("CMYK"), "TIFF", {}),
    "16 bits": (Image.fromarray(noise(9, 13).astype(np.uint16) * 257 - 1), "PNG", {}),
    "jpeg": (_colours("RGB"), "JPEG", {}),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("orientation", [None, 6])
def test_an_open_picture_is_read_as_its_file(name: str, orientation: int | None) -> None:
    image, format, options = FILES[name]
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = options | {"exif": exif.tobytes()}
    file = file_of(image, format, **options)
    with Image.open(io.BytesIO(file)) as opened:
        sent = encode(opened).content
    assert decode(sent, SEEN, 10_000) == decode(file, SEEN, 10_000)


def test_the_orientation_counts() -> None:
    """That the test above can fail."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = _colours("RGB")
    turned = file_of(photo, "JPEG", exif=exif.tobytes())
    assert decode(turned, SEEN, 10_000) != decode(file_of(photo, "JPEG"), SEEN, 10_000)


def test_a_file_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "any.thing"
    path.write_bytes(b"whatever")
    assert encode(path) == encode(str(path)) == Encoded(b"whatever", "any.thing")
    with pytest.raises(FileNotFoundError):
        encode(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 5, 3), np.float32), r"\(4, 5, 3\) and dtype float32"),
        (np.zeros((4, 5, 3), np.int64), "int64"),
        (np.zeros((4, 5), bool), "bool"),
        (np.zeros((4, 5, 4), np.uint8), r"\(4, 5, 4\)"),
        (np.zeros((3, 4, 5), np.uint8), r"\(3, 4, 5\)"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"\(2, 4, 5, 3\)"),
        (np.zeros((4, 5, 1), np.uint8), r"\(4, 5, 1\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (np.zeros(4, np.uint8), r"\(4,\)"),
        (np.uint8(4), r"\(\)"),
    ],
)
def test_another_array_is_refused_by_shape_and_dtype(array: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode(array)


@pytest.mark.parametrize(("mode", "kind"), [("F", "floating-point"), ("I", "signed")])
def test_the_server_has_the_last_word_on_wide_pixels(mode: str, kind: str) -> None:
    sent = encode(Image.new(mode, (4, 4))).content
    with pytest.raises(UnsupportedError, match=kind):
        decode(sent, SEEN, 100)


@pytest.mark.parametrize("thing", [None, 3, [[1, 2]], object()], ids=lambda thing: type(thing).__name__)
def test_what_is_no_image_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=type(thing).__name__):
        encode(thing)
