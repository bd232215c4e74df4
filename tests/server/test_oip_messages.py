"""The messages by gRPC: the table of fields is right, and nothing else than a message is read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.protocols.oip_messages import _TABLE, message_class, read_message
from server.errors import TooLargeError, UndecodableError


def fields_of(message: Any) -> dict[str, tuple[Any, ...]]:
    """Name, number, type, the type of messages, and whether it is a list, for each field."""
    return {
        field.name: (
            field.number,
            field.type,
            field.message_type.name if field.message_type else None,
            field.is_repeated,
        )
        for field in message.fields
    }


# Messages that stand within another one there, and at the top here.
WITHIN = {
    "TensorMetadata": "ModelMetadataResponse",
    "InferInputTensor": "ModelInferRequest",
    "InferRequestedOutputTensor": "ModelInferRequest",
    "InferOutputTensor": "ModelInferResponse",
    "ModelIndex": "RepositoryIndexResponse",
}


FOR_KSERVE = ("RepositoryModelLoadResponse", "RepositoryModelUnloadResponse")
"""What Triton's client expects nothing of, and so passes over."""


@pytest.mark.parametrize("name", [name for name in _TABLE if name not in FOR_KSERVE])
def test_every_field_is_that_of_tritons_client(name: str) -> None:
    from tritonclient.grpc import model_config_pb2, service_pb2

    outer = getattr(service_pb2, WITHIN.get(name, name), None) or getattr(model_config_pb2, name)
    theirs = fields_of((getattr(outer, name) if name in WITHIN else outer).DESCRIPTOR)
    ours = fields_of(message_class(name).DESCRIPTOR)
    assert ours.items() <= theirs.items()


def a_request() -> Any:
    request = message_class("ModelInferRequest")(model_name="tiny", id="1", raw_input_contents=[b"ab", b""])
    request.parameters["r"].int64_param = 8
    for name in ("a", "b"):
        tensor = request.inputs.add(name=name, datatype="FP32", shape=[1, 300])
        tensor.contents.fp32_contents.extend([0.5] * 300)
        tensor.parameters["x"].string_param = "y"
    request.outputs.add(name="logits")
    return request


def test_a_message_is_read_as_it_was_written() -> None:
    request = a_request()
    assert read_message("ModelInferRequest", request.SerializeToString(), 100) == request


def test_fields_are_counted_in_all_messages_within() -> None:
    encoded = a_request().SerializeToString()
    # name, id, parameter, two inputs of name, type, shape, parameter, contents and its values, an output, two raw
    fields = 3 + 2 * (1 + 6) + 2 + 2
    assert read_message("ModelInferRequest", encoded, fields)
    with pytest.raises(TooLargeError, match=f"more than {fields - 1} fields"):
        read_message("ModelInferRequest", encoded, fields - 1)


@pytest.mark.parametrize("empty", [b"\x2a\x00", b"\x3a\x00", b"\x22\x00", b"\x18\x00"])
def test_a_small_message_cannot_come_to_much_memory(empty: bytes) -> None:
    with pytest.raises(TooLargeError):
        read_message("ModelInferRequest", empty * 100_000, 5000)
    with pytest.raises(TooLargeError):  # one input that holds them
        inner = empty * 10_000
        read_message("ModelInferRequest", b"\x2a" + b"\xa0\x9c\x01" + inner, 5000)


@given(st.binary(max_size=80))
def test_bytes_are_a_message_or_refused(encoded: bytes) -> None:
    try:
        message = read_message("ModelInferRequest", encoded, 50)
    except (UndecodableError, TooLargeError):
        return
    assert message == message_class("ModelInferRequest").FromString(encoded)


@given(st.data())
def test_a_message_that_was_changed_is_read_or_refused(data: st.DataObject) -> None:
    encoded = bytearray(a_request().SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_message("ModelInferRequest", bytes(encoded), 100)
    except (UndecodableError, TooLargeError):
        pass
