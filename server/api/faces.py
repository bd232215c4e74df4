"""A face: a protocol that clients know already, over the same requests. Each is one file in `protocols/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel


class Problem(NamedTuple):
    """Why a request gets no answer, before it has a protocol's shape.

    Attributes:
        status: Of HTTP.
        code: Of `server/errors.py`.
        message: A sentence for people.
        details: Facts for machines.
    """

    status: int
    code: str
    message: str
    details: Mapping[str, Any]


def native(problem: Problem) -> JSONResponse:
    """An error as our own endpoints have it: an `ErrorBody`."""
    said = {"code": problem.code, "message": problem.message, "details": dict(problem.details)}
    return JSONResponse({"error": said}, problem.status)


class TextError(BaseModel):
    """An error as several protocols have it."""

    error: str


def text_error(problem: Problem) -> JSONResponse:
    """An error as a `TextError`."""
    return JSONResponse({"error": problem.message}, problem.status)


@dataclass(frozen=True)
class Face:
    """A protocol.

    Attributes:
        name: As `--protocol` has it; its operations carry it as their tag.
        title: Its name, as people know it.
        description: What it is, in a line, for the API's description.
        router: Its endpoints.
        owns: Whether a method and a path are its own, and so its errors have its shape; unknown paths of its may be.
        error: Gives an error its shape. The status and the headers that all errors have stay as they are.
        inflates: Whether the bodies for a path may be compressed.
    """

    name: str
    title: str
    description: str
    router: APIRouter
    owns: Callable[[str, str], bool]
    error: Callable[[Problem], JSONResponse] = field(default=native)
    inflates: Callable[[str], bool] = field(default=lambda path: False)


def shape_of(request: Request) -> Callable[[Problem], JSONResponse]:
    """What gives errors of this request their shape."""
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    faces: tuple[Face, ...] = request.app.state.faces
    return next((face.error for face in faces if face.owns(request.scope["method"], path)), native)
