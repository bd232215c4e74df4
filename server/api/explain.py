"""`POST /v1/explain`: the answer to one photo, and which of its patches merged in every block. The page paints it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from fastapi import APIRouter, Request

from server.api.access import ERRORS, ForUsers, Service
from server.api.body import Upload, read_request
from server.api.patience import at_most, unless_client_leaves
from server.api.routes import ASKED, classes, resolve
from server.api.schemas import BlockGroups, Merging, Seen, TimingsMs
from server.dial import r_of
from server.images.pillow import decode
from server.images.preprocessing import Preprocessing
from server.types import Explanation, Job

router = APIRouter(responses=ERRORS)


@router.post("/v1/explain", openapi_extra=ASKED)
async def explain(request: Request, service: ForUsers) -> Merging:
    """Says which patches of one image merge. Asked as /classify is, and computed in float32 whatever that takes."""
    start = time.perf_counter()
    settings = service.settings
    async with at_most(settings.deadline_s):
        (upload,), parameters = await read_request(request, max_images=1)
    info, job = resolve(parameters, service.engine.catalog(), settings.deadline_s)
    seen = info.preprocessing
    with service.admission.permit(1, job.timeout_s):
        async with at_most(job.timeout_s):
            work = _decode_and_explain(upload, job, seen, service)
            decode_s, explanation = await unless_client_leaves(request, work)
    prediction, merges = explanation.prediction, explanation.merges
    counts = info.token_counts(prediction.schedule)
    return Merging(
        model=info.name,
        r=r_of(prediction.schedule),
        r_source="deployment" if parameters.r is None else "request",
        config_version=prediction.config_version,
        filename=upload.filename,
        top_k=classes(info, prediction.top_k),
        seen=Seen(input_size=seen.input_size, resize_size=seen.resize_size, crop_mode=seen.crop_mode),
        grid=merges.grid,
        patch=merges.patch,
        num_prefix_tokens=info.num_prefix_tokens,
        tokens=counts[0],
        blocks=[
            BlockGroups(block=block, tokens=tokens, groups=groups)
            for block, (tokens, groups) in enumerate(zip(counts[1:], merges.groups, strict=True), 1)
        ],
        timings_ms=TimingsMs(
            decode=1e3 * decode_s,
            queue=1e3 * prediction.queue_s,
            inference=1e3 * prediction.inference_s,
            total=1e3 * (time.perf_counter() - start),
        ),
    )


async def _decode_and_explain(
    upload: Upload, job: Job, seen: Preprocessing, service: Service
) -> tuple[float, Explanation]:
    """Seconds of decoding, and what merged."""
    start = time.perf_counter()
    loop, max_pixels = asyncio.get_running_loop(), service.settings.max_image_pixels
    pixels = await loop.run_in_executor(service.decoders, decode, upload.encoded, seen, max_pixels)
    decode_s = time.perf_counter() - start
    left_s = max(job.timeout_s - decode_s, 0.0)
    return decode_s, await service.engine.explain(replace(job, pixels=pixels, timeout_s=left_s))
