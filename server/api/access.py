"""What endpoints depend on: the settings, the engine and the permits of this application, and the keys of callers."""

from __future__ import annotations

import hmac
from typing import Annotated, Any

from fastapi import Depends, Request

from server.api.admission import Admission
from server.api.schemas import ErrorBody
from server.errors import ForbiddenError, UnauthorizedError
from server.settings import Settings
from server.types import Engine

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504)
}
"""Every status but 200, for the API's description: all errors have one shape."""


# Coroutines, though they wait for nothing: FastAPI would run plain functions in threads, at 0.1 ms each.
async def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def get_engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


async def get_admission(request: Request) -> Admission:
    admission: Admission = request.app.state.admission
    return admission


UsingSettings = Annotated[Settings, Depends(get_settings)]
UsingEngine = Annotated[Engine, Depends(get_engine)]
UsingAdmission = Annotated[Admission, Depends(get_admission)]


async def check_key(request: Request, settings: UsingSettings) -> None:
    """Lets pass who bears the user key or the admin key, or anyone when no user key is set."""
    if settings.api_key and not _bears(request, settings.api_key, settings.admin_key):
        raise UnauthorizedError("send the API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")


async def check_admin_key(request: Request, settings: UsingSettings) -> None:
    """Lets pass who bears the admin key, or whom `check_key` lets pass when none is set."""
    await check_key(request, settings)
    if settings.admin_key and not _bears(request, settings.admin_key):
        raise ForbiddenError("changes need the admin key")


def _bears(request: Request, *keys: str | None) -> bool:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    borne = request.headers.get("x-api-key") or (credentials.strip() if scheme.lower() == "bearer" else "")
    return any(key is not None and hmac.compare_digest(borne.encode(), key.encode()) for key in keys)
