"""Faces: protocols that clients already know, over the same requests. Each is one file in `protocols/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel


class Problem(NamedTuple):
    """An error before it takes a protocol's form.

    Attributes:
        status: HTTP status.
        code: Code of `server/errors.py`.
        message: A sentence for people.
        details: Facts for machines.
    """

    status: int
    code: str
    message: str
    details: Mapping[str, Any]


def native(problem: Problem) -> JSONResponse:
    """An error in the form of our own endpoints: an `ErrorBody`."""
    said = {"code": problem.code, "message": problem.message, "details": dict(problem.details)}
    return JSONResponse({"error": said}, problem.status)


class TextError(BaseModel):
    """The error body of several protocols."""

    error: str


def text_error(problem: Problem) -> JSONResponse:
    """An error as a `TextError`."""
    return JSONResponse({"error": problem.message}, problem.status)


@dataclass(frozen=True)
class Face:
    """A protocol.

    Attributes:
        name: Its name in `--protocol`, and the tag of its operations.
        title: Its usual name.
        description: One line for the API's description.
        router: Its endpoints.
        owns: Whether a method and path belong to it, also unknown paths. Their errors have its form.
        error: Gives an error its form. The status and the common headers stay.
        inflates: Whether the bodies of a path may be compressed.
    """

    name: str
    title: str
    description: str
    router: APIRouter
    owns: Callable[[str, str], bool]
    error: Callable[[Problem], JSONResponse] = field(default=native)
    inflates: Callable[[str], bool] = field(default=lambda path: False)


def shape_of(request: Request) -> Callable[[Problem], JSONResponse]:
    """The function that gives errors of this request their form."""
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    faces: tuple[Face, ...] = request.app.state.faces
    return next((face.error for face in faces if face.owns(request.scope["method"], path)), native)
