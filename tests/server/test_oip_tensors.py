"""Tensors of the Open Inference Protocol: what was packed is read again, and nothing else is read."""

from __future__ import annotations

import base64
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.api.body import Upload
from server.api.protocols.oip_tensors import Output, Tensor, elements, images_of, only_file
from server.errors import InvalidError, ServerError, TooLargeError, UndecodableError
from server.images.image import Pixels
from server.images.preprocessing import Preprocessing
from tests.server.conftest import encode, grey_png

HEIGHT, WIDTH = 2, 3
PREPROCESSING = Preprocessing(
    (HEIGHT, WIDTH), (HEIGHT, WIDTH), "center", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)
SIZE = HEIGHT * WIDTH * 3
PIXELS = st.integers(1, 4).flatmap(lambda n: st.binary(min_size=n * SIZE, max_size=n * SIZE))


def packed(files: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


def read(datatype: str, shape: list[int], content: Any, name: str = "image", max_images: int = 4) -> list[Any]:
    return list(images_of(Tensor(name, datatype, shape, content), PREPROCESSING, max_images))


def normalised(pixels: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """FP32 of UINT8, as the model's preprocessing makes it."""
    levels = np.frombuffer(pixels, np.uint8).reshape(-1, HEIGHT, WIDTH, 3).transpose(0, 3, 1, 2) / 255
    mean, std = (np.reshape(each, (3, 1, 1)) for each in (PREPROCESSING.mean, PREPROCESSING.std))
    return np.ascontiguousarray((levels - mean) / std, dtype="<f4")


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_elements_are_what_was_packed(files: list[bytes]) -> None:
    assert elements(packed(files), len(files)) == files
    assert elements(memoryview(packed(files)), len(files)) == files


@given(st.binary(max_size=60), st.integers(0, 5))
def test_elements_of_anything_are_refused_or_pack_to_the_same(content: bytes, count: int) -> None:
    try:
        found = elements(content, count)
    except UndecodableError:
        return
    assert len(found) == count and packed(found) == content


@given(PIXELS)
def test_pixels_arrive_as_they_were_sent(pixels: bytes) -> None:
    n = len(pixels) // SIZE
    each = [Pixels(pixels[start : start + SIZE]) for start in range(0, len(pixels), SIZE)]
    shape, nested = [n, HEIGHT, WIDTH, 3], np.frombuffer(pixels, np.uint8).reshape(n, HEIGHT, WIDTH, 3).tolist()
    for content in (pixels, memoryview(pixels), list(pixels), nested):
        assert read("UINT8", shape, content) == each


@given(PIXELS)
def test_normalised_pixels_come_back_to_the_bit(pixels: bytes) -> None:
    values = normalised(pixels)
    each = [Pixels(pixels[start : start + SIZE]) for start in range(0, len(pixels), SIZE)]
    for content in (values.tobytes(), values.ravel().tolist(), values.tolist()):
        assert read("FP32", list(values.shape), content) == each


def test_what_resizing_overshoots_is_clipped() -> None:
    values = normalised(bytes([0] * 9 + [255] * 9))
    values += np.where(values > 0, 0.5, -0.5).astype(np.float32)
    assert read("FP32", [1, 3, HEIGHT, WIDTH], values.tobytes()) == [Pixels(bytes([0] * 9 + [255] * 9))]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 3e38, 255.0, -10.0])
def test_values_that_are_no_pixels_are_refused_naming_mean_and_std(wrong: float) -> None:
    values = normalised(bytes(SIZE))
    values[0, 1, 1, 2] = wrong
    with pytest.raises(InvalidError, match=r"mean \(0.485, 0.456, 0.406\) and std \(0.229, 0.224, 0.225\)"):
        read("FP32", [1, 3, HEIGHT, WIDTH], values.tobytes())


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_files_come_raw_or_as_base64(shape: list[int]) -> None:
    files = [grey_png(1), encode(Image.new("RGB", (9, 9)), "JPEG")]
    texts = [base64.b64encode(file).decode() for file in files]
    addresses = [f"data:image/png;base64,{text}" for text in texts]
    for content in (
        packed(files),
        packed([text.encode() for text in texts]),
        packed([text.encode() for text in addresses]),
        texts,
        addresses,
        [[text] for text in texts],
        files,
        [text.encode() for text in texts],
    ):
        assert read("BYTES", shape, content) == [Upload(file) for file in files]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("size", [(1, 1), (300, 200)])
def test_no_format_is_taken_for_base64(format: str, size: tuple[int, int]) -> None:
    file = encode(Image.new("RGB", size, (7, 90, 200)), format)
    assert read("BYTES", [1], packed([file])) == [Upload(file)]


