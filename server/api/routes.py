"""The main job. `classify` conducts one request: read, admit, decode, ask the engine, shape the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from server import metrics
from server.api.access import ERRORS, ForUsers, Service
from server.api.body import Upload, read_request
from server.api.patience import at_most, unless_client_leaves
from server.api.schemas import AutoChoice, Class, Classification, ImageResult, JsonBody, Parameters, RSource, TimingsMs
from server.dial import AutoR, RSetting, Schedule, label_of, parse_setting, r_of, text_of
from server.errors import InvalidError, ServerError, TooLargeError, UndecodableError, UnsupportedError
from server.images.pillow import decode_for
from server.types import Choice, Job, ModelInfo, Prediction, TopK, find_model

router = APIRouter(responses=ERRORS)

DEFAULT_TOP_K = 5

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
ASKED = {"requestBody": BODY, "parameters": PARAMETERS}
"""What `read_request` reads, for the API's description."""


@router.post("/classify", response_model=Classification, openapi_extra=ASKED)
@router.post("/v1/classify", response_model=Classification, include_in_schema=False)
async def classify(request: Request, service: ForUsers) -> Response:
    """Names what is in each image. Send form parts `image`, a raw image or JSON; parameters in query or body."""
    start = time.perf_counter()
    settings, engine = service.settings, service.engine
    model, schedule = "unknown", None
    try:
        async with at_most(settings.deadline_s):
            uploads, parameters = await read_request(request, settings.max_images)
        info, job = resolve(parameters, engine.catalog(), settings.deadline_s)
        model = info.name
        schedule = None if isinstance(job.r, AutoR) else job.r
        config_version = None
        with service.admission.permit(len(uploads), job.timeout_s):
            choice = None
            async with at_most(job.timeout_s):
                if len(uploads) > 1:  # one r for all of them, even if it changes meanwhile
                    r: RSetting | None = job.r
                    if r is None:
                        configuration = await engine.configuration()
                        config_version, r = configuration.version, configuration.models[info.name]
                    if isinstance(r, AutoR):
                        choice = await engine.choose(info.name, r)
                    job = replace(job, r=choice.schedule if choice else info.schedule(r))
                answers = await unless_client_leaves(request, _classify_all(uploads, job, info, service))
    except Exception as error:
        _count(model, schedule, error.status if isinstance(error, ServerError) else 500)
        raise
    predictions = [prediction for _, prediction in answers]
    timings = TimingsMs(
        decode=1e3 * max(decode_s for decode_s, _ in answers),
        queue=1e3 * max(prediction.queue_s for prediction in predictions),
        inference=1e3 * max(prediction.inference_s for prediction in predictions),
        total=1e3 * (time.perf_counter() - start),
    )
    r_source: RSource = "deployment" if parameters.r is None else "request"
    config_version = config_version or predictions[0].config_version
    answer = shape(info, uploads, predictions, r_source, choice or predictions[0].auto, config_version, timings)
    _count(model, predictions[0].schedule, 200)
    labels = (model, label_of(predictions[0].schedule))
    metrics.IMAGES.labels(*labels).inc(len(uploads))
    metrics.REQUEST_S.labels(*labels).observe(timings.total / 1e3)
    headers = {
        "x-r": text_of(answer.r),
        "x-batch-size": str(answer.batch_size),
        "x-config-version": str(answer.config_version),
        "server-timing": ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in timings),
    }
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")


def resolve(parameters: Parameters, catalog: dict[str, ModelInfo], longest_s: float) -> tuple[ModelInfo, Job]:
    """Checks parameters against the model: its description, and a job that lacks only its pixels.

    Raises:
        NotFoundError: There is no such model.
        InvalidError: `r`, `top_k` or the deadline is out of range.
    """
    info = find_model(catalog, parameters.model)
    r: Schedule | AutoR | None = None
    if parameters.r is not None:
        setting = parse_setting(parameters.r, parameters.max_r, parameters.min_agreement)
        if isinstance(setting, AutoR) and parameters.inflect is not None:
            raise InvalidError("inflect goes with a single r, not with auto")
        r = setting if isinstance(setting, AutoR) else info.schedule(setting, parameters.inflect)
    elif (parameters.inflect, parameters.max_r, parameters.min_agreement) != (None, None, None):
        raise InvalidError("inflect goes with an r, and max_r and min_agreement with r=auto")
    top_k = parameters.top_k or min(DEFAULT_TOP_K, len(info.labels))
    if top_k > len(info.labels):
        raise InvalidError(f"top_k is {top_k}; it must lie between 1 and {len(info.labels)}")
    timeout_s = longest_s if parameters.deadline_ms is None else parameters.deadline_ms / 1e3
    if timeout_s > longest_s:
        raise InvalidError(f"deadline_ms is {1e3 * timeout_s:g}; it must lie between 0 and {1e3 * longest_s:g}")
    return info, Job(info.name, b"", r, top_k, timeout_s)


async def _classify_all(
    uploads: Sequence[Upload], job: Job, info: ModelInfo, service: Service
) -> list[tuple[float, Prediction]]:
    """Seconds of decoding, and the prediction, for each image; the first failure withdraws the others."""
    loop, max_pixels = asyncio.get_running_loop(), service.settings.max_image_pixels

    async def classify_one(index: int, upload: Upload) -> tuple[float, Prediction]:
        start = time.perf_counter()
        try:
            work = loop.run_in_executor(service.decoders, decode_for, info, upload.encoded, max_pixels)
            pixels, jpeg_pixels = await work
            decode_s = time.perf_counter() - start
            metrics.DECODE_S.observe(decode_s)
            left_s = max(job.timeout_s - decode_s, 0.0)
            one = replace(job, pixels=pixels, jpeg_pixels=jpeg_pixels, timeout_s=left_s)
            return decode_s, await service.engine.classify(one)
        except (UndecodableError, UnsupportedError, TooLargeError) as error:  # of this image, here or in the engine
            error.details.update(image=index, filename=upload.filename)
            raise

    if len(uploads) == 1:
        return [await classify_one(0, uploads[0])]
    tasks = [asyncio.ensure_future(classify_one(index, upload)) for index, upload in enumerate(uploads)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def shape(
    info: ModelInfo,
    uploads: Sequence[Upload],
    predictions: Sequence[Prediction],
    r_source: RSource,
    choice: Choice | None,
    config_version: int,
    timings: TimingsMs,
) -> Classification:
    """The engine's predictions as the client sees them."""
    first = predictions[0]
    results = [
        ImageResult(
            filename=upload.filename,
            top_k=classes(info, prediction.top_k),
        )
        for upload, prediction in zip(uploads, predictions, strict=True)
    ]
    return Classification(
        model=info.name,
        r=r_of(first.schedule),
        r_source=r_source,
        auto=AutoChoice(reason=choice.reason, expected_agreement=choice.expected_agreement) if choice else None,
        tokens=info.token_counts(first.schedule)[-1],
        batch_size=max(prediction.batch_size for prediction in predictions),
        config_version=config_version,
        results=results,
        timings_ms=timings,
    )


def classes(info: ModelInfo, top_k: TopK) -> list[Class]:
    """The likeliest classes by name."""
    return [
        Class(label=info.labels[index], index=index, score=score)
        for index, score in zip(top_k.indices, top_k.scores, strict=True)
    ]


def _count(model: str, schedule: Schedule | None, status: int) -> None:
    r = "unknown" if schedule is None else label_of(schedule)  # refused before the deployment's was asked for
    metrics.REQUESTS.labels(model, r, str(status)).inc()
