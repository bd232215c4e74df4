"""OpenAI's `POST /v1/embeddings` for images: pooled features before a model's head, with the `r` of the vector."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from server.api.access import ForUsers, errors_as
from server.api.asking import EMBED, Asking
from server.api.body import Layout, read_request
from server.api.described import ANSWERED, asked
from server.api.direct import DirectRoute
from server.api.faces import Face, Problem
from server.api.schemas import Dial, Parameters, RSource
from server.dial import PlainR, r_of
from server.errors import EngineError, InvalidError, shown
from server.settings import Settings
from server.types import ModelInfo

PATH = "/v1/embeddings"
_NO_MODEL = ("", "default/not-specified")
"""Names that clients send if their user names no model."""


class EmbeddingParameters(Dial):
    """Parameters of a request for vectors."""

    modality: Literal["image", "text"] | None = Field(None, description="image, or absent: text has no vectors here.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float, or base64 of little-endian float32; float when absent."
    )
    dimensions: int | None = Field(
        None, ge=0, description="Keep this many of the first numbers and normalize again; all with 0 or when absent."
    )
    normalize: bool | None = Field(None, description="Whether to scale vectors to length 1; true when absent.")
    user: str | None = Field(None, description="Not used.")


class EmbeddingBody(EmbeddingParameters):
    """A JSON request."""

    input: str | list[str] = Field(description="An image or several: base64, with or without a data: prefix.")


class EmbeddingVector(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of little-endian float32.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int = Field(description="Tokens that enter the first block, for all images.")
    total_tokens: int


class Embeddings(BaseModel):
    """The vector of each image, in the order of the images."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingVector]
    usage: EmbeddingUsage
    r: PlainR = Field(description="Tokens merged in each block. Keep vectors of one r in one index.")
    r_source: RSource = Field(description="Where r, or auto, comes from.")
    tokens: int = Field(description="Tokens left after the last block, of each image.")


class EmbeddingError(BaseModel):
    message: str
    type: str
    param: str | None
    code: str
    details: dict[str, Any]


class EmbeddingErrorBody(BaseModel):
    """An error in the form of OpenAI's clients."""

    error: EmbeddingError


router = APIRouter(responses=errors_as(EmbeddingErrorBody), route_class=DirectRoute, tags=["embeddings"])


_LAYOUT = Layout(EmbeddingParameters, EmbeddingBody, "input")


@router.post(PATH, response_model=Embeddings, responses=ANSWERED, openapi_extra=asked(_LAYOUT))
async def embed(request: Request, service: ForUsers) -> Response:
    """Vectors of images, for search. Takes JSON with base64, form parts `image` or a raw image, like /classify."""
    with Asking(service, request) as asking:
        uploads, said = await asking.read(read_request(request, service.settings.max_images, _LAYOUT))
        if said.modality == "text":
            raise InvalidError("modality is 'text'; there are vectors of images only, so it must be 'image' or absent")
        dial = said.model_dump(include=set(Dial.model_fields))
        dial["model"] = None if said.model in _NO_MODEL else said.model
        terms = asking.resolve(Parameters(**dial))
        dimensions = _dimensions(said, terms.info)
        answer = await asking.answer(EMBED, uploads, terms)
        shape = _in_base64 if said.encoding_format == "base64" else list
        data = [
            {"object": "embedding", "index": index, "embedding": shape(_cut(vector.values, dimensions, said.normalize))}
            for index, vector in enumerate(answer.answered.results)
        ]
    schedule, tokens = answer.answered.schedule, terms.info.num_tokens * len(data)
    body = {
        "object": "list",
        "model": terms.info.name,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "r": r_of(schedule),
        "r_source": terms.r_source,
        "tokens": terms.info.token_counts(schedule)[-1],
    }
    return Response(_encode(body), headers=answer.headers, media_type="application/json")


def _dimensions(said: EmbeddingParameters, info: ModelInfo) -> int:
    if said.dimensions is not None and said.dimensions > info.num_features:
        raise InvalidError(
            f"dimensions is {shown(said.dimensions)}; it must lie between 0 and {info.num_features} for this model"
        )
    return said.dimensions or info.num_features


def _cut(values: bytes, dimensions: int, normalize: bool | None) -> array[float]:
    """Keeps the first numbers of a vector, and scales it to length 1 unless `normalize` is False. Raises EngineError
    for NaN.
    """
    numbers = array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    numbers = numbers[:dimensions]
    length = math.hypot(*numbers)
    if not math.isfinite(length):
        raise EngineError("the vector of this image is not finite")
    if normalize is False or length == 0:
        return numbers
    return array("f", [number / length for number in numbers])


def _in_base64(numbers: array[float]) -> str:
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers).decode()


def _error(problem: Problem) -> JSONResponse:
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    said = {"message": problem.message, "type": kind, "param": None, "code": problem.code}
    return JSONResponse({"error": {**said, "details": dict(problem.details)}}, problem.status)


_encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def face(settings: Settings) -> Face:
    """The face for `FACES`."""
    return Face(
        name="embeddings",
        title="OpenAI embeddings",
        description="Vectors of images, as OpenAI's clients ask for them.",
        router=router,
        owns=lambda method, path: path == PATH,
        error=_error,
    )
