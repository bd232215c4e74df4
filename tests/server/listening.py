"""Our connections on a real socket, before an application that tells what it was asked."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from server.api.connection import Connection
from server.api.patience import client_of


class Recorder:
    """Reads a body and says 200, but for three paths.

    `/early` is refused with 404 before its body is read. `/patient` waits until the test says so, or its client has
    left. `/file` begins an answer and ends it a piece later.

    Attributes:
        called: The paths that were asked for.
        done: Each whole request, as "METHOD path body".
        gone: The paths of which the client had left.
        go_on: What `/patient` waits for; it belongs to the loop of the server.
    """

    def __init__(self) -> None:
        self.called: list[str] = []
        self.done: list[str] = []
        self.gone: list[str] = []
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.called.append(path)
        if path == "/early":
            return await _answer(send, 404)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.append(path)
                return
            body, more = body + message["body"], message["more_body"]
        if path == "/patient" and not await self._wait(scope):
            self.gone.append(path)
            return
        self.done.append(f"{scope['method']} {path} {body.decode('latin-1')}".strip())
        await _answer(send, 200)

    async def _wait(self, scope: Scope) -> bool:
        left = asyncio.Event()
        client = client_of(scope)
        assert client is not None
        client.when_gone(left.set)
        waits = [asyncio.ensure_future(event.wait()) for event in (left, self.go_on)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()
        client.when_gone(None)
        return not left.is_set()


async def _answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Listening:
    """A server in a thread, with the event loop of the real one.

    Args:
        app: What answers.
        timeout_s: How long a client is waited for.
    """

    def __init__(self, app: ASGIApp, timeout_s: int = 30) -> None:
        self._app, self._timeout_s = app, timeout_s
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._state = ServerState()

    @property
    def connections(self) -> set[Connection]:
        """Those that are open."""
        return self._state.connections  # type: ignore[return-value]

    def __enter__(self) -> Listening:
        self._thread.start()
        self.run(self._listen())
        return self

    async def _listen(self) -> None:
        config = uvicorn.Config(
            self._app, timeout_keep_alive=self._timeout_s, log_config=None, access_log=False, ws="none"
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self._server = await self.loop.create_server(lambda: Connection(config, self._state, {}), sock=listener)

    def call(self, function: Callable[[], object]) -> None:
        """Calls a function in the loop of the server."""
        self.loop.call_soon_threadsafe(function)

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine in the loop of the server, to its end."""
        asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits until something holds, looked at in the loop of the server."""

        async def holds() -> None:
            while not condition():
                await asyncio.sleep(0.001)

        self.run(holds())

    @property
    def is_idle(self) -> bool:
        """Whether no client is connected and nothing is worked on."""
        return not self._state.connections and not self._state.tasks

    def connect(self) -> socket.socket:
        """A client."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        async def end() -> None:
            self._server.close()
            for connection in list(self.connections):
                connection.transport.abort()
            while self.connections:
                await asyncio.sleep(0)

        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def all_of(client: socket.socket) -> bytes:
    """What the server sends until it hangs up; fails where it resets the connection or never ends."""
    received = b""
    while data := client.recv(1 << 16):
        received += data
    return received


def statuses(received: bytes) -> list[int]:
    """The statuses of all answers."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]
