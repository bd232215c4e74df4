"""KServe's protocol v1: `POST /v1/models/{name}:predict`. Our own endpoints answer `GET /v1/models/{name}` and `/`."""

from __future__ import annotations

import re

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from server.api.access import ForUsers, errors_as
from server.api.asking import CLASSIFY, Asking
from server.api.described import ANSWERED, of_one_model
from server.api.faces import Face, TextError, text_error
from server.api.protocols.instances import ASKED, read_instances, scores_by_label
from server.settings import Settings

_OURS = re.compile(r"/v1/models/[^/]*:[a-z]+")


class KServePredictions(BaseModel):
    """The scores of the likeliest labels, for each instance."""

    predictions: list[dict[str, float]]


router = APIRouter(responses=errors_as(TextError), tags=["kserve"])


@router.post(
    "/v1/models/{name}:predict", response_model=KServePredictions, responses=ANSWERED, openapi_extra=of_one_model(ASKED)
)
async def predict(name: str, request: Request, service: ForUsers) -> Response:
    """The likeliest labels and their scores, for each instance."""
    with Asking(service, request) as asking:
        uploads, parameters = await asking.read(read_instances(request, service.settings.max_images, {"model": name}))
        answer = await asking.answer(CLASSIFY, uploads, asking.resolve(parameters))
    predictions = [scores_by_label(answer.terms.info, top_k) for top_k in answer.answered.results]
    return JSONResponse({"predictions": predictions}, headers=answer.headers)


def face(settings: Settings) -> Face:
    """The face for `FACES`."""
    return Face(
        name="kserve",
        title="KServe v1",
        description="KServe's protocol v1.",
        router=router,
        owns=lambda method, path: _OURS.fullmatch(path) is not None,
        error=text_error,
    )
