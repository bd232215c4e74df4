"""The endpoints for operations: alive, ready, metrics. They need no key, except the metrics if a key is set for
them.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from server import metrics
from server.api.access import ERRORS, ForAll, Service, for_scrapers
from server.errors import UnavailableError

router = APIRouter(responses={503: ERRORS[503]})


async def check_ready(app: FastAPI) -> None:
    """Raises UnavailableError if no images should be sent here now."""
    if app.state.is_draining:
        raise UnavailableError("this server is shutting down", retry_after_s=1)
    service: Service = app.state.service
    await service.engine.check()


@router.get("/livez")
async def livez() -> dict[str, str]:
    """Whether this process answers. Independent of the engine, so that load or a reload never gets the process
    killed.
    """
    return {"status": "alive"}


@router.get("/readyz")
@router.get("/healthz", include_in_schema=False)
async def readyz(request: Request, service: ForAll) -> dict[str, Any]:
    """Whether images should be sent here now. Checks the engine through its batch loop."""
    await check_ready(request.app)
    return {"status": "ready", "models": list(service.engine.catalog())}


class Exposition(Response):
    """Text for Prometheus."""

    media_type = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/metrics", response_class=Exposition, responses={401: ERRORS[401]}, dependencies=[Depends(for_scrapers)])
async def get_metrics() -> Response:
    """Prometheus metrics of all processes."""
    return Exposition(await run_in_threadpool(metrics.exposition))
