"""TorchServe's `/predictions/{model}[/{version}]`: an image in any kind of body, `{label: score}` out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from server.api.access import ForUsers, Service, errors_as
from server.api.asking import CLASSIFY, Asking
from server.api.body import Upload, check_count, content_type_of, joined, parse, read_form, read_query, read_whole
from server.api.described import ANSWERED, FILE, body_of, in_query, of_one_model
from server.api.faces import Face, Problem
from server.api.protocols.instances import InstancesBody, read_instances, scores_by_label
from server.api.protocols.ping import PATH as PING
from server.api.protocols.ping import add_ping
from server.api.schemas import Parameters
from server.errors import NotFoundError, shown
from server.settings import Settings
from server.types import find_model

_PARTS = ("data", "body")

_ASKED = of_one_model(
    {
        "requestBody": body_of(
            {
                "multipart/form-data": {
                    "type": "object",
                    "properties": {
                        "data": {"type": "array", "items": FILE, "minItems": 1},
                        **Parameters.model_json_schema()["properties"],
                    },
                    "required": ["data"],
                    "additionalProperties": False,
                },
                "application/octet-stream": FILE,
                "application/json": InstancesBody.model_json_schema(),
            },
            "A raw image, of any content type or none; form parts `data` or `body`; or JSON, as in TorchServe's "
            "envelopes for JSON and KServe.",
        ),
        "parameters": in_query(Parameters),
    }
)


class Predictions(BaseModel):
    """The answer to `instances`."""

    predictions: list[dict[str, float]]


class TorchServeError(BaseModel):
    """An error in the form of TorchServe's clients."""

    code: int
    type: str
    message: str


Scores = dict[str, float] | list[dict[str, float]] | Predictions


async def predict(name: str, request: Request, service: ForUsers) -> Response:
    """The likeliest labels and their scores; a list of such objects for several images."""
    return await _predict(name, None, request, service)


async def predict_version(name: str, version: str, request: Request, service: ForUsers) -> Response:
    """The likeliest labels and their scores, if this version of the model is served."""
    return await _predict(name, version, request, service)


async def _predict(name: str, version: str | None, request: Request, service: Service) -> Response:
    with Asking(service, request) as asking:
        _check_version(name, version, service)
        is_json = content_type_of(request) == "application/json"
        reading = read_instances if is_json else _read
        uploads, parameters = await asking.read(reading(request, service.settings.max_images, {"model": name}))
        answer = await asking.answer(CLASSIFY, uploads, asking.resolve(parameters))
    scores: Any = [scores_by_label(answer.terms.info, top_k) for top_k in answer.answered.results]
    if is_json:
        scores = {"predictions": scores}
    elif len(scores) == 1:
        (scores,) = scores
    return JSONResponse(scores, headers=answer.headers)


def _check_version(name: str, version: str | None, service: Service) -> None:
    info = find_model(service.engine.catalog(), name)
    if version not in (None, info.version):
        raise NotFoundError(
            f"there is no version {shown(version)} of model {name}; the only one is {info.version}",
            versions=[info.version],
        )


async def _read(request: Request, max_images: int, beside: Mapping[str, Any]) -> tuple[list[Upload], Parameters]:
    query = joined(read_query(request), dict(beside))
    if content_type_of(request) != "multipart/form-data":  # curl -T sends none, --data-binary a wrong one
        return [Upload(await read_whole(request))], parse(Parameters, query)
    uploads, said = await read_form(request, max_images, _PARTS)
    check_count(len(uploads), max_images, f"the form part '{_PARTS[0]}'")
    return uploads, parse(Parameters, joined(query, said))


_TYPES = {
    401: "InvalidKeyException",
    403: "InvalidKeyException",
    404: "ResourceNotFoundException",
    405: "MethodNotAllowedException",
    408: "RequestTimeoutException",
    409: "ConflictStatusException",
    429: "ServiceUnavailableException",
    503: "ServiceUnavailableException",
}


def _error(problem: Problem) -> JSONResponse:
    kind = _TYPES.get(problem.status, "BadRequestException" if problem.status < 500 else "InternalServerException")
    if "models" in problem.details:
        kind = "ModelNotFoundException"
    elif "versions" in problem.details:
        kind = "ModelVersionNotFoundException"
    return JSONResponse({"code": problem.status, "type": kind, "message": problem.message}, problem.status)


def face(settings: Settings) -> Face:
    """The face for `FACES`."""
    router = APIRouter(responses=errors_as(TorchServeError), tags=["torchserve"])
    for path, endpoint in (("/predictions/{name}", predict), ("/predictions/{name}/{version}", predict_version)):
        for add in (router.post, router.put):  # curl -T sends PUT
            add(path, response_model=Scores, responses=ANSWERED, openapi_extra=_ASKED)(endpoint)
    add_ping(router)
    return Face(
        name="torchserve",
        title="TorchServe",
        description="Image classification as TorchServe answers it.",
        router=router,
        owns=lambda method, path: path == PING or path.startswith("/predictions/"),
        error=_error,
    )
