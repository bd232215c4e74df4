"""Request bodies: images and parameters out of any of three forms."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from server.api.schemas import JsonBody, Parameters
from server.errors import InvalidError, TooLargeError, UndecodableError, UnsupportedError

M = TypeVar("M", bound=BaseModel)

CONTENT_TYPES = ("multipart/form-data", "application/json", "image/*", "application/octet-stream")


@dataclass(frozen=True)
class Upload:
    """One image as it came."""

    encoded: bytes
    filename: str | None = None


async def read_request(request: Request, max_images: int, max_bytes: int) -> tuple[list[Upload], Parameters]:
    """Reads images and parameters from a multipart form, a JSON body or a raw image.

    Raises:
        UnsupportedError: The content type is none of `CONTENT_TYPES`.
        UndecodableError: The body does not parse, or holds no image.
        TooLargeError: Too many bytes or images.
        InvalidError: A parameter is unknown, wrong, or given twice.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise TooLargeError(
            f"the body has {announced} bytes; at most {max_bytes} are allowed", max_body_bytes=max_bytes
        )
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    query = _without_repeats(request.query_params.multi_items())
    if content_type == "multipart/form-data":
        uploads, said = await _read_form(request, max_images)
        parameters = parse(Parameters, _joined(query, said))
    elif content_type == "application/json":
        body = parse(JsonBody, _joined(query, await _read_json(request)))
        _check_count(len(body.images), max_images)
        uploads = [Upload(_from_base64(text, index)) for index, text in enumerate(body.images)]
        parameters = body
    elif content_type.startswith("image/") or content_type == "application/octet-stream":
        uploads, parameters = [Upload(await request.body())], parse(Parameters, query)
    else:
        raise UnsupportedError(
            f"content type {content_type or 'missing'!r} is not one of {', '.join(CONTENT_TYPES)}",
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


def invalid(problems: Any, model: type[BaseModel] | None = None) -> InvalidError:
    """One InvalidError for all that pydantic found wrong."""
    lines = []
    for problem in problems:
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden" and model is not None:
            lines.append(f"there is no parameter {field!r}; there are: {', '.join(model.model_fields)}")
        elif problem["type"] == "missing":
            lines.append(f"{field} is missing")
        else:
            lines.append(f"{field} is {problem.get('input')!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    return InvalidError("; ".join(lines))


async def _read_form(request: Request, max_images: int) -> tuple[list[Upload], dict[str, Any]]:
    try:
        form: FormData = await request.form(max_files=max_images + 1, max_fields=32)
    except HTTPException as error:
        raise UndecodableError(f"the form cannot be read: {error.detail}") from None
    uploads, said = [], []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "image":
                raise InvalidError(f"the form has a file in {name!r}; send images as 'image'")
            uploads.append(Upload(await value.read(), value.filename))
        elif name == "image":
            raise InvalidError("'image' must be a file part, as curl -F image=@photo.jpg sends it")
        else:
            said.append((name, value))
    await form.close()
    return uploads, _without_repeats(said)


async def _read_json(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise UndecodableError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise UndecodableError('the body must be a JSON object like {"images": ["..."]}')
    return body


def _from_base64(text: str, index: int) -> bytes:
    try:
        return base64.b64decode(text.rpartition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UndecodableError(f"image {index} is not base64: {error}", image=index) from None


def _joined(query: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    twice = sorted(query.keys() & body.keys())
    if twice:
        raise InvalidError(f"{', '.join(twice)}: given in the query and in the body; say it once")
    return query | body


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    said = dict(pairs)
    if len(said) < len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidError(f"{', '.join(sorted({n for n in names if names.count(n) > 1}))}: given twice; say it once")
    return said


def _check_count(count: int, max_images: int) -> None:
    if count == 0:
        raise UndecodableError("the request holds no image; send it as the form part 'image', as JSON 'images' or raw")
    if count > max_images:
        raise TooLargeError(
            f"the request holds {count} images; at most {max_images} are allowed", max_images=max_images
        )
