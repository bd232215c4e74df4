"""Tensors of the Open Inference Protocol: images from a request's tensors, and the tensors of an answer.

Pure: independent of HTTP and gRPC, and nothing is decoded here.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from server.api.body import Upload, from_base64
from server.api.reading import Sent
from server.errors import InvalidError, TooLargeError, UndecodableError, shown
from server.images.image import Pixels
from server.images.preprocessing import Preprocessing

INPUT = "image"
"""The name of every model's only input."""

_LENGTH = struct.Struct("<I")
_BASE64 = re.compile(rb"data:|[A-Za-z0-9+/_=\s-]{16}")
"""The start of base64. No image format begins with 16 such bytes: each has a zero or a byte above 127 among them."""

_BEYOND = 255 / 4
"""Tolerance outside 0 to 255 for a pixel that was made by resizing: bicubic interpolation overshoots."""


class Tensor(NamedTuple):
    """A tensor as it arrived.

    Attributes:
        content: Its data: bytes, or JSON values in a list that may be nested.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    content: bytes | memoryview | list[Any]


class Output(NamedTuple):
    """A tensor of an answer.

    Attributes:
        content: Little-endian float32 for FP32; the texts for BYTES.
    """

    name: str
    datatype: str
    shape: list[int]
    content: bytes | list[str]

    @property
    def raw(self) -> bytes:
        """The content as binary data."""
        if isinstance(self.content, bytes):
            return self.content
        encoded = [text.encode() for text in self.content]
        return b"".join(part for text in encoded for part in (_LENGTH.pack(len(text)), text))

    @property
    def values(self) -> list[Any]:
        """The content for JSON: a flat list."""
        return list(array("f", self.content)) if isinstance(self.content, bytes) else self.content


def num_values(preprocessing: Preprocessing) -> int:
    """The number of values of one image's pixels."""
    height, width = preprocessing.input_size
    return 3 * height * width


def images_of(tensor: Tensor, preprocessing: Preprocessing, max_images: int) -> list[Sent]:
    """The images of the input.

    Args:
        tensor: BYTES of shape [n] or [n, 1]: encoded files, or base64 of these. UINT8 of [n, height, width, 3]: pixels.
            FP32 of [n, 3, height, width]: preprocessed pixels.
        preprocessing: The model's.
        max_images: Most images.

    Raises:
        InvalidError: Its name, datatype, shape or a value is wrong.
        UndecodableError: It holds no image, its data does not have the length of its shape, or it is not base64.
        TooLargeError: It holds too many images.
    """
    if tensor.name != INPUT:
        raise InvalidError(f"there is no input {shown(tensor.name)}; the only one is {INPUT}")
    height, width = preprocessing.input_size
    forms: dict[str, tuple[Callable[[Tensor, Preprocessing], list[Sent]], list[list[int]]]] = {
        "BYTES": (_from_files, [[], [1]]),
        "UINT8": (_from_uint8, [[height, width, 3]]),
        "FP32": (_from_fp32, [[3, height, width]]),
    }
    if tensor.datatype not in forms:
        raise InvalidError(f"{INPUT} has datatype {shown(tensor.datatype)}; it may be {', '.join(forms)}")
    read, shapes = forms[tensor.datatype]
    if not tensor.shape or list(tensor.shape[1:]) not in shapes or tensor.shape[0] < 0:
        allowed = " or ".join(f"[{', '.join(map(str, ['n', *shape]))}]" for shape in shapes)
        raise InvalidError(
            f"{INPUT} has shape {shown(list(tensor.shape))}; with datatype {tensor.datatype} it must be {allowed}"
        )
    if tensor.shape[0] == 0:
        raise UndecodableError("the request holds no image")
    if tensor.shape[0] > max_images:
        raise TooLargeError(
            f"the request holds {shown(tensor.shape[0])} images; at most {max_images} are allowed",
            max_images=max_images,
        )
    return read(tensor, preprocessing)


