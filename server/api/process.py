"""An HTTP process: uvicorn for its share of the clients, and a connection to each engine process."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from starlette.types import Message

from server.api.accept import Acceptor, Places
from server.api.access_log import AccessLog
from server.api.app import create_app
from server.api.connection import Connection
from server.api.room import Room, allow_many_files, most_connections
from server.ipc.client import RemoteEngine
from server.ipc.devices import Devices
from server.ipc.door import Door
from server.lifetime import Pulse, configure_logging, end_with_parent, spare_the_collector
from server.listening import address_of
from server.memory import give_large_blocks_back
from server.settings import Settings
from server.tracing.start import start_tracing

if TYPE_CHECKING:
    from server.api.protocols.oip_grpc import GrpcServer

_DRAIN_S = 25
_CLOSE = (b"connection", b"close")


def main(
    settings: Settings,
    listener: socket.socket,
    doors: Sequence[Door],
    places: Places,
    index: int,
    pulse: Pulse,
) -> None:
    """Runs one HTTP process until SIGTERM, and answers all accepted requests before it ends.

    Args:
        settings: Limits and keys.
        listener: The socket that all HTTP processes share.
        doors: The connections to the engines.
        places: The HTTP processes' knowledge of each other.
        index: The place of this process.
        pulse: Beats while it serves.
    """
    log = configure_logging(settings.log_level, settings.log_format)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns about each odd byte that a client sends
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # the supervisor logs when processes start and end
    end_with_parent()
    allow_many_files()
    give_large_blocks_back()
    engines = [RemoteEngine(door, index) for index, door in enumerate(doors)]
    engine = engines[0] if len(engines) == 1 else Devices(engines)
    tracing = start_tracing(f"http-{index}")
    access_log = None
    if settings.access_log and settings.log_level in ("debug", "info"):
        access_log = AccessLog(log.write, settings.log_format, has_probes=settings.log_level == "debug")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        beating = asyncio.create_task(pulse.beat())
        yield
        if grpc_server is not None:
            await grpc_server.ended()
        beating.cancel()
        app.state.service.decoders.close()
        await engine.close()
        if tracing is not None:
            tracing.close()  # here, because uvicorn ends the process by the signal that ended its loop

    app = create_app(settings, engine, lifespan, access_log=access_log, tracing=tracing)
    grpc_server = _grpc_server(app, settings)
    config = uvicorn.Config(
        app,
        http=Connection,
        loop="uvloop",
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=settings.client_timeout_s,
        timeout_graceful_shutdown=_DRAIN_S,
    )
    _Server(config, app, settings.drain_delay_s, places, index, grpc_server).run(sockets=[listener])


def _grpc_server(app: FastAPI, settings: Settings) -> GrpcServer | None:
    if settings.grpc_port is None:
        return None
    from server.api.protocols.oip_grpc import GrpcServer  # its package is an extra

    return GrpcServer(app, address_of(settings.host, settings.grpc_port))


class _Server(uvicorn.Server):
    """Ends in two steps: first /readyz reports it and every answer closes its connection, then the port closes.

    Args:
        config: uvicorn's configuration.
        app: The application, which has /readyz.
        drain_delay_s: Time between the steps, in which a load balancer switches to other servers.
        places: The HTTP processes' knowledge of each other.
        index: The place of this process.
        grpc_server: Serves beside it, and ends with it; None for none.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        drain_delay_s: float,
        places: Places,
        index: int,
        grpc_server: GrpcServer | None = None,
    ) -> None:
        super().__init__(config)
        self._grpc_server = grpc_server
        self._app, self._drain_delay_s = app, drain_delay_s
        self._places, self._index = places, index
        self._closes_at = float("inf")
        self._room = Room()
        self._acceptor: Acceptor | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # none for uvicorn, which would take all waiting connections as soon as it wakes
        await super().startup(sockets=[])
        assert sockets is not None
        await _warm_up(self._app)
        if self._grpc_server is not None:
            await self._grpc_server.start()
        spare_the_collector()
        self._room.most = most_connections()
        self._acceptor = Acceptor(sockets[0], self._places, self._index, self._connection, self._room)
        self._acceptor.open()

    def _connection(self, on_lost: Callable[[], None]) -> Connection:
        """The protocol of a connection, as uvicorn would make it."""
        return Connection(self.config, self.server_state, self.lifespan.state, on_lost=on_lost, room=self._room)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._acceptor is not None:
            await self._acceptor.close()  # before uvicorn closes the connections, because none may arrive after that
        if self._grpc_server is not None:
            self._grpc_server.begin_to_end(_DRAIN_S)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles SIGTERM."""
        if not self._app.state.is_draining:
            self._app.state.is_draining = True
            self._closes_at = time.monotonic() + self._drain_delay_s

    async def on_tick(self, counter: int) -> bool:
        if self._app.state.is_draining and time.monotonic() >= self._closes_at:
            super().handle_exit(signal.SIGTERM, None)
        should_exit = await super().on_tick(counter)
        if self._app.state.is_draining and _CLOSE not in self.server_state.default_headers:
            self.server_state.default_headers = [*self.server_state.default_headers, _CLOSE]
        return should_exit


async def _warm_up(app: FastAPI) -> None:
    """Makes a trivial request, because FastAPI builds its routes for the first one, which takes a tenth of a second."""

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/livez", "headers": [], "query_string": b"", "root_path": ""}
    await app(scope, receive, send)
