"""The messages of the Open Inference Protocol over gRPC, built from a table of their fields.

Names and numbers are facts of the published interface: kserve/open-inference-protocol (Apache-2.0) has metadata and
inference, NVIDIA Triton's grpc_service.proto and model_config.proto have the others. Fields that this server neither
reads nor writes are left out; protobuf skips them. The messages have their own pool, because a process may have one
package "inference" in the common pool, and clients have theirs there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from server.errors import TooLargeError, UndecodableError

SERVICE = "inference.GRPCInferenceService"

_PACKAGE = "inference"

_TABLE = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live=1:bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready=1:bool",
    "ModelReadyRequest": "name=1 version=2",
    "ModelReadyResponse": "ready=1:bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name=1 version=2 extensions=3:[]string",
    "ModelMetadataRequest": "name=1 version=2",
    "ModelMetadataResponse": "name=1 versions=2:[]string platform=3 inputs=4:[]TensorMetadata "
    "outputs=5:[]TensorMetadata",
    "TensorMetadata": "name=1 datatype=2 shape=3:[]int64",
    "ModelConfigRequest": "name=1 version=2",
    "ModelConfigResponse": "config=1:ModelConfig",
    "ModelConfig": "name=1 platform=2 max_batch_size=4:int32 input=5:[]ModelInput output=6:[]ModelOutput "
    "dynamic_batching=11:ModelDynamicBatching parameters=14:{}ModelParameter backend=17",
    "ModelInput": "name=1 data_type=2:DataType dims=4:[]int64",
    "ModelOutput": "name=1 data_type=2:DataType dims=3:[]int64",
    "ModelDynamicBatching": "",
    "ModelParameter": "string_value=1",
    "ModelStatisticsRequest": "name=1 version=2",
    "ModelStatisticsResponse": "model_stats=1:[]ModelStatistics",
    "ModelStatistics": "name=1 version=2 inference_count=4:uint64 execution_count=5:uint64 "
    "inference_stats=6:InferStatistics",
    "InferStatistics": " ".join(
        f"{name}={number}:StatisticDuration"
        for number, name in enumerate(
            "success fail queue compute_input compute_infer compute_output cache_hit cache_miss".split(), 1
        )
    ),
    "StatisticDuration": "count=1:uint64 ns=2:uint64",
    "RepositoryIndexRequest": "repository_name=1 ready=2:bool",
    "RepositoryIndexResponse": "models=1:[]ModelIndex",
    "ModelIndex": "name=1 version=2 state=3 reason=4",
    # KServe's client writes the name into field 1, and reads the answer; Triton's answer is empty.
    "RepositoryModelLoadRequest": "repository_name=1 model_name=2 parameters=3:{}ModelRepositoryParameter",
    "RepositoryModelLoadResponse": "model_name=1 is_loaded=2:bool",
    "RepositoryModelUnloadRequest": "repository_name=1 model_name=2 parameters=3:{}ModelRepositoryParameter",
    "RepositoryModelUnloadResponse": "model_name=1 is_unloaded=2:bool",
    "ModelRepositoryParameter": "bool_param=1|bool int64_param=2|int64 string_param=3|string bytes_param=4|bytes",
    "ModelInferRequest": "model_name=1 model_version=2 id=3 parameters=4:{}InferParameter inputs=5:[]InferInputTensor "
    "outputs=6:[]InferRequestedOutputTensor raw_input_contents=7:[]bytes",
    "InferInputTensor": "name=1 datatype=2 shape=3:[]int64 parameters=4:{}InferParameter "
    "contents=5:InferTensorContents",
    "InferRequestedOutputTensor": "name=1 parameters=2:{}InferParameter",
    "InferTensorContents": "uint_contents=4:[]uint32 fp32_contents=6:[]float bytes_contents=8:[]bytes",
    "ModelInferResponse": "model_name=1 model_version=2 id=3 parameters=4:{}InferParameter "
    "outputs=5:[]InferOutputTensor raw_output_contents=6:[]bytes",
    "InferOutputTensor": "name=1 datatype=2 shape=3:[]int64 parameters=4:{}InferParameter",
    "InferParameter": "bool_param=1|bool int64_param=2|int64 string_param=3|string double_param=4|double "
    "uint64_param=5|uint64",
}
"""The fields of each message, NAME=NUMBER:TYPE. The default type is string; `[]` is a list, `{}` a map from strings,
and `|` instead of the colon means that at most one of such fields is set.
"""

_DATA_TYPES = {"TYPE_INVALID": 0, "TYPE_FP32": 11, "TYPE_STRING": 13}

_SCALARS = {
    name: getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{name.upper()}")
    for name in ("bool", "bytes", "double", "float", "int32", "int64", "string", "uint32", "uint64")
}


_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
"""Wire types of fields. The two other wire types are obsolete."""


def read_message(name: str, encoded: bytes, most_fields: int) -> Any:
    """Parses a message.

    Its fields are counted first: an empty one takes two bytes, but a hundred times that in memory.

    Args:
        name: Its kind.
        encoded: Its bytes.
        most_fields: Most fields, including those of inner messages. A packed list of numbers is one field.

    Raises:
        UndecodableError: It is not of that kind.
        TooLargeError: It has too many fields.
    """
    try:
        _count(memoryview(encoded), name, 0, most_fields)
        return message_class(name).FromString(encoded)
    except (DecodeError, IndexError):
        raise UndecodableError(f"the message is not a {name} of {SERVICE}") from None


def _count(encoded: memoryview, name: str, count: int, most: int) -> int:
    """Adds the fields of a message to `count`; raises IndexError if the message is cut off."""
    inner, place = _inner(name), 0
    while place < len(encoded):
        count += 1
        if count > most:
            raise TooLargeError(f"the message has more than {most} fields", max_fields=most)
        tag, place = _varint(encoded, place)
        how = tag & 7
        if how == _VARINT:
            _, place = _varint(encoded, place)
        elif how == _LENGTH:
            size, place = _varint(encoded, place)
            if size > len(encoded) - place:
                raise IndexError
            if tag >> 3 in inner:
                count = _count(encoded[place : place + size], inner[tag >> 3], count, most)
            place += size
        elif how in (_EIGHT_BYTES, _FOUR_BYTES):
            place += 8 if how == _EIGHT_BYTES else 4
        else:
            raise IndexError
    return count


def _varint(encoded: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the place after it."""
    value = shift = 0
    while True:
        byte = encoded[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise IndexError


@functools.cache
def _inner(name: str) -> dict[int, str]:
    """The fields of a message that are messages, by number. A map entry counts as one field."""
    return {
        number: kind.removeprefix("[]")
        for _, number, kind, _ in _fields(_TABLE[name])
        if kind.removeprefix("[]") in _TABLE
    }


@functools.cache
def message_class(name: str) -> Any:
    """The class of a message."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}"))


@functools.cache
def _pool() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="oip.proto", package=_PACKAGE, syntax="proto3")
    file.enum_type.add(
        name="DataType",
        value=[descriptor_pb2.EnumValueDescriptorProto(name=name, number=at) for name, at in _DATA_TYPES.items()],
    )
    for name, fields in _TABLE.items():
        message = file.message_type.add(name=name)
        for field, number, kind, is_alternative in _fields(fields):
            _add(message, field, number, kind, is_alternative)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _fields(fields: str) -> Iterator[tuple[str, int, str, bool]]:
    for each in fields.split():
        name, _, rest = each.partition("=")
        number, _, kind = rest.replace("|", ":").partition(":")
        yield name, int(number), kind or "string", "|" in rest


def _add(message: Any, name: str, number: int, kind: str, is_alternative: bool) -> None:
    proto = descriptor_pb2.FieldDescriptorProto
    field = message.field.add(name=name, number=number, label=proto.LABEL_OPTIONAL)
    if kind[:2] in ("[]", "{}"):
        field.label = proto.LABEL_REPEATED
    if is_alternative:
        if not message.oneof_decl:
            message.oneof_decl.add(name="value")
        field.oneof_index = 0
    if kind.startswith("{}"):
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add(entry, "key", 1, "string", False)
        _add(entry, "value", 2, kind[2:], False)
        field.type = proto.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{message.name}.{entry.name}"
        return
    kind = kind.removeprefix("[]")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = proto.TYPE_ENUM if kind == "DataType" else proto.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{kind}"
