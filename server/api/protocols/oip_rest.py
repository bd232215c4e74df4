"""Inference requests and answers of the Open Inference Protocol as HTTP bodies: JSON, then binary data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from server.api.json_body import LONGEST_TEXT, MOST_FIELDS, MOST_VALUES, check_values
from server.api.protocols.oip_infer import Inference, Inferred, Wanted, classification_of
from server.api.protocols.oip_tensors import Tensor, num_values, only_file
from server.errors import InvalidError, UndecodableError, shown
from server.images.preprocessing import Preprocessing
from server.types import ModelInfo

JSON_LENGTH = "inference-header-content-length"
"""The header with the length of the JSON, if binary data follows it."""


class _Input(Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class _Output(Struct):
    name: str
    parameters: dict[str, Any] | None = None


class _Request(Struct):
    """A client's request. Other fields are ignored: some clients also send the model's name."""

    inputs: list[_Input]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[_Output] | None = None


class Asked(NamedTuple):
    """A parsed request.

    Attributes:
        id: The client's id; empty if it has none.
        inference: The inference.
        binary: The outputs to return as binary data; None for all.
    """

    id: str
    inference: Inference
    binary: set[str] | None


_decode = msgspec.json.Decoder(_Request).decode
_encode = msgspec.json.Encoder().encode


def read(body: bytes, json_length: str | None, preprocessing: Preprocessing, max_images: int) -> Asked:
    """Parses a request.

    Args:
        body: The whole body, uncompressed.
        json_length: The header `JSON_LENGTH`. "0" means that the body is the one input and nothing else.
        preprocessing: The model's, which limits the values of the JSON.
        max_images: Most images.

    Raises:
        UndecodableError: It cannot be parsed.
        InvalidError: A parameter is wrong.
        TooLargeError: The JSON holds too many values.
    """
    length = len(body) if json_length is None else _length(json_length, len(body))
    if json_length is not None and length == 0:
        return Asked("", Inference([only_file(body)]), None)
    said = _parsed(body[:length], MOST_VALUES + max_images * num_values(preprocessing))
    inputs = _tensors(said.inputs, memoryview(body)[length:])
    wanted, binary = [], set()
    parameters = said.parameters or {}
    by_default = _flag(parameters, "binary_data_output", False)
    for output in said.outputs or ():
        of_it = output.parameters or {}
        wanted.append(Wanted(output.name, classification_of(of_it)))
        if _flag(of_it, "binary_data", by_default):
            binary.add(output.name)
    is_all = by_default and not said.outputs
    return Asked(said.id or "", Inference(inputs, wanted, parameters, size=len(body)), None if is_all else binary)


def write(asked: Asked, info: ModelInfo, inferred: Inferred) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON if binary data follows."""
    outputs, blocks = [], []
    for output in inferred.outputs:
        said: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if asked.binary is None or output.name in asked.binary:
            blocks.append(output.raw)
            said["parameters"] = {"binary_data_size": len(blocks[-1])}
        else:
            said["data"] = output.values
        outputs.append(said)
    head: dict[str, Any] = {"model_name": info.name, "model_version": info.version}
    if asked.id:
        head["id"] = asked.id
    json = _encode(head | {"parameters": inferred.parameters, "outputs": outputs})
    return b"".join((json, *blocks)), len(json) if blocks else None


def _length(header: str, most: int) -> int:
    length = int(header) if header.isascii() and header.isdigit() and len(header) < 20 else -1
    if not 0 <= length <= most:
        raise UndecodableError(
            f"Inference-Header-Content-Length is {shown(header)}; it must be an integer from 0 to {most}, the length "
            "of the body"
        )
    return length


def _parsed(json: bytes, most_values: int) -> _Request:
    check_values(json, most_values)
    try:
        said = _decode(json)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        raise UndecodableError(f"the request is not JSON of the Open Inference Protocol: {error}") from None
    everything = (said.parameters, *(each.parameters for each in (*said.inputs, *(said.outputs or ()))))
    for parameters in everything:
        if parameters is not None and len(parameters) > MOST_FIELDS:
            raise InvalidError(f"there are {len(parameters)} parameters; at most {MOST_FIELDS} are allowed")
    if said.id is not None and len(said.id) > LONGEST_TEXT:
        raise InvalidError(f"id has {len(said.id)} characters; at most {LONGEST_TEXT} are allowed")
    return said


def _tensors(inputs: Sequence[_Input], binary: memoryview) -> list[Tensor]:
    """The inputs, each with its data: from JSON, or the next block of binary data."""
    tensors = []
    for each in inputs:
        size = (each.parameters or {}).get("binary_data_size")
        if (size is None) == (each.data is None):
            raise UndecodableError(
                f"input {shown(each.name)} must have either 'data' or the parameter binary_data_size"
            )
        content: list[Any] | memoryview
        if each.data is not None:
            content = each.data
        elif isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= len(binary):
            content, binary = binary[:size], binary[size:]
        else:
            raise UndecodableError(
                f"binary_data_size of input {shown(each.name)} is {shown(size)}; {len(binary)} bytes are left for it"
            )
        tensors.append(Tensor(each.name, each.datatype, each.shape, content))
    if binary:
        raise UndecodableError(f"{len(binary)} bytes of binary data belong to no input")
    return tensors


def _flag(parameters: dict[str, Any], name: str, otherwise: bool) -> bool:
    value = parameters.get(name, otherwise)
    if not isinstance(value, bool):
        raise InvalidError(f"{name} is {shown(value)}; it must be true or false")
    return value
