"""Loading and unloading of models, and the index of the repository. Paths and bodies are Triton's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from server.api.access import ERRORS, ForAdmins, ForUsers
from server.api.json_body import parse_object
from server.api.schemas import ModelEntry
from server.errors import InvalidError, shown
from server.types import ModelState

router = APIRouter(prefix="/v2/repository", responses=ERRORS)

LOAD_PARAMETERS = ("version",)
UNLOAD_PARAMETERS = ("unload_dependents",)
"""The parameters of an unload. It changes nothing, because no model depends on another."""


def _body(properties: dict[str, Any]) -> dict[str, Any]:
    """Describes a body, for the API's description."""
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def _parameters_body(properties: dict[str, Any]) -> dict[str, Any]:
    return _body({"parameters": {"type": "object", "properties": properties, "additionalProperties": False}})


_VERSION = {"anyOf": [{"type": "string"}, {"type": "integer"}], "description": "One of its numbered folders."}
_BOOLEAN = {"type": "boolean"}


@router.post("/index", openapi_extra=_body({"ready": _BOOLEAN, "repository_name": {"type": "string"}}))
async def index(request: Request, service: ForUsers) -> list[ModelEntry]:
    """The models that are loaded, and those that may be. `{"ready": true}` lists only models that serve."""
    said = await _read(request)
    return [ModelEntry(**asdict(state)) for state in await states(said, service.engine)]


@router.post("/models/{name}/load", openapi_extra=_parameters_body({"version": _VERSION}))
async def load(name: str, request: Request, service: ForAdmins) -> dict[str, Any]:
    """Loads a model beside the others; it serves when this answers. The parameter `version` selects a version."""
    version = parameters_of(await _read(request), LOAD_PARAMETERS).get("version")
    await service.engine.load(name, version_of(version))
    return {}


@router.post("/models/{name}/unload", openapi_extra=_parameters_body({"unload_dependents": _BOOLEAN}))
async def unload(name: str, request: Request, service: ForAdmins) -> dict[str, Any]:
    """Takes a model out of service. Its present requests are answered, then its memory is freed."""
    parameters_of(await _read(request), UNLOAD_PARAMETERS)
    await service.engine.unload(name)
    return {}


async def states(said: dict[str, Any], engine: Any) -> list[ModelState]:
    """The answer to an index request with this body."""
    if extra := said.keys() - {"ready", "repository_name"}:
        raise InvalidError(f"there is no field {shown(min(extra))} of an index; the only one is ready")
    ready = said.get("ready", False)
    if not isinstance(ready, bool):
        raise InvalidError(f"ready is {shown(ready)}; it must be true or false")
    return [each for each in await engine.repository() if each.state == "READY" or not ready]


async def _read(request: Request) -> dict[str, Any]:
    """Reads a JSON object; an empty body is an empty object. Triton's client sends no content type."""
    body = await request.body()
    return parse_object(body) if body.strip() else {}


def parameters_of(said: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """The parameters of a body.

    Raises:
        InvalidError: A parameter is unknown.
    """
    if extra := said.keys() - {"parameters"}:
        raise InvalidError(f"there is no field {shown(min(extra))} here; the only one is parameters")
    parameters = said.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidError(f"parameters is {shown(parameters)}; it must be an object")
    if extra := parameters.keys() - set(known):
        raise InvalidError(f"there is no parameter {shown(min(extra))} here; there are: {', '.join(known)}")
    return parameters


def version_of(version: object) -> str | None:
    """The version, given as text or number; None for none. Raises InvalidError for anything else."""
    if version is None or (isinstance(version, str) and version.isascii()):  # a lone surrogate cannot be encoded
        return version or None
    if isinstance(version, int) and not isinstance(version, bool):
        return str(version)
    raise InvalidError(f"version is {shown(version)}; it must be a number or its text, like 2")
