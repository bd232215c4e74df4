"""The endpoints of operations: alive, ready, metrics. They need no key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool

from server import metrics
from server.api.access import ERRORS, UsingEngine

router = APIRouter(responses={503: ERRORS[503]})


@router.get("/livez")
async def livez() -> dict[str, str]:
    """Whether this process answers. Says nothing of the engine, so that load or a reload never gets it killed."""
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
