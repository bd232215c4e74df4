"""`GET /ping`, common to TorchServe and SageMaker. If both are enabled, it is TorchServe's."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from server.api.access import ForAll
from server.api.health import readyz

PATH = "/ping"


class Ping(BaseModel):
    status: Literal["Healthy"] = "Healthy"


def add_ping(router: APIRouter) -> None:
    """Adds the endpoint to a face's router."""

    @router.get(PATH)
    async def ping(request: Request, service: ForAll) -> Ping:
        """Whether images should be sent here now, like /readyz; it needs no key."""
        await readyz(request, service)
        return Ping()
