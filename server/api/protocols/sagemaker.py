"""SageMaker's container contract: `GET /ping` and `POST /invocations`. boto3 uses a local endpoint's name in the path.

The service passes on only what InvokeEndpoint has, so `r` and all other parameters may be in its Custom-Attributes.
"""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from server.api.access import ForUsers, Service, errors_as
from server.api.asking import CLASSIFY, R_HEADER, Asking
from server.api.described import ANSWERED
from server.api.faces import Face, Problem
from server.api.json_body import without_repeats
from server.api.protocols.inputs import ASKED, LabelScore, labels_of, read_inputs
from server.api.protocols.ping import PATH as PING
from server.api.protocols.ping import add_ping
from server.errors import InvalidError, shown
from server.settings import Settings

ATTRIBUTES, TARGET = "x-amzn-sagemaker-custom-attributes", "x-amzn-sagemaker-target-model"
_LONGEST = 1024
"""Most characters of the attributes, by the limit of the service."""

_BETWEEN = re.compile(r"\s*[;,]\s*(?=[A-Za-z_-]+=)")
"""A separator is followed by a name: r=16,14,12 is one attribute."""

_TYPES = {
    401: "AccessDeniedException",
    403: "AccessDeniedException",
    429: "ThrottlingException",
    503: "ServiceUnavailable",
}

Labels = list[LabelScore] | list[list[LabelScore]]


class SageMakerError(BaseModel):
    """An error for boto3, beside the header x-amzn-errortype."""

    message: str


async def invoke(request: Request, service: ForUsers) -> Response:
    """Labels and scores by the default model, or by the one that Target-Model or the parameter `model` names."""
    return await _invoke(request, service)


async def invoke_endpoint(name: str, request: Request, service: ForUsers) -> Response:
    """Labels and scores, as boto3 requests them of a local endpoint. The endpoint's name is not a model; any name
    works.
    """
    return await _invoke(request, service)


async def _invoke(request: Request, service: Service) -> Response:
    with Asking(service, request) as asking:
        read = await asking.read(read_inputs(request, service.settings.max_images, _attributes(request)))
        answer = await asking.answer(CLASSIFY, read.uploads, asking.resolve(read.parameters))
    headers = {**answer.headers, ATTRIBUTES: f"r={answer.headers[R_HEADER]}"}
    return JSONResponse(labels_of(answer, is_list=read.is_list), headers=headers)


def _attributes(request: Request) -> dict[str, Any]:
    """The parameters of the Custom-Attributes, and the target model."""
    text = ",".join(request.headers.getlist(ATTRIBUTES)).strip(" \t;,")  # the way in which proxies join them
    if len(text) > _LONGEST:
        raise InvalidError(f"{ATTRIBUTES} has {len(text)} characters; at most {_LONGEST} are allowed")
    pairs = [each.partition("=") for each in _BETWEEN.split(text)] if text else []
    for name, equals, _ in pairs:
        if not equals:
            raise InvalidError(f"{ATTRIBUTES} holds {shown(name)}; it must hold pairs like r=8;top_k=3")
    said = [(name, value) for name, _, value in pairs]
    if target := request.headers.get(TARGET):
        said.append(("model", target))
    return without_repeats(said)


def _error(problem: Problem) -> JSONResponse:
    kind = _TYPES.get(problem.status, "ValidationError" if problem.status < 500 else "InternalFailure")
    return JSONResponse({"message": problem.message}, problem.status, {"x-amzn-errortype": kind})


def face(settings: Settings) -> Face:
    """The face for `FACES`."""
    router = APIRouter(responses=errors_as(SageMakerError), tags=["sagemaker"])
    for path, endpoint in (("/invocations", invoke), ("/endpoints/{name}/invocations", invoke_endpoint)):
        router.post(path, response_model=Labels, responses=ANSWERED, openapi_extra=ASKED)(endpoint)
    if "torchserve" not in settings.protocol:
        add_ping(router)
    return Face(
        name="sagemaker",
        title="SageMaker",
        description="The contract of SageMaker's containers.",
        router=router,
        owns=lambda method, path: path in (PING, "/invocations") or path.startswith("/endpoints/"),
        error=_error,
    )
