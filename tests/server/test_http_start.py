"""An HTTP process whose application fails at its start: it accepts nobody, and says so to the supervisor."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from fastapi import FastAPI

from server.api.accept import Places
from server.api.process import _Server


async def test_an_application_that_does_not_start_accepts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise OSError("no engine")
        yield

    app = FastAPI(lifespan=lifespan)
    app.state.is_draining = False
    places = Places(1)
    server = _Server(uvicorn.Config(app, log_config=None), app, 0.0, places, 0)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(SystemExit):
        await server.serve(sockets=[listener])
    assert places.held() == [None] and not places.was_ever_open(0)  # so the supervisor ends the start
    assert "OSError: no engine" in caplog.text
