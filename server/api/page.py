"""The pages at `/` and `/docs`: static files that need no key and may load nothing from other origins."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.staticfiles import StaticFiles

from server.api.access import ForAll

router = APIRouter(include_in_schema=False)

_FILES = StaticFiles(directory=Path(__file__).parents[1] / "static")
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "cache-control": "no-cache",  # browsers revalidate it by its ETag, so an update shows at once
}


@router.get("/")
async def page(request: Request, service: ForAll) -> Response:
    """The page for browsers. Clients of KServe v1 use this path to check that the server is alive."""
    if "kserve" in service.settings.protocol and "text/html" not in request.headers.get("accept", ""):
        response: Response = JSONResponse({"status": "alive"})
    else:
        response = await _file("index.html", request)
    response.headers["vary"] = "accept"
    return response


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
