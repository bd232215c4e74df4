"""Bodies of Hugging Face's inference: a raw image, or JSON with `inputs` and `parameters`. SageMaker uses the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from server.api.asking import Answer
from server.api.body import Upload, check_count, content_type_of, joined, parse, read_query, read_whole, uploads_of
from server.api.described import FILE, ParametersObject, body_of, in_query
from server.api.json_body import read_json
from server.api.routes import classes
from server.api.schemas import Parameters
from server.errors import UnsupportedError
from server.ipc.messages import TopK


class InputsBody(BaseModel):
    """A JSON request. Other fields, which clients send for other servers, are ignored."""

    model_config = ConfigDict(extra="ignore")

    inputs: str | list[str] = Field(description="An image or several: base64, with or without a data: prefix.")
    parameters: ParametersObject = None


class LabelScore(BaseModel):
    """A class and its score."""

    label: str
    score: float


class Read(NamedTuple):
    """A parsed request.

    Attributes:
        uploads: The images.
        parameters: The parameters.
        is_list: Whether the images came as a list; the answer then is one.
    """

    uploads: list[Upload]
    parameters: Parameters
    is_list: bool


ASKED = {
    "requestBody": body_of(
        {"image/*": FILE, "application/octet-stream": FILE, "application/json": InputsBody.model_json_schema()},
        "A raw image, of any content type or none, or JSON.",
    ),
    "parameters": in_query(Parameters),
}


async def read_inputs(request: Request, max_images: int, beside: Mapping[str, Any] | None = None) -> Read:
    """Reads images and parameters.

    Args:
        request: Its body is read.
        max_images: Most images.
        beside: Parameters from outside the query and the body.

    Raises:
        UnsupportedError: The body is a form.
        UndecodableError, TooLargeError, InvalidError: See `read_request`.
    """
    said = joined(read_query(request), dict(beside or {}))
    kind = content_type_of(request)
    if kind == "multipart/form-data":
        raise UnsupportedError("this endpoint takes no form; send the image as the body, or base64 in JSON 'inputs'")
    if kind != "application/json":
        return Read([Upload(await read_whole(request))], parse(Parameters, said), is_list=False)
    body = await read_json(request, max_images, ("inputs",))
    if isinstance(body.get("inputs"), list):  # before each image is checked
        check_count(len(body["inputs"]), max_images, "JSON 'inputs' or raw")
    inputs = parse(InputsBody, body)
    parameters = parse(Parameters, joined(said, inputs.parameters or {}))
    return Read(await uploads_of(inputs.inputs), parameters, isinstance(inputs.inputs, list))


def labels_of(answer: Answer[TopK], *, is_list: bool) -> list[Any]:
    """Label and score of each likeliest class; a list of such lists if the images came as a list."""
    told = [
        [{"label": each["label"], "score": each["score"]} for each in classes(answer.terms.info, top_k)]
        for top_k in answer.answered.results
    ]
    return told if is_list else told[0]
