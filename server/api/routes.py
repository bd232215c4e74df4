"""`POST /classify`, the main endpoint: read, admit, decode, ask the engine, shape the answer."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from server import metrics
from server.api.access import ERRORS, ForUsers
from server.api.body import Upload
from server.api.direct import DirectRoute
from server.api.patience import unless_client_leaves
from server.api.reading import read_and_ask
from server.api.schemas import Classification, JsonBody, Parameters
from server.api.terms import Terms, read_terms, timings_of
from server.dial import label_of, r_of, text_of
from server.errors import ServerError
from server.ipc.messages import Answered, Classify, TopK
from server.types import ModelInfo

router = APIRouter(responses=ERRORS, route_class=DirectRoute)

PARAMETERS: dict[str, dict[str, Any]] = Parameters.model_json_schema()["properties"]
_FILE = {"type": "string", "format": "binary"}
BODY = {
    "required": True,
    "description": "Images. The parameters may stand here instead of in the query: as fields of the form, or beside "
    "`images` in JSON.",
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "array", "items": _FILE, "minItems": 1}, **PARAMETERS},
                "required": ["image"],
                "additionalProperties": False,
            }
        },
        "image/*": {"schema": _FILE},
        "application/octet-stream": {"schema": _FILE},
        "application/json": {"schema": JsonBody.model_json_schema()},
    },
}
ANSWERED: dict[int | str, dict[str, Any]] = {
    200: {
        "headers": {
            name: {"description": description, "schema": {"type": "string"}}
            for name, description in {
                "x-r": "The r that was used, as the query takes it.",
                "x-batch-size": "Images in the batch.",
                "x-config-version": "Version of the live configuration.",
                "server-timing": "Where the time went, in milliseconds.",
            }.items()
        }
    }
}
ASKED = {
    "requestBody": BODY,
    "parameters": [
        {"name": name, "in": "query", "schema": schema, "description": schema["description"]}
        for name, schema in PARAMETERS.items()
    ],
}
"""What `read_request` reads, for the API's description."""


@router.post("/classify", response_model=Classification, responses=ANSWERED, openapi_extra=ASKED)
@router.post("/v1/classify", response_model=Classification, include_in_schema=False)
async def classify(request: Request, service: ForUsers) -> Response:
    """Names what is in each image. Send form parts `image`, a raw image or JSON; parameters in query or body."""
    start = time.monotonic()
    model, schedule = "unknown", None
    try:
        uploads, terms = await read_terms(request, service, start, service.settings.max_images)
        model, schedule = terms.info.name, terms.schedule
        with service.admission.permit(len(uploads), terms.left_s):
            decode_s, answered = await unless_client_leaves(request, read_and_ask(Classify, uploads, terms, service))
    except Exception as error:
        r = "unknown" if schedule is None else label_of(schedule)  # refused before the deployment's was asked for
        metrics.REQUESTS.labels(model, r, str(error.status if isinstance(error, ServerError) else 500)).inc()
        raise
    timings = timings_of(answered, decode_s, start)
    requests, images, seconds = _counters(model, label_of(answered.schedule))
    requests.inc()
    images.inc(len(uploads))
    seconds.observe(timings["total"] / 1e3)
    headers = {
        "x-r": text_of(r_of(answered.schedule)),
        "x-batch-size": str(answered.batch_size),
        "x-config-version": str(answered.config_version),
        "server-timing": ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in timings.items()),
    }
    return Response(_encode(shape(terms, uploads, answered, timings)), headers=headers, media_type="application/json")


def shape(
    terms: Terms, uploads: Sequence[Upload], answered: Answered[TopK], timings: dict[str, float]
) -> dict[str, Any]:
    """The engine's answer as the client sees it: a `Classification`, in a quarter of the time that its classes take."""
    auto = answered.auto
    return {
        "model": terms.info.name,
        "r": r_of(answered.schedule),
        "r_source": terms.r_source,
        "tuned": terms.info.is_tuned(answered.schedule),
        "auto": auto and {"reason": auto.reason, "expected_agreement": auto.expected_agreement},
        "tokens": terms.info.token_counts(answered.schedule)[-1],
        "batch_size": answered.batch_size,
        "config_version": answered.config_version,
        "results": [
            {"filename": upload.filename, "top_k": classes(terms.info, top_k)}
            for upload, top_k in zip(uploads, answered.results, strict=True)
        ],
        "timings_ms": timings,
    }


def classes(info: ModelInfo, top_k: TopK) -> list[dict[str, Any]]:
    """The likeliest classes by name: each a `Class`."""
    return [
        {"label": info.labels[index], "index": index, "score": score}
        for index, score in zip(top_k.indices, top_k.scores, strict=True)
    ]


@functools.lru_cache(1024)
def _counters(model: str, r: str) -> tuple[Any, Any, Any]:
    """What counts the answers of a model at one `r`: to look a label up takes as long as to count."""
    return metrics.REQUESTS.labels(model, r, "200"), metrics.IMAGES.labels(model, r), metrics.REQUEST_S.labels(model, r)


_encode = msgspec.json.Encoder().encode
