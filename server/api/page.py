"""The pages at `/` and `/docs`: static files that need no key and may load nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)

_FILES = StaticFiles(directory=Path(__file__).parents[1] / "static")
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "cache-control": "no-cache",  # kept, and asked for again by its ETag: an update shows at once
}


@router.get("/")
async def page(request: Request) -> Response:
    return await _file("index.html", request)


@router.get("/docs")
async def docs(request: Request) -> Response:
    return await _file("docs.html", request)


@router.get("/static/{path:path}")
async def static(path: str, request: Request) -> Response:
    return await _file(path, request)


async def _file(path: str, request: Request) -> Response:
    response = await _FILES.get_response(path, request.scope)
    response.headers.update(_HEADERS)
    return response
