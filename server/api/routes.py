"""The endpoints. `classify` conducts one request: read, admit, decode, ask the engine, shape the answer."""

from __future__ import annotations

import asyncio
import functools
import hmac
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Request, Response
from starlette.concurrency import run_in_threadpool

from server import metrics
from server.api.admission import Admission
from server.api.body import Upload, read_request
from server.api.decode import decode
from server.api.schemas import (
    Class,
    Classification,
    ErrorBody,
    ImageResult,
    JsonBody,
    ModelDetail,
    ModelList,
    ModelSummary,
    Parameters,
    PatchModel,
    TimingsMs,
)
from server.dial import Schedule, label_of, parse_r, r_of, schedule_of
from server.errors import ClientGoneError, ForbiddenError, InvalidError, NotFoundError, ServerError, UnauthorizedError
from server.settings import Settings
from server.types import Deployment, Engine, Job, ModelInfo, Prediction, Preprocessing
from tome_core.schedule import token_counts

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 409, 413, 415, 422, 429, 500, 503, 504)
}
T = TypeVar("T")
router = APIRouter(responses=ERRORS)


def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def get_engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def get_admission(request: Request) -> Admission:
    admission: Admission = request.app.state.admission
    return admission


UsingSettings = Annotated[Settings, Depends(get_settings)]
UsingEngine = Annotated[Engine, Depends(get_engine)]


def check_key(request: Request, settings: UsingSettings) -> None:
    """Lets pass who bears the user key or the admin key, or anyone when no user key is set."""
    if settings.api_key and not _bears(request, settings.api_key, settings.admin_key):
        raise UnauthorizedError("send the API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")


def check_admin_key(request: Request, settings: UsingSettings) -> None:
    """Lets pass who bears the admin key, or whom `check_key` lets pass when none is set."""
    check_key(request, settings)
    if settings.admin_key and not _bears(request, settings.admin_key):
        raise ForbiddenError("changes need the admin key")


def _bears(request: Request, *keys: str | None) -> bool:
    borne = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
    return any(key is not None and hmac.compare_digest(borne.encode(), key.encode()) for key in keys)


BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": JsonBody.model_json_schema()},
    },
}
PARAMETERS = [
    {"name": name, "in": "query", "schema": schema, "description": schema.pop("description", "")}
    for name, schema in Parameters.model_json_schema()["properties"].items()
]


@router.post(
    "/classify", dependencies=[Depends(check_key)], openapi_extra={"requestBody": BODY, "parameters": PARAMETERS}
)
@router.post("/v1/classify", dependencies=[Depends(check_key)], include_in_schema=False)
async def classify(
    request: Request,
    response: Response,
    settings: UsingSettings,
    engine: UsingEngine,
    admission: Annotated[Admission, Depends(get_admission)],
) -> Classification:
    """Names what is in each image. Send form parts `image`, a raw image or JSON; parameters in query or body."""
    start = time.perf_counter()
    try:
        uploads, parameters = await read_request(request, settings.max_images, settings.max_body_bytes)
        info, schedule, timeout_s = resolve(parameters, engine.catalog(), settings)
        request.state.model, request.state.schedule = info.name, schedule
        with admission.permit(len(uploads)):
            job = Job(info.name, b"", schedule, parameters.top_k, timeout_s)
            work = _classify_all(uploads, job, info.preprocessing, settings.max_image_pixels, engine)
            answers = await _unless_client_leaves(request, work)
    except ServerError as error:
        _count(request, error.status)
        raise
    predictions = [prediction for _, prediction in answers]
    timings = TimingsMs(
        decode=1e3 * max(decode_s for decode_s, _ in answers),
        queue=1e3 * max(prediction.queue_s for prediction in predictions),
        inference=1e3 * max(prediction.inference_s for prediction in predictions),
        total=1e3 * (time.perf_counter() - start),
    )
    answer = shape(info, uploads, predictions, timings)
    request.state.schedule = predictions[0].schedule
    _count(request, 200, images=len(uploads), total_s=timings.total / 1e3)
    response.headers.update(
        {
            "x-r": str(answer.r).replace(" ", ""),
            "x-batch-size": str(answer.batch_size),
            "x-config-version": str(answer.config_version),
            "server-timing": ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in timings),
        }
    )
    return answer


