"""Builds the application from an engine and settings. Maps errors to HTTP answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Lifespan

from server import __version__
from server.api import config, explain, health, models, openapi, page, repository, routes
from server.api.access import Service
from server.api.access_log import AccessLog
from server.api.admission import Admission
from server.api.body import invalid
from server.api.calls import Calls
from server.api.direct import Direct, Handlers
from server.api.faces import Problem, shape_of
from server.api.methods import Head, allowed
from server.api.middleware import SAFE, Front
from server.api.protocols import faces_of
from server.errors import ServerError
from server.images.decoders import Decoders
from server.ipc.engine import Engine
from server.settings import Settings

if TYPE_CHECKING:
    from server.tracing.provider import Tracing

logger = logging.getLogger(__name__)

_READABLE = ("etag", "retry-after", "server-timing", "x-batch-size", "x-config-version", "x-r", "x-request-id")
"""Headers of an answer that a page of another origin may read."""
_FROM_PAGES = (
    "authorization",
    "content-type",
    "if-match",
    "traceparent",
    "tracestate",
    "x-api-key",
    "x-r",
    "x-request-id",
)
"""Headers of a request that such a page may set."""
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    settings: Settings,
    engine: Engine,
    lifespan: Lifespan[FastAPI] | None = None,
    instead: Sequence[APIRouter] = (),
    access_log: AccessLog | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Builds the application around an engine, real or fake.

    Args:
        settings: Limits and keys.
        engine: Classifies images.
        lifespan: Starts and stops the engine with the application.
        instead: Endpoints that replace ours of the same method and path.
        access_log: Gets a line a request; None for no lines.
        tracing: Makes the spans of requests; None for none.
    """
    app = FastAPI(
        title="ToMe Server",
        version=__version__,
        description="Image classification with a speed/accuracy dial: `r` tokens are merged in every block.",
        lifespan=lifespan,
        openapi_url=None,  # ours describes keys, and its page loads nothing from other origins
        telemetry={"tracing": False, "metrics": False, "logs": False},  # their check costs each request 0.01 ms
    )
    app.state.is_draining = False
    app.state.calls = Calls(access_log, tracing)
    app.state.faces = faces = faces_of(settings)
    decoders = Decoders(settings.max_image_pixels, settings.http_workers)
    app.state.service = Service(settings, engine, Admission(settings.max_queue_size), decoders)
    ours = (
        routes.router,
        explain.router,
        models.router,
        config.router,
        repository.router,
        health.router,
        openapi.router,
        page.router,
    )
    routers = (*instead, *ours, *(face.router for face in faces))
    app.state.routes = [route for router in routers for route in router.routes]
    for router in routers:
        app.include_router(router)
    handlers: Handlers = {
        ServerError: _answer_server_error,
        HTTPException: _answer_http_error,
        RequestValidationError: _answer_invalid,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(Exception, _answer_unforeseen)
    app.add_middleware(Head)
    app.add_middleware(Direct, routers=routers, handlers=handlers)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=("GET", "HEAD", "POST", "PATCH"),
            allow_headers=_FROM_PAGES,
            expose_headers=_READABLE,
        )
    app.add_middleware(
        Front,
        max_bytes=settings.max_body_bytes,
        client_timeout_s=settings.client_timeout_s,
        inflates=lambda path: any(face.inflates(path) for face in faces),
        access_log=access_log,
        tracing=tracing,
    )
    return app


def _answer(request: Request, *problem: Any) -> JSONResponse:
    return shape_of(request)(Problem(*problem))


async def _answer_server_error(request: Request, error: ServerError) -> JSONResponse:
    response = _answer(request, error.status, error.code, error.message, error.details)
    if error.status in (429, 503):
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 0)))
    if error.status == 408:
        response.headers["connection"] = "close"
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    code = _HTTP_CODES.get(error.status_code, "http_error")
    response = _answer(request, error.status_code, code, str(error.detail), {})
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["allow"] = allowed(request)
    return response


async def _answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    return await _answer_server_error(request, invalid(error.errors()))


async def _answer_unforeseen(request: Request, error: Exception) -> JSONResponse:
    logger.error("request %s failed", request.state.request_id, exc_info=error)
    message = "the server failed; its log has the error under this request's x-request-id"
    response = _answer(request, 500, "internal", message, {})
    # this response bypasses `Front`
    response.raw_headers += [*SAFE, (b"x-request-id", request.state.request_id.encode())]
    return response
