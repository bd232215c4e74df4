"""The API's description of endpoints that read their own bodies, and of the headers of answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, WithJsonSchema

from server.api.body import Layout
from server.api.schemas import Parameters

FILE: dict[str, Any] = {"type": "string", "format": "binary"}

_PARAMETERS = Parameters.model_json_schema()
ParametersObject = Annotated[dict[str, Any] | None, WithJsonSchema({"anyOf": [_PARAMETERS, {"type": "null"}]})]
"""Parameters of a classification as a separate object. `parse` reads it, because its messages are better."""

ANSWERED: dict[int | str, dict[str, Any]] = {
    200: {
        "headers": {
            name: {"description": description, "schema": {"type": "string"}}
            for name, description in {
                "x-r": "The r that was used, as the query takes it.",
                "x-batch-size": "Images in the batch.",
                "x-config-version": "Version of the live configuration.",
                "server-timing": "Where the time went, in milliseconds.",
            }.items()
        }
    }
}


def asked(layout: Layout[Any]) -> dict[str, Any]:
    """Describes the input of `read_request`."""
    parameters = layout.parameters.model_json_schema()["properties"]
    form = {
        "type": "object",
        "properties": {"image": {"type": "array", "items": FILE, "minItems": 1}, **parameters},
        "required": ["image"],
        "additionalProperties": False,
    }
    content = {
        "multipart/form-data": form,
        "image/*": FILE,
        "application/octet-stream": FILE,
        "application/json": layout.body.model_json_schema(),
    }
    why = (
        "Images. The parameters may be here instead of in the query: fields of the form, or fields beside "
        f"`{layout.images}` in JSON."
    )
    return {"requestBody": body_of(content, why), "parameters": in_query(layout.parameters)}


def in_query(model: type[BaseModel]) -> list[dict[str, Any]]:
    """Describes the parameters of the query."""
    properties: dict[str, dict[str, Any]] = model.model_json_schema()["properties"]
    return [
        {"name": name, "in": "query", "schema": schema, "description": schema["description"]}
        for name, schema in properties.items()
    ]


def of_one_model(part: Any) -> Any:
    """The description for a path that names the model: without the parameter `model`."""
    if isinstance(part, list):
        return [of_one_model(each) for each in part if not (isinstance(each, dict) and each.get("name") == "model")]
    if isinstance(part, dict):
        return {name: of_one_model(each) for name, each in part.items() if name != "model"}
    return part


def body_of(content: dict[str, dict[str, Any]], description: str) -> dict[str, Any]:
    """Describes a body, with a schema for each content type."""
    return {
        "required": True,
        "description": description,
        "content": {kind: {"schema": schema} for kind, schema in content.items()},
    }