def resolve(
    parameters: Parameters, catalog: dict[str, ModelInfo], settings: Settings
) -> tuple[ModelInfo, Schedule | None, float]:
    """Checks parameters against the model: its description, `r` per block (None: the deployment's), seconds to answer.

    Raises:
        NotFoundError: There is no such model.
        InvalidError: `r`, `top_k` or the deadline is out of range.
    """
    info = find_model(catalog, parameters.model)
    schedule = None
    if parameters.r is not None:
        schedule = schedule_of(parse_r(parameters.r), info.num_blocks, info.max_r, parameters.inflect)
    elif parameters.inflect is not None:
        raise InvalidError("inflect goes with an r")
    if parameters.top_k > len(info.labels):
        raise InvalidError(f"top_k is {parameters.top_k}; it must lie between 1 and {len(info.labels)}")
    timeout_s = settings.deadline_s
    if parameters.deadline_ms is not None:
        if parameters.deadline_ms > 1e3 * settings.deadline_s:
            limit_ms = 1e3 * settings.deadline_s
            raise InvalidError(f"deadline_ms is {parameters.deadline_ms:g}; it must lie between 0 and {limit_ms:g}")
        timeout_s = parameters.deadline_ms / 1e3
    return info, schedule, timeout_s


def find_model(catalog: dict[str, ModelInfo], name: str | None) -> ModelInfo:
    """A model by name, or the first one."""
    if name is None:
        return next(iter(catalog.values()))
    if name not in catalog:
        raise NotFoundError(f"there is no model {name!r}; there are: {', '.join(catalog)}", models=list(catalog))
    return catalog[name]


