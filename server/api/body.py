"""Request bodies: images and parameters in any of three forms."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.form import FormReader, boundary_of
from server.api.json_body import SMALL, read_json, without_repeats
from server.api.schemas import JsonBody, Parameters
from server.errors import InvalidError, TooLargeError, UndecodableError, UnsupportedError, shown

M = TypeVar("M", bound=BaseModel)
P = TypeVar("P", bound=BaseModel)

_PROBLEMS_TOLD = 3
_MOST_FIELDS = 100
_LONGEST_FIELD = 64 << 10
_WHITE_SPACE = b" \t\r\n\v\f"
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_PERCENT_ENCODED = [
    (written, bytes([character]))
    for character in b"+/= \r\n"
    for written in {b"%%%02X" % character, b"%%%02x" % character}
]
"""Base64 in an address has only these percent-encoded characters. A few searches take less time than each percent sign
alone.
"""

CONTENT_TYPES = ("multipart/form-data", "application/json", "image/*", "application/octet-stream")


@dataclass(frozen=True)
class Upload:
    """One image as the client sent it."""

    encoded: bytes
    filename: str | None = None


@dataclass(frozen=True)
class Layout(Generic[P]):
    """Where an endpoint finds images and parameters.

    Attributes:
        parameters: Parameters of the query and of forms.
        body: The JSON body: the parameters, and the images as base64.
        images: The field of `body` with the images: a text, or a list of texts.
    """

    parameters: type[P]
    body: type[P]
    images: str


OURS = Layout(Parameters, JsonBody, "images")


async def read_request(request: Request, max_images: int, layout: Layout[P]) -> tuple[list[Upload], P]:
    """Reads images and parameters from a multipart form, a JSON body or a raw image.

    Raises:
        UnsupportedError: The content type is not one of `CONTENT_TYPES`.
        UndecodableError: The body cannot be parsed, or holds no image.
        TooLargeError: Too many images.
        InvalidError: A parameter is unknown, wrong, or given twice.
    """
    content_type, query = content_type_of(request), read_query(request)
    how = f"the form part 'image', as JSON '{layout.images}' or raw"
    if content_type == "multipart/form-data":
        uploads, said = await read_form(request, max_images)
        parameters = parse(layout.parameters, joined(query, said))
    elif content_type == "application/json":
        said = joined(query, await read_json(request, max_images, (layout.images,)))
        if isinstance(said.get(layout.images), list):  # before each image is checked
            check_count(len(said[layout.images]), max_images, how)
        parameters = parse(layout.body, said)
        uploads = await uploads_of(getattr(parameters, layout.images))
    elif content_type.startswith("image/") or content_type == "application/octet-stream":
        uploads, parameters = [Upload(await read_whole(request))], parse(layout.parameters, query)
    else:
        raise UnsupportedError(
            f"content type {shown(content_type or 'missing')} is not one of {', '.join(CONTENT_TYPES)}",
            allowed=CONTENT_TYPES,
        )
    check_count(len(uploads), max_images, how)
    return uploads, parameters


def content_type_of(request: Request) -> str:
    """The content type without its parameters; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse(model: type[M], said: dict[str, Any]) -> M:
    """Validates a client's parameters. The InvalidError's message names each wrong field and its range."""
    try:
        return model(**said)
    except ValidationError as error:
        raise invalid(error.errors(), model) from None


def invalid(problems: Sequence[Any], model: type[BaseModel] | None = None) -> InvalidError:
    """An InvalidError of the first few problems that pydantic found."""
    lines = []
    for problem in problems[:_PROBLEMS_TOLD]:
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden" and model is not None:
            lines.append(f"there is no parameter {shown(field)}; there are: {', '.join(model.model_fields)}")
        elif problem["type"] == "missing":
            lines.append(f"{field} is missing")
        else:
            named = f"{field} is" if field else "one of the names is"
            lines.append(f"{named} {shown(problem.get('input'))}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    return InvalidError("; ".join(lines))


def read_query(request: Request) -> dict[str, Any]:
    """The parameters of the query. Raises InvalidError for a repeated parameter, or too many of them."""
    num_pairs = request.scope["query_string"].count(b"&") + 1
    if num_pairs > _MOST_FIELDS:
        raise InvalidError(f"the query has {num_pairs} parameters; at most {_MOST_FIELDS} are allowed")
    return without_repeats(request.query_params.multi_items())


async def read_whole(request: Request) -> bytes:
    """The body, like `request.body()` but without its generator, which costs each request time."""
    pieces = []
    while True:
        message = await request.receive()
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)