def elements(content: bytes | memoryview, count: int) -> list[bytes]:
    """The elements of BYTES, each after its length. Raises UndecodableError if there are not `count` of them."""
    found, place = [], 0
    for index in range(count):
        start = place + _LENGTH.size
        end = start + _LENGTH.unpack_from(content, place)[0] if start <= len(content) else start
        if end > len(content):
            raise UndecodableError(
                f"{INPUT} ends in its element {index}: its shape says {count}, and each follows its length in 4 bytes, "
                "little-endian"
            )
        found.append(bytes(content[start:end]))
        place = end
    if place < len(content):
        raise UndecodableError(f"{INPUT} has {len(content) - place} bytes after the {count} elements of its shape")
    return found


def only_file(body: bytes) -> Tensor:
    """The input of a request that is only a file, with or without its length before it."""
    has_length = len(body) >= _LENGTH.size and _LENGTH.unpack_from(body)[0] == len(body) - _LENGTH.size
    return Tensor(INPUT, "BYTES", [1], body if has_length else _LENGTH.pack(len(body)) + body)


def _from_files(tensor: Tensor, preprocessing: Preprocessing) -> list[Sent]:
    content, count = tensor.content, tensor.shape[0]
    if not isinstance(content, list):
        return [Upload(_file(each, index)) for index, each in enumerate(elements(content, count))]
    texts = _flat(content)
    if len(texts) != count:
        raise _miscounted(len(texts), count)
    uploads: list[Sent] = []
    for index, text in enumerate(texts):
        if isinstance(text, bytes):
            uploads.append(Upload(_file(text, index)))
        elif isinstance(text, str):
            uploads.append(Upload(from_base64(text, index)))
        else:
            raise InvalidError(f"element {index} of {INPUT} is {shown(text)}; it must be base64 of an image file")
    return uploads


def _file(element: bytes, index: int) -> bytes:
    """An image file; some clients send base64 as BYTES."""
    return from_base64(element.decode("latin-1"), index) if _BASE64.match(element) else element


def _from_uint8(tensor: Tensor, preprocessing: Preprocessing) -> list[Sent]:
    size = num_values(preprocessing)
    content = tensor.content
    if isinstance(content, list):
        try:
            content = bytes(_flat(content))
        except (TypeError, ValueError, OverflowError):
            raise InvalidError(f"{INPUT} has datatype UINT8; its values must be integers from 0 to 255") from None
    if len(content) != tensor.shape[0] * size:
        raise _miscounted(len(content), tensor.shape[0] * size)
    return [Pixels(bytes(content[start : start + size])) for start in range(0, len(content), size)]


def _from_fp32(tensor: Tensor, preprocessing: Preprocessing) -> list[Sent]:
    import numpy as np  # most requests do not need it

    content: Any = tensor.content
    if isinstance(content, list):
        try:
            content = array("f", _flat(content))
        except (TypeError, OverflowError):
            raise InvalidError(f"{INPUT} has datatype FP32; its values must be numbers") from None
    count, size = tensor.shape[0], num_values(preprocessing)
    num_bytes = memoryview(content).nbytes
    if num_bytes != 4 * count * size:
        raise _miscounted(num_bytes / 4, count * size)
    mean, std = (np.array(each, np.float32).reshape(3, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    with np.errstate(all="ignore"):  # values that are not finite are refused below
        levels = 255 * (np.frombuffer(content, "<f4").reshape(count, 3, *preprocessing.input_size) * std + mean)
        lowest, highest = float(levels.min()), float(levels.max())
    if not (lowest >= -_BEYOND and highest <= 255 + _BEYOND):  # also false for NaN
        raise InvalidError(
            f"{INPUT} holds pixels from {lowest:.4g} to {highest:.4g}, which must lie between 0 and 255: FP32 is "
            f"taken as (pixel / 255 - mean) / std with mean {preprocessing.mean} and std {preprocessing.std}; send "
            "unprocessed pixels as UINT8"
        )
    pixels = np.rint(levels.clip(0, 255)).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Pixels(each.tobytes()) for each in pixels]


def _flat(values: list[Any]) -> list[Any]:
    """The values of nested lists, row by row."""
    while values and isinstance(values[0], list):
        if not all(isinstance(each, list) for each in values):
            raise InvalidError(f"{INPUT} has lists beside values in its data")
        values = list(chain.from_iterable(values))
    return values


def _miscounted(got: float, wanted: int) -> UndecodableError:
    return UndecodableError(f"{INPUT} has {got:.12g} values in its data; its shape says {wanted}")
