"""Room for connections: those idle for longest leave for new ones, and those that are worked for stay."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from uvicorn.server import ServerState

from server.api.accept import Acceptor, Places
from server.api.connection import Connection
from server.api.room import Room, most_connections
from tests.server.conftest import until
from tests.server.listening import Recorder

ROOT = Path(__file__).resolve().parents[2]
MOST = 10
GET = b"GET /good HTTP/1.1\r\nHost: x\r\n\r\n"
PATIENT = b"GET /patient HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = b"GET /good HTTP/1.1\r\nHo"


class Client:
    """A client of which a test may say much in little."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, request: bytes = GET) -> bytes:
        """Sends a request and gives the first line of its answer; empty where it was hung up on."""
        try:
            self.writer.write(request)
            head = await self.reader.readuntil(b"\r\n\r\nok")
        except (ConnectionError, asyncio.IncompleteReadError):
            return b""
        return head.splitlines()[0]

    async def is_closed(self) -> bool:
        """Whether it is hung up on; waits for that."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True


@asynccontextmanager
async def few(recorder: Recorder, room: Room) -> AsyncIterator[tuple[Acceptor, list[Client]]]:
    """A server with little room; what it has for clients when it ends is closed."""
    config = uvicorn.Config(recorder, timeout_keep_alive=1000, log_config=None, access_log=False, ws="none")
    state = ServerState()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
    acceptor = Acceptor(
        listener, Places(1), 0, lambda on_lost: Connection(config, state, {}, on_lost=on_lost, room=room), room
    )
    acceptor.open()
    clients: list[Client] = []
    yield acceptor, clients
    await acceptor.close()
    for connection in list(state.connections):
        connection.transport.abort()
    for client in clients:
        client.writer.close()
    await until(lambda: not state.connections)


async def connect(acceptor: Acceptor, clients: list[Client], sent: bytes = b"") -> Client:
    clients.append(Client(*await asyncio.open_connection(*acceptor._listener.getsockname())))
    clients[-1].writer.write(sent)
    return clients[-1]


async def test_many_idle_connections_keep_nobody_out() -> None:
    recorder = Recorder()
    async with few(recorder, Room(MOST)) as (acceptor, clients):
        for _ in range(20 * MOST):
            await connect(acceptor, clients, HALF)
            await until(lambda: acceptor._held <= MOST)
            if len(clients) % MOST == 0:
                assert await (await connect(acceptor, clients)).ask() == b"HTTP/1.1 200 OK"
        assert [await client.is_closed() for client in clients[:MOST]] == [True] * MOST


async def test_who_is_idle_for_longest_leaves_first() -> None:
    async with few(Recorder(), Room(3)) as (acceptor, clients):
        first, second, third = [await connect(acceptor, clients) for _ in range(3)]
        for each in (first, second, third, first):
            assert await each.ask() == b"HTTP/1.1 200 OK"
        await (await connect(acceptor, clients)).ask()
        assert await second.is_closed()
        assert await third.ask() == await first.ask() == b"HTTP/1.1 200 OK"


async def test_who_is_answered_stays_and_who_comes_waits() -> None:
    recorder = Recorder()
    async with few(recorder, Room(2)) as (acceptor, clients):
        patient = [asyncio.create_task((await connect(acceptor, clients)).ask(PATIENT)) for _ in range(2)]
        await until(lambda: recorder.called == ["/patient"] * 2)
        late = asyncio.create_task((await connect(acceptor, clients)).ask())
        await until(lambda: not acceptor._is_taking)  # it has seen that there is no room
        assert acceptor._held == 2 and "/good" not in recorder.called
        recorder.go_on.set()
        assert await asyncio.gather(*patient, late) == [b"HTTP/1.1 200 OK"] * 3


def test_there_are_half_as_many_connections_as_files() -> None:
    program = (
        "import resource; from server.api.room import allow_many_files, most_connections\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 256)); allow_many_files(); print(most_connections())"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert 110 <= int(ended.stdout) <= 128
    assert most_connections() < resource.getrlimit(resource.RLIMIT_NOFILE)[0]
