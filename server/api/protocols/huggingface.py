"""Hugging Face's image classification task: an image in, a list of labels and scores out."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.access import ForUsers, errors_as
from server.api.asking import CLASSIFY, Asking
from server.api.described import ANSWERED, of_one_model
from server.api.faces import Face, TextError, text_error
from server.api.protocols.inputs import ASKED, LabelScore, labels_of, read_inputs
from server.settings import Settings

Labels = list[LabelScore] | list[list[LabelScore]]


router = APIRouter(responses=errors_as(TextError), tags=["huggingface"])


@router.post("/", response_model=Labels, responses=ANSWERED, openapi_extra=ASKED)
async def classify_by_default(request: Request, service: ForUsers) -> Response:
    """Labels and scores by the default model, or by the one that the parameter `model` names."""
    return await _classify(request, service, {})


@router.post("/models/{name}", response_model=Labels, responses=ANSWERED, openapi_extra=of_one_model(ASKED))
async def classify_by(name: str, request: Request, service: ForUsers) -> Response:
    """Labels and scores by a model. A list of images gives a list of lists."""
    return await _classify(request, service, {"model": name})


async def _classify(request: Request, service: ForUsers, named: dict[str, str]) -> Response:
    with Asking(service, request) as asking:
        read = await asking.read(read_inputs(request, service.settings.max_images, named))
        answer = await asking.answer(CLASSIFY, read.uploads, asking.resolve(read.parameters))
    return JSONResponse(labels_of(answer, is_list=read.is_list), headers=answer.headers)


def face(settings: Settings) -> Face:
    """The face for `FACES`."""
    return Face(
        name="huggingface",
        title="Hugging Face",
        description="Image classification for Hugging Face's InferenceClient.",
        router=router,
        owns=lambda method, path: path.startswith("/models/") or (path == "/" and method not in ("GET", "HEAD")),
        error=text_error,
    )
