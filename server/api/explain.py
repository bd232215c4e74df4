"""`POST /v1/explain`: the answer to one photo, and the patches that merged in every block. The page draws it."""

from __future__ import annotations

from fastapi import APIRouter, Request

from server.api.access import ERRORS, ForUsers
from server.api.asking import EXPLAIN, Asking
from server.api.body import OURS, read_request
from server.api.described import asked
from server.api.routes import classes
from server.api.schemas import BlockGroups, Class, ComputedBy, Merging, Seen, TimingsMs
from server.dial import r_of

router = APIRouter(responses=ERRORS)


@router.post("/v1/explain", openapi_extra=asked(OURS))
async def explain(request: Request, service: ForUsers) -> Merging:
    """The patches of one image that merge. Takes the same request as /classify; always computed in float32."""
    with Asking(service, request) as asking:
        uploads, parameters = await asking.read(read_request(request, 1, OURS))
        answer = await asking.answer(EXPLAIN, uploads, asking.resolve(parameters))
    terms, answered = answer.terms, answer.answered
    info, (merges,) = terms.info, answered.results
    seen, counts = info.preprocessing, info.token_counts(answered.schedule)
    return Merging(
        model=info.name,
        r=r_of(answered.schedule),
        r_source=terms.r_source,
        tuned=info.is_tuned(answered.schedule),
        config_version=answered.config_version,
        computed_by=ComputedBy(backend=answered.computed_by.backend, precision=answered.computed_by.precision),
        filename=uploads[0].filename,
        top_k=[Class(**each) for each in classes(info, merges.top_k)],
        seen=Seen(input_size=seen.input_size, resize_size=seen.resize_size, crop_mode=seen.crop_mode),
        grid=merges.grid,
        patch=merges.patch,
        num_prefix_tokens=info.num_prefix_tokens,
        tokens=counts[0],
        blocks=[
            BlockGroups(block=block, tokens=tokens, groups=groups)
            for block, (tokens, groups) in enumerate(zip(counts[1:], merges.groups, strict=True), 1)
        ],
        timings_ms=TimingsMs(**answer.timings_ms),
    )
