"""Dependencies of the endpoints: the parts of the application, for callers with the required key."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel

from server.api.admission import Admission
from server.api.schemas import ErrorBody
from server.errors import ForbiddenError, UnauthorizedError
from server.images.decoders import Decoders
from server.ipc.engine import Engine
from server.settings import Settings

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The body, or an image in it, cannot be read.",
        401: "No valid key.",
        403: "The admin key is needed.",
        404: "There is no such model, or it has no curve.",
        408: "The body stopped arriving, or arrives too slowly.",
        409: "The configuration has changed meanwhile.",
        413: "Too many bytes, pixels or images.",
        415: "Not an allowed format, content type or encoding.",
        422: "A parameter is unknown or out of range.",
        429: "Too many images wait; retry after Retry-After.",
        500: "The model failed on this image, or the server has a fault.",
        503: "Not ready, or shutting down; retry after Retry-After.",
        504: "The deadline passed before the answer.",
    }.items()
}
"""Every status except 200, for the API's description. All errors of our own endpoints have one form."""


def errors_as(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The same statuses with the error body of another protocol."""
    return {status: {**said, "model": body} for status, said in ERRORS.items()}


@dataclass(frozen=True)
class Service:
    """The parts of the application that endpoints share.

    Attributes:
        settings: Limits and keys.
        engine: Classifies images.
        admission: Permits for images.
        decoders: Decode images.
    """

    settings: Settings
    engine: Engine
    admission: Admission
    decoders: Decoders


# Coroutines although they do not wait: FastAPI runs plain functions in threads, which takes 0.1 ms each. One dependency
# holds everything that an endpoint needs, because each further one takes 0.02 ms.
async def for_all(request: Request) -> Service:
    """For all callers."""
    service: Service = request.app.state.service
    return service


async def for_users(request: Request) -> Service:
    """For callers with the user key or the admin key; for all if no user key is set."""
    service: Service = request.app.state.service
    check_user(service.settings, request.headers)
    return service


async def for_admins(request: Request) -> Service:
    """For callers with the admin key; for users if none is set."""
    service: Service = request.app.state.service
    check_admin(service.settings, request.headers)
    return service


async def for_scrapers(request: Request) -> Service:
    """For callers with any of the keys; for all if no metrics key is set."""
    service: Service = request.app.state.service
    settings = service.settings
    if settings.metrics_key and not _bears(request.headers, settings.metrics_key, settings.api_key, settings.admin_key):
        raise UnauthorizedError("send the metrics key, or another, as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
    return service


ForAll = Annotated[Service, Depends(for_all)]
ForUsers = Annotated[Service, Depends(for_users)]
ForAdmins = Annotated[Service, Depends(for_admins)]


def check_user(settings: Settings, headers: Mapping[str, str]) -> None:
    """Raises UnauthorizedError if a user key is set and the headers have neither it nor the admin key."""
    if settings.api_key and not _bears(headers, settings.api_key, settings.admin_key):
        raise UnauthorizedError("send the API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")


def check_admin(settings: Settings, headers: Mapping[str, str]) -> None:
    """Like `check_user`; also raises ForbiddenError if an admin key is set and the headers do not have it."""
    check_user(settings, headers)
    if settings.admin_key and not _bears(headers, settings.admin_key):
        raise ForbiddenError("changes need the admin key")


def _bears(headers: Mapping[str, str], *keys: str | None) -> bool:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    borne = headers.get("x-api-key") or (credentials.strip() if scheme.lower() == "bearer" else "")
    return any(key is not None and hmac.compare_digest(borne.encode(), key.encode()) for key in keys)
