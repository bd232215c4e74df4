"""Wiring: an engine and settings become an application. The one table from errors to HTTP answers stands here."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Lifespan

from server import __version__
from server.api import config, explain, health, models, page, routes
from server.api.access import Service
from server.api.admission import Admission
from server.api.body import invalid
from server.api.direct import Direct, Handlers
from server.api.middleware import Front
from server.errors import ServerError
from server.images.decoders import Decoders
from server.ipc.engine import Engine
from server.settings import Settings

logger = logging.getLogger(__name__)

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    settings: Settings,
    engine: Engine,
    lifespan: Lifespan[FastAPI] | None = None,
    instead: Sequence[APIRouter] = (),
) -> FastAPI:
    """Builds the application around an engine, real or fake.

    Args:
        settings: Limits and keys.
        engine: Where images are classified.
        lifespan: Starts and stops the engine with the application.
        instead: Endpoints that answer in place of ours of the same method and path.
    """
    app = FastAPI(
        title="ToMe Server",
        version=__version__,
        description="Image classification with a speed/accuracy dial: `r` tokens are merged in every block.",
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # what asks for it costs each request 0.01 ms
    )
    app.state.is_draining = False
    decoders = Decoders(settings.max_image_pixels, settings.http_workers)
    app.state.service = Service(settings, engine, Admission(settings.max_queue_size), decoders)
    ours = (routes.router, explain.router, models.router, config.router, health.router, page.router)
    for router in (*instead, *ours):
        app.include_router(router)
    handlers: Handlers = {
        ServerError: _answer_server_error,
        HTTPException: _answer_http_error,
        RequestValidationError: _answer_invalid,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(Exception, _answer_unforeseen)
    app.add_middleware(Direct, routers=(*instead, *ours), handlers=handlers)
    app.add_middleware(Front, max_bytes=settings.max_body_bytes, client_timeout_s=settings.client_timeout_s)
    return app


def _answer(status: int, code: str, message: str, details: dict[str, object] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message, "details": details or {}}}, status)


async def _answer_server_error(request: Request, error: ServerError) -> JSONResponse:
    response = _answer(error.status, error.code, error.message, error.details)
    if error.status in (429, 503):
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 0)))
    if error.status == 408:
        response.headers["connection"] = "close"
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    response = _answer(error.status_code, _HTTP_CODES.get(error.status_code, "http_error"), str(error.detail))
    response.headers.update(error.headers or {})
    return response


async def _answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    return await _answer_server_error(request, invalid(error.errors()))


async def _answer_unforeseen(request: Request, error: Exception) -> JSONResponse:
    logger.error("request %s failed", request.state.request_id, exc_info=error)
    response = _answer(500, "internal", "something broke on our side; the log has it under this request's x-request-id")
    response.headers["x-request-id"] = request.state.request_id  # this answer bypasses `Front`
    return response
