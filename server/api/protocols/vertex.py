"""The contract of Vertex AI's containers: `instances` in, `predictions` out, on the platform's routes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from server.api.access import ForAll, ForUsers, errors_as
from server.api.asking import CLASSIFY, Asking
from server.api.described import ANSWERED
from server.api.faces import Face, Problem
from server.api.health import readyz
from server.api.protocols.instances import ASKED, read_instances
from server.api.routes import classes
from server.ipc.messages import TopK
from server.settings import Settings
from server.types import ModelInfo

_STATUSES = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""Google's status names; all other statuses are INVALID_ARGUMENT."""


class VertexPrediction(BaseModel):
    """The likeliest classes of one image, best first, in the form of Vertex AI's own image models."""

    ids: list[str]
    displayNames: list[str]
    confidences: list[float]


class VertexPredictions(BaseModel):
    predictions: list[VertexPrediction]


class VertexErrorDetail(BaseModel):
    code: int
    message: str
    status: str


class VertexError(BaseModel):
    """An error in the form of Google's APIs."""

    error: VertexErrorDetail


async def predict(request: Request, service: ForUsers) -> Response:
    """The likeliest classes of each instance, by the default model or the one that the parameter `model` names."""
    with Asking(service, request) as asking:
        uploads, parameters = await asking.read(read_instances(request, service.settings.max_images))
        answer = await asking.answer(CLASSIFY, uploads, asking.resolve(parameters))
    predictions = [_prediction(answer.terms.info, top_k) for top_k in answer.answered.results]
    return JSONResponse({"predictions": predictions}, headers=answer.headers)


async def health(request: Request, service: ForAll) -> dict[str, str]:
    """Whether images should be sent here now, like /readyz; it needs no key."""
    await readyz(request, service)
    return {"status": "ready"}


def _prediction(info: ModelInfo, top_k: TopK) -> dict[str, Any]:
    named = classes(info, top_k)
    return {
        "ids": [str(each["index"]) for each in named],
        "displayNames": [each["label"] for each in named],
        "confidences": [each["score"] for each in named],
    }


def _error(problem: Problem) -> JSONResponse:
    status = _STATUSES.get(problem.status, "INVALID_ARGUMENT")
    said = {"code": problem.status, "message": problem.message, "status": status}
    return JSONResponse({"error": said}, problem.status)


def face(settings: Settings) -> Face:
    """The face for `FACES`."""
    paths = settings.vertex_predict_route, settings.vertex_health_route
    router = APIRouter(responses=errors_as(VertexError), tags=["vertex"])
    router.post(paths[0], response_model=VertexPredictions, responses=ANSWERED, openapi_extra=ASKED)(predict)
    router.get(paths[1])(health)
    return Face(
        name="vertex",
        title="Vertex AI",
        description="The contract of Vertex AI's containers.",
        router=router,
        owns=lambda method, path: path in paths,
        error=_error,
    )
