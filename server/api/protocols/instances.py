"""Bodies of `instances` and answers of `predictions`, common to KServe v1, TorchServe and Vertex AI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from server.api.body import Upload, check_count, joined, parse, read_query, uploads_of
from server.api.described import ParametersObject, body_of, in_query
from server.api.json_body import read_json
from server.api.routes import classes
from server.api.schemas import Parameters
from server.errors import InvalidError, shown
from server.ipc.messages import TopK
from server.types import ModelInfo

_FIELDS = ("b64", "data")
_TEXT: JsonValue = {"type": "string"}
_OBJECTS: list[JsonValue] = [
    {"type": "object", "properties": {name: _TEXT}, "required": [name], "additionalProperties": False}
    for name in _FIELDS
]


class InstancesBody(BaseModel):
    """A JSON request."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"instances": [{"b64": "..."}]}})

    instances: list[Any] = Field(
        description='Images: each {"b64": "..."}, {"data": "..."} or the base64 itself; a data: prefix is optional.',
        min_length=1,
        json_schema_extra={"items": {"anyOf": [_TEXT, *_OBJECTS]}},
    )
    parameters: ParametersObject = None


ASKED = {
    "requestBody": body_of({"application/json": InstancesBody.model_json_schema()}, "Images and parameters."),
    "parameters": in_query(Parameters),
}


async def read_instances(
    request: Request, max_images: int, beside: Mapping[str, Any] | None = None
) -> tuple[list[Upload], Parameters]:
    """Reads images and parameters from JSON, for any content type.

    Args:
        request: Its body is read.
        max_images: Most images.
        beside: Parameters from outside the query and the body.

    Raises:
        UndecodableError, TooLargeError, InvalidError: See `read_request`.
    """
    query = joined(read_query(request), dict(beside or {}))
    body = await read_json(request, max_images, _FIELDS)
    if isinstance(body.get("instances"), list):  # before each image is checked
        check_count(len(body["instances"]), max_images, "JSON 'instances'")
    said = parse(InstancesBody, body)
    parameters = parse(Parameters, joined(query, said.parameters or {}))
    texts = [_text_of(instance, index) for index, instance in enumerate(said.instances)]
    return await uploads_of(texts), parameters


def scores_by_label(info: ModelInfo, top_k: TopK) -> dict[str, float]:
    """The score of each likeliest label. Classes that share a label have the highest score."""
    scores: dict[str, float] = {}
    for each in classes(info, top_k):
        scores.setdefault(each["label"], each["score"])
    return scores


def _text_of(instance: Any, index: int) -> str:
    """The base64 of an instance."""
    text = instance
    if isinstance(instance, dict) and len(instance) == 1:
        text = next((instance[name] for name in _FIELDS if name in instance), None)
    if not isinstance(text, str):
        raise InvalidError(
            f"instances.{index} is {shown(instance)}; it must be {{'b64': TEXT}}, {{'data': TEXT}} or TEXT, "
            "where TEXT is base64"
        )
    return text
