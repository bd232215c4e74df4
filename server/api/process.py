"""An HTTP process: uvicorn on the port that all HTTP processes share, and a connection to the engine process."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from server.api.app import create_app
from server.engine.transport import RemoteEngine
from server.lifetime import configure_logging, end_with_parent
from server.settings import Settings

_DRAIN_S = 25


def main(settings: Settings, listener: socket.socket, socket_path: str) -> None:
    """Runs one HTTP process until it is told to end, and answers what it has accepted before it does."""
    configure_logging(settings.log_level)
    end_with_parent()
    engine = RemoteEngine(socket_path)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.close()

    config = uvicorn.Config(
        create_app(settings, engine, lifespan),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=_DRAIN_S,
    )
    uvicorn.Server(config).run(sockets=[listener])