async def _classify_all(
    uploads: Sequence[Upload], job: Job, preprocessing: Preprocessing, max_pixels: int, engine: Engine
) -> list[tuple[float, Prediction]]:
    """Seconds of decoding, and the prediction, for each image; the first failure withdraws the others."""

    async def classify_one(index: int, upload: Upload) -> tuple[float, Prediction]:
        start = time.perf_counter()
        try:
            pixels = await run_in_threadpool(decode, upload.encoded, preprocessing, max_pixels)
        except ServerError as error:
            error.details.update(image=index, filename=upload.filename)
            raise
        decode_s = time.perf_counter() - start
        metrics.DECODE_S.observe(decode_s)
        left_s = max(job.timeout_s - decode_s, 0.0)
        return decode_s, await engine.classify(replace(job, pixels=pixels, timeout_s=left_s))

    tasks = [asyncio.ensure_future(classify_one(index, upload)) for index, upload in enumerate(uploads)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _unless_client_leaves(request: Request, work: Awaitable[T]) -> T:
    """Waits for work that is withdrawn as soon as the client hangs up: nobody would read its result."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError("the client hung up")
    finally:
        leaving.cancel()
        working.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def shape(info: ModelInfo, uploads: list[Upload], predictions: list[Prediction], timings: TimingsMs) -> Classification:
    """The engine's predictions as the client sees them."""
    first = predictions[0]
    results = [
        ImageResult(
            filename=upload.filename,
            top_k=[
                Class(label=info.labels[index], index=index, score=score)
                for index, score in zip(prediction.top_k.indices, prediction.top_k.scores, strict=True)
            ],
        )
        for upload, prediction in zip(uploads, predictions, strict=True)
    ]
    return Classification(
        model=info.name,
        r=r_of(first.schedule),
        r_source=first.r_source,
        tokens=token_counts(first.schedule, info.num_tokens, info.num_prefix_tokens)[-1],
        batch_size=max(prediction.batch_size for prediction in predictions),
        config_version=first.config_version,
        results=results,
        timings_ms=timings,
    )


def _count(request: Request, status: int, images: int = 0, total_s: float | None = None) -> None:
    model = getattr(request.state, "model", "unknown")
    schedule = getattr(request.state, "schedule", None)
    r = "deployment" if schedule is None else label_of(schedule)
    metrics.REQUESTS.labels(model, r, str(status)).inc()
    if images:
        metrics.IMAGES.labels(model, r).inc(images)
    if total_s is not None:
        metrics.REQUEST_S.labels(model, r).observe(total_s)


@router.get("/v1/models", dependencies=[Depends(check_key)])
async def list_models(engine: UsingEngine) -> ModelList:
    """The models that are served, the default first."""
    return ModelList(
        models=[_summary(info, await engine.deployment(info.name), engine) for info in engine.catalog().values()]
    )


@router.get("/v1/models/{name}", dependencies=[Depends(check_key)])
async def get_model(name: str, response: Response, engine: UsingEngine) -> ModelDetail:
    """One model: classes, input size, blocks, range of r, and token counts for each r."""
    info = find_model(engine.catalog(), name)
    return _detail(info, await engine.deployment(name), engine, response)


@router.patch("/v1/models/{name}", dependencies=[Depends(check_admin_key)])
async def patch_model(
    name: str,
    change: PatchModel,
    response: Response,
    engine: UsingEngine,
    if_match: Annotated[str | None, Header()] = None,
) -> ModelDetail:
    """Changes the deployment's r from the next request on, over restarts too; If-Match guards against a race."""
    info = find_model(engine.catalog(), name)
    schedule = schedule_of(parse_r(change.r), info.num_blocks, info.max_r, change.inflect)
    expected_version = None
    if if_match is not None and if_match != "*":
        if not if_match.strip('"').isdigit():
            raise InvalidError(f'If-Match is {if_match!r}; send the ETag of a model, like "3"')
        expected_version = int(if_match.strip('"'))
    return _detail(info, await engine.set_r(name, r_of(schedule), expected_version), engine, response)


def _summary(info: ModelInfo, deployment: Deployment, engine: Engine) -> ModelSummary:
    return ModelSummary(
        name=info.name,
        architecture=info.architecture,
        source=info.source,
        is_default=info.name == next(iter(engine.catalog())),
        r=deployment.r,
        config_version=deployment.config_version,
    )


def _detail(info: ModelInfo, deployment: Deployment, engine: Engine, response: Response) -> ModelDetail:
    response.headers["etag"] = f'"{deployment.config_version}"'
    return ModelDetail(
        **_summary(info, deployment, engine).model_dump(),
        num_classes=len(info.labels),
        classes=list(info.labels),
        input_size=info.preprocessing.input_size,
        num_blocks=info.num_blocks,
        num_tokens=info.num_tokens,
        num_prefix_tokens=info.num_prefix_tokens,
        min_r=0,
        max_r=info.max_r,
        token_counts={r: list(_counts(info, r)) for r in range(info.max_r + 1)},
    )


@functools.lru_cache(maxsize=4096)
def _counts(info: ModelInfo, r: int) -> tuple[int, ...]:
    return token_counts((r,) * info.num_blocks, info.num_tokens, info.num_prefix_tokens)


@router.get("/livez")
async def livez() -> dict[str, str]:
    """Whether this process answers. Says nothing about the engine, so that load or a reload never gets it killed."""
    return {"status": "alive"}


@router.get("/readyz")
@router.get("/healthz", include_in_schema=False)
async def readyz(engine: UsingEngine) -> dict[str, Any]:
    """Whether images would be answered now: asks the engine through the real batch loop."""
    await engine.check()
    return {"status": "ready", "models": list(engine.catalog())}


@router.get("/metrics")
async def get_metrics() -> Response:
    """Prometheus metrics of all processes."""
    return Response(await run_in_threadpool(metrics.exposition), media_type="text/plain; version=0.0.4; charset=utf-8")
