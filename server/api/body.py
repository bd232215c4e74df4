"""Request bodies: images and parameters out of any of three forms."""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser

from server.api.schemas import JsonBody, Parameters
from server.errors import InvalidError, TooLargeError, UndecodableError, UnsupportedError, shown

M = TypeVar("M", bound=BaseModel)

MultiPartParser.spool_max_size = sys.maxsize  # in memory: bodies are bounded, and /tmp may be full

_PROBLEMS_TOLD = 5
CONTENT_TYPES = ("multipart/form-data", "application/json", "image/*", "application/octet-stream")


@dataclass(frozen=True)
class Upload:
    """One image as it came."""

    encoded: bytes
    filename: str | None = None


async def read_request(request: Request, max_images: int) -> tuple[list[Upload], Parameters]:
    """Reads images and parameters from a multipart form, a JSON body or a raw image.

    Raises:
        UnsupportedError: The content type is none of `CONTENT_TYPES`.
        UndecodableError: The body does not parse, or holds no image.
        TooLargeError: Too many images.
        InvalidError: A parameter is unknown, wrong, or given twice.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    query = _without_repeats(request.query_params.multi_items())
    if content_type == "multipart/form-data":
        uploads, said = await _read_form(request)
        parameters = parse(Parameters, _joined(query, said))
    elif content_type == "application/json":
        body = parse(JsonBody, _joined(query, await read_json(request)))
        _check_count(len(body.images), max_images)
        uploads = [Upload(_from_base64(text, index)) for index, text in enumerate(body.images)]
        parameters = body
    elif content_type.startswith("image/") or content_type == "application/octet-stream":
        uploads, parameters = [Upload(await _read_whole(request))], parse(Parameters, query)
    else:
        raise UnsupportedError(
            f"content type {shown(content_type or 'missing')} is not one of {', '.join(CONTENT_TYPES)}",
            allowed=CONTENT_TYPES,
        )
    _check_count(len(uploads), max_images)
    return uploads, parameters


def parse(model: type[M], said: dict[str, Any]) -> M:
    """Checks what a client said; the message of the InvalidError names each field and its range."""
    try:
        return model(**said)
    except ValidationError as error:
        raise invalid(error.errors(), model) from None


def invalid(problems: Sequence[Any], model: type[BaseModel] | None = None) -> InvalidError:
    """One InvalidError for what pydantic found wrong: the first few problems."""
    lines = []
    for problem in problems[:_PROBLEMS_TOLD]:
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden" and model is not None:
            lines.append(f"there is no parameter {shown(field)}; there are: {', '.join(model.model_fields)}")
        elif problem["type"] == "missing":
            lines.append(f"{field} is missing")
        else:
            lines.append(f"{field} is {shown(problem.get('input'))}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    return InvalidError("; ".join(lines))


async def _read_whole(request: Request) -> bytes:
    """The body, as `request.body()` gives it, without the generator that makes each request dearer."""
    pieces = []
    while True:
        message = await request.receive()
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)


async def _read_form(request: Request) -> tuple[list[Upload], dict[str, Any]]:
    uploads, said = [], []
    try:
        async with request.form() as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name != "image":
                        raise InvalidError(f"the form has a file in {shown(name)}; send images as 'image'")
                    uploads.append(Upload(await value.read(), _sayable(value.filename)))
                elif name == "image":
                    raise InvalidError("'image' must be a file part, as curl -F image=@photo.jpg sends it")
                else:
                    said.append((name, value))
    except HTTPException as error:
        raise UndecodableError(f"the form cannot be read: {error.detail}") from None
    except (UnicodeError, LookupError) as error:
        raise UndecodableError(f"the form's charset cannot be read: {error}") from None
    return uploads, _without_repeats(said)


async def read_json(request: Request) -> dict[str, Any]:
    """A JSON object; raises UndecodableError where the body is none."""
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise UndecodableError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise UndecodableError('the body must be a JSON object like {"images": ["..."]}')
    return body


def _sayable(filename: str | None) -> str | None:
    """A file name that UTF-8 can hold: an odd charset parameter can make another."""
    return filename and filename.encode("utf-8", "replace").decode()


def _from_base64(text: str, index: int) -> bytes:
    try:
        return base64.b64decode(text.rpartition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UndecodableError(f"image {index} is not base64: {error}", image=index) from None


def _joined(query: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    twice = sorted(query.keys() & body.keys())
    if twice:
        raise InvalidError(f"{_listed(twice)}: given in the query and in the body; say it once")
    return query | body


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    said = dict(pairs)
    if len(said) < len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidError(
            f"{_listed(sorted(set(names), key=names.count, reverse=True)[:1])}: given twice; say it once"
        )
    return said


def _listed(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:_PROBLEMS_TOLD])


def _check_count(count: int, max_images: int) -> None:
    if count == 0:
        raise UndecodableError("the request holds no image; send it as the form part 'image', as JSON 'images' or raw")
    if count > max_images:
        raise TooLargeError(
            f"the request holds {count} images; at most {max_images} are allowed", max_images=max_images
        )