def test_a_body_that_is_a_file_may_have_its_length_before_it() -> None:
    file = grey_png()
    for body in (file, packed([file])):
        tensor = only_file(body)
        assert images_of(tensor, PREPROCESSING, 1) == [Upload(file)]


@pytest.mark.parametrize(
    ("datatype", "shape", "content", "error", "message"),
    [
        ("BYTES", [], b"", InvalidError, r"must be \[n\] or \[n, 1\]"),
        ("BYTES", [1, 2], b"", InvalidError, r"has shape \[1, 2\]"),
        ("BYTES", [-1], b"", InvalidError, "has shape"),
        ("BYTES", [0], b"", UndecodableError, "no image"),
        ("BYTES", [5], b"", TooLargeError, "at most 4"),
        ("BYTES", [10**30], b"", TooLargeError, "at most 4"),
        ("BYTES", [1], packed([b"a", b"b"]), UndecodableError, "5 bytes after"),
        ("BYTES", [1], b"\x00\x00", UndecodableError, "ends in its element 0"),
        ("BYTES", [2], ["aaaa"], UndecodableError, "1 values"),
        ("BYTES", [1], [7], InvalidError, "element 0 of image is 7"),
        ("BYTES", [1], ["?"], UndecodableError, "image 0 is not base64"),
        ("UINT8", [1, 3, HEIGHT, WIDTH], bytes(SIZE), InvalidError, r"\[n, 2, 3, 3\]"),
        ("UINT8", [1, HEIGHT, WIDTH, 3], bytes(SIZE - 1), UndecodableError, "17 values .* says 18"),
        ("UINT8", [1, HEIGHT, WIDTH, 3], [0.5] * SIZE, InvalidError, "integers from 0 to 255"),
        ("UINT8", [1, HEIGHT, WIDTH, 3], [256] * SIZE, InvalidError, "integers from 0 to 255"),
        ("UINT8", [1, HEIGHT, WIDTH, 3], [10**30] * SIZE, InvalidError, "integers from 0 to 255"),
        ("UINT8", [1, HEIGHT, WIDTH, 3], ["1"] * SIZE, InvalidError, "integers from 0 to 255"),
        ("UINT8", [1, HEIGHT, WIDTH, 3], [[1], 2], InvalidError, "lists beside values"),
        ("FP32", [1, HEIGHT, WIDTH, 3], bytes(4 * SIZE), InvalidError, r"\[n, 3, 2, 3\]"),
        ("FP32", [1, 3, HEIGHT, WIDTH], bytes(4 * SIZE - 2), UndecodableError, "17.5 values"),
        ("FP32", [1, 3, HEIGHT, WIDTH], ["1"] * SIZE, InvalidError, "must be numbers"),
        ("FP32", [1, 3, HEIGHT, WIDTH], [10**400] * SIZE, InvalidError, "must be numbers"),
        ("FP16", [1, 3, HEIGHT, WIDTH], b"", InvalidError, "it may be BYTES, UINT8, FP32"),
    ],
)
def test_what_does_not_fit_is_refused(
    datatype: str, shape: list[int], content: Any, error: type[ServerError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(datatype, shape, content)


def test_another_name_is_refused() -> None:
    with pytest.raises(InvalidError, match="there is no input 'pixels'; the only one is image"):
        read("BYTES", [1], packed([b""]), name="pixels")


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4),
)


@given(
    st.sampled_from(("BYTES", "UINT8", "FP32")) | st.text(max_size=5),
    st.lists(st.integers(-2, 5), max_size=5),
    st.binary(max_size=100) | st.lists(JSON, max_size=20),
)
def test_anything_is_read_or_refused(datatype: str, shape: list[int], content: Any) -> None:
    try:
        sent = read(datatype, shape, content)
    except ServerError as error:
        assert 400 <= error.status < 500
    else:
        assert len(sent) == shape[0]


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=9))
def test_numbers_of_an_answer_are_the_same_raw_and_as_json(values: list[float]) -> None:
    output = Output("logits", "FP32", [1, len(values)], struct.pack(f"<{len(values)}f", *values))
    assert output.values == values
    assert list(struct.unpack(f"<{len(values)}f", output.raw)) == values


@given(st.lists(st.text(max_size=9), max_size=5))
def test_texts_of_an_answer_are_elements_of_bytes(texts: list[str]) -> None:
    output = Output("logits", "BYTES", [len(texts)], texts)
    assert output.values == texts
    try:
        encoded = [text.encode() for text in texts]
    except UnicodeEncodeError:
        return
    assert elements(output.raw, len(texts)) == encoded
