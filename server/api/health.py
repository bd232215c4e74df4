"""The endpoints of operations: alive, ready, metrics. They need no key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from server import metrics
from server.api.access import ERRORS, ForAll
from server.errors import UnavailableError

router = APIRouter(responses={503: ERRORS[503]})


@router.get("/livez")
async def livez() -> dict[str, str]:
    """Whether this process answers. Says nothing of the engine, so that load or a reload never gets it killed."""
    return {"status": "alive"}


@router.get("/readyz")
@router.get("/healthz", include_in_schema=False)
async def readyz(request: Request, service: ForAll) -> dict[str, Any]:
    """Whether images should be sent here now: asks the engine through the real batch loop."""
    if request.app.state.is_draining:
        raise UnavailableError("this server is about to end", retry_after_s=1)
    await service.engine.check()
    return {"status": "ready", "models": list(service.engine.catalog())}


@router.get("/metrics")
async def get_metrics() -> Response:
    """Prometheus metrics of all processes."""
    return Response(await run_in_threadpool(metrics.exposition), media_type="text/plain; version=0.0.4; charset=utf-8")
