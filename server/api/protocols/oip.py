"""The Open Inference Protocol v2 over REST, as implemented by NVIDIA Triton and KServe."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from server.api.access import ForAll, ForUsers, Service, errors_as
from server.api.asking import Asking
from server.api.body import joined, read_query
from server.api.compression import compressed, wanted_encoding
from server.api.faces import Face, TextError, text_error
from server.api.health import check_ready
from server.api.json_body import SMALL
from server.api.protocols.oip_infer import OURS, Inference, infer, model_of
from server.api.protocols.oip_models import config, metadata, server_metadata, statistics
from server.api.protocols.oip_rest import JSON_LENGTH, read, write
from server.errors import InvalidError, UnavailableError, shown
from server.settings import Settings
from server.types import ModelInfo

router = APIRouter(
    prefix="/v2",
    tags=["oip"],
    responses=errors_as(TextError),
)
_TENSOR = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "const": "image"},
        "datatype": {"enum": ["BYTES", "UINT8", "FP32"]},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "data": {"type": "array", "items": {}},
        "parameters": {"type": "object"},
    },
    "required": ["name", "datatype", "shape"],
}
_BODY = {
    "required": True,
    "description": "JSON. Binary data may follow it; the header Inference-Header-Content-Length then has the length of "
    "the JSON. The body may be compressed by gzip or deflate.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "inputs": {"type": "array", "items": _TENSOR, "minItems": 1, "maxItems": 1},
                    "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
                    "parameters": {"type": "object"},
                },
                "required": ["inputs"],
            }
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}


def _asked_model(request: Request, service: Service) -> ModelInfo:
    """The model of a path like models/{name} or models/{name}/versions/{version}."""
    return model_of(service, request.path_params["name"], request.path_params.get("version", ""))


@router.get("")
async def get_server(service: ForAll) -> dict[str, Any]:
    """Name and version of this server, and its extensions of the protocol."""
    return server_metadata()


@router.get("/health/live")
async def get_live() -> dict[str, bool]:
    """Whether this process answers."""
    return {"live": True}


@router.get("/health/ready")
async def get_ready(request: Request, service: ForAll) -> Response:
    """Whether images should be sent here now."""
    try:
        await check_ready(request.app)
    except UnavailableError as error:
        return JSONResponse({"ready": False, "error": error.message}, error.status, {"retry-after": "1"})
    return JSONResponse({"ready": True})


@router.get("/models/stats")
async def get_all_statistics(service: ForUsers) -> dict[str, Any]:
    """Statistics of all models since the server started."""
    models = service.engine.catalog().values()
    return {"model_stats": await run_in_threadpool(statistics, models)}


@router.get("/models/{name}")
@router.get("/models/{name}/versions/{version}", include_in_schema=False)
async def get_metadata(name: str, request: Request, service: ForUsers) -> dict[str, Any]:
    """Inputs and outputs of a model. `/versions/{version}` may follow its name, here and below."""
    return metadata(_asked_model(request, service))


@router.get("/models/{name}/ready")
@router.get("/models/{name}/versions/{version}/ready", include_in_schema=False)
async def get_model_ready(name: str, request: Request, service: ForAll) -> dict[str, Any]:
    """Whether a model serves now; 503 if it does not."""
    info = _asked_model(request, service)
    await check_ready(request.app)
    return {"name": info.name, "ready": True}


@router.get("/models/{name}/config")
@router.get("/models/{name}/versions/{version}/config", include_in_schema=False)
async def get_config(name: str, request: Request, service: ForUsers) -> dict[str, Any]:
    """A model's configuration, in the form of Triton's model configuration."""
    return config(_asked_model(request, service), service.settings.max_images)


@router.get("/models/{name}/stats")
@router.get("/models/{name}/versions/{version}/stats", include_in_schema=False)
async def get_statistics(name: str, request: Request, service: ForUsers) -> dict[str, Any]:
    """Statistics of a model since the server started."""
    return {"model_stats": await run_in_threadpool(statistics, [_asked_model(request, service)])}


@router.post("/models/{name}/infer", openapi_extra={"requestBody": _BODY})
@router.post("/models/{name}/versions/{version}/infer", include_in_schema=False)
async def post_infer(name: str, request: Request, service: ForUsers) -> Response:
    """Scores or features of images. Input `image`: files as BYTES, or pixels as UINT8 or FP32."""
    with Asking(service, request) as asking:
        info = _asked_model(request, service)
        body = await asking.read(request.body())
        told = (body, request.headers.get(JSON_LENGTH), info.preprocessing, service.settings.max_images)
        asked = read(*told) if len(body) <= SMALL else await asyncio.to_thread(read, *told)
        inferred = await infer(service, asking, info, _with_query(asked.inference, request))
    content, json_length = write(asked, info, inferred)
    headers = inferred.answer.headers
    if json_length is not None:
        headers[JSON_LENGTH] = str(json_length)
    encoding = wanted_encoding(request.headers.get("accept-encoding", ""), len(content))
    if encoding is not None:
        headers["content-encoding"] = encoding
        made = (content, encoding)
        content = compressed(*made) if len(content) <= SMALL else await asyncio.to_thread(compressed, *made)
    media_type = "application/json" if json_length is None else "application/octet-stream"
    return Response(content, headers=headers, media_type=media_type)


def _with_query(inference: Inference, request: Request) -> Inference:
    """Adds the parameters of the query to an inference.

    Raises:
        InvalidError: A parameter is unknown, or is also in the body.
    """
    query = read_query(request)
    if unknown := [name for name in query if name not in OURS]:
        raise InvalidError(f"there is no parameter {shown(unknown[0])} of the query; there are: {', '.join(OURS)}")
    return replace(inference, parameters=joined(query, dict(inference.parameters))) if query else inference


def _owns(method: str, path: str) -> bool:
    return path == "/v2" or path.startswith("/v2/")


def _inflates(path: str) -> bool:
    return path.startswith("/v2/") and path.endswith("/infer")


def face(settings: Settings) -> Face:
    """The face of the protocol over REST."""
    return Face(
        name="oip",
        title="Open Inference Protocol v2",
        description="Open Inference Protocol v2, as in Triton and KServe: scores and features of images",
        router=router,
        owns=_owns,
        error=text_error,
        inflates=_inflates,
    )
