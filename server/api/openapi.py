"""The API's OpenAPI description: FastAPI describes the routes, and this file adds the keys and our own schemas."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from server.api.access import for_admins, for_scrapers, for_users
from server.settings import Settings

router = APIRouter(include_in_schema=False)

_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "X-API-Key: KEY"},
}
_EITHER: list[dict[str, list[str]]] = [{name: []} for name in _SCHEMES]
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")


@router.get("/openapi.json")
async def get_openapi(request: Request) -> JSONResponse:
    """The description, including the path prefix of a proxy."""
    described = describe(request.app)
    prefix = request.scope.get("root_path") or request.headers.get("x-forwarded-prefix", "")
    if _PREFIX.fullmatch(prefix.rstrip("/")):
        described = {**described, "servers": [{"url": prefix.rstrip("/")}]}
    return JSONResponse(described)


def describe(app: FastAPI) -> dict[str, Any]:
    """Describes an application, once, at the first request."""
    if not hasattr(app.state, "described"):
        app.state.described = _complete(app.openapi(), app.state.routes, app.state.service.settings)
        app.state.described["tags"] = [
            {"name": face.name, "x-displayName": face.title, "description": face.description}
            for face in app.state.faces
        ]
    described: dict[str, Any] = app.state.described
    return described


def _complete(described: dict[str, Any], routes: list[APIRoute], settings: Settings) -> dict[str, Any]:
    components = described.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    described["paths"] = _hoisted(described["paths"], schemas)
    for operations in described["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status >= "400" and "application/json" not in response.get("content", {}):
                    response["content"] = _ERROR  # its content is text, as of /metrics
    wants_key: dict[object, str | None] = {
        for_users: settings.api_key,
        for_admins: settings.api_key or settings.admin_key,
        for_scrapers: settings.metrics_key,
    }
    for route in routes:
        if not any(wants_key.get(each.call) for each in route.dependant.dependencies):
            continue
        for method in route.methods or ():
            operation = described["paths"].get(route.path, {}).get(method.lower())
            if operation is not None:
                operation["security"] = _EITHER
                components["securitySchemes"] = _SCHEMES
    return described


def _hoisted(part: Any, schemas: dict[str, Any]) -> Any:
    """Points the schemas of a part to the common ones, because pydantic embeds them in each schema."""
    if isinstance(part, list):
        return [_hoisted(each, schemas) for each in part]
    if not isinstance(part, dict):
        return part
    for name, schema in part.get("$defs", {}).items():
        schemas[name] = _hoisted(schema, schemas)
    return {
        key: value.replace("#/$defs/", "#/components/schemas/") if key == "$ref" else _hoisted(value, schemas)
        for key, value in part.items()
        if key != "$defs"
    }