async def read_form(
    request: Request, max_images: int, parts: Sequence[str] = ("image",)
) -> tuple[list[Upload], dict[str, Any]]:
    """The images of a form, with or without file names, and its other fields.

    Args:
        request: Its body is read.
        max_images: Most images.
        parts: Names of the parts that are images.

    Raises:
        UndecodableError: The body is not a form, or has too many parts.
        InvalidError: Another part has a file, a field is repeated or too long, or there are too many fields.
    """
    form = FormReader(boundary_of(request.headers.get("content-type", "")), most=max_images + _MOST_FIELDS + 1)
    is_over = False
    while not is_over:
        message = await request.receive()
        form.feed(message.get("body", b""))
        is_over = not message.get("more_body")
    form.close()
    uploads: list[Upload] = []
    said: list[tuple[str, str]] = []
    for part in form.parts:
        if part.name in parts:
            uploads.append(Upload(part.content, part.filename))
        elif part.filename is not None:
            raise InvalidError(f"the form has a file in {shown(part.name)}; send images as '{parts[0]}'")
        elif len(said) == _MOST_FIELDS:
            raise InvalidError(f"the form has more than {_MOST_FIELDS} fields")
        elif len(part.content) > _LONGEST_FIELD:
            raise InvalidError(
                f"{shown(part.name)} is {len(part.content)} bytes long; at most {_LONGEST_FIELD} are allowed"
            )
        else:
            said.append((part.name, part.content.decode(errors="replace")))
    return uploads, without_repeats(said)


async def uploads_of(images: str | Sequence[str]) -> list[Upload]:
    """Decodes images of base64, with or without a data: prefix. Raises UndecodableError."""
    texts = [images] if isinstance(images, str) else images
    if sum(map(len, texts)) <= SMALL:
        return _decoded(texts)
    return await asyncio.to_thread(_decoded, texts)


def _decoded(texts: Sequence[str]) -> list[Upload]:
    return [Upload(from_base64(text, index)) for index, text in enumerate(texts)]


def from_base64(text: str, index: int) -> bytes:
    """Decodes one image of base64, with or without a data: prefix. Raises UndecodableError."""
    encoded = text.partition(",")[2] if text[:5].lower() == "data:" else text
    try:
        return base64.b64decode(encoded, validate=True)  # succeeds for nearly all clients
    except ValueError:
        pass
    try:
        plain = encoded.encode()
        for written, meant in _PERCENT_ENCODED if "%" in encoded else ():
            plain = plain.replace(written, meant)
        plain = plain.translate(_FROM_URL_SAFE, _WHITE_SPACE).rstrip(b"=")
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except ValueError as error:
        raise UndecodableError(f"image {index} is not base64: {error}", image=index) from None


def joined(query: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """Merges the parameters of query and body. Raises InvalidError if both have the same parameter."""
    twice = sorted(query.keys() & body.keys())
    if twice:
        raise InvalidError(f"{_listed(twice)}: given in two places of the request; give it once")
    return query | body


def _listed(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:_PROBLEMS_TOLD])


def check_count(count: int, max_images: int, how: str) -> None:
    """Raises UndecodableError if there is no image (`how` says how to send one), and TooLargeError for too many."""
    if count == 0:
        raise UndecodableError(f"the request holds no image; send it as {how}")
    if count > max_images:
        raise TooLargeError(
            f"the request holds {count} images; at most {max_images} are allowed", max_images=max_images
        )
