"""A client's connection by itself: what is held of a head, and for how long something is awaited."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from server.api.connection import _LONGEST_HEAD, _MOST_PIPELINED, Connection
from server.api.patience import Sender, client_of
from tests.server.conftest import until

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n"


class Wire(asyncio.Transport):
    """A transport that keeps what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.is_closed, self.is_ended = b"", False, False

    def write(self, data: Any) -> None:
        self.sent += data

    def close(self) -> None:
        self.is_closed = True

    def write_eof(self) -> None:
        if self.is_closed:
            raise RuntimeError("unable to perform operation; the handler is closed")  # as uvloop
        self.is_ended = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def statuses(wire: Wire) -> list[bytes]:
    """The statuses of all answers."""
    return re.findall(rb"HTTP/1.1 (\d+) ", wire.sent)


def connected(app: ASGIApp = echo) -> tuple[Connection, Wire]:
    config = uvicorn.Config(app, timeout_keep_alive=1000, log_config=None, access_log=False)
    connection, wire = Connection(config, ServerState(), {}), Wire()
    connection.connection_made(wire)
    return connection, wire


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_requests_in_pieces_of_any_size_are_answered_in_order(size: int) -> None:
    connection, wire = connected()
    stream = b"".join(HEAD + b"%04d" % number for number in range(20))
    for start in range(0, len(stream), size):
        connection.data_received(stream[start : start + size])
    await until(lambda: wire.sent.count(b"HTTP/1.1 200") == 20)
    assert [wire.sent.index(b"%04d" % number) for number in range(20)] == sorted(
        wire.sent.index(b"%04d" % number) for number in range(20)
    )
    assert not wire.is_closed
    connection.connection_lost(None)


async def test_many_requests_whose_heads_are_longer_together_than_one_may_be_are_served() -> None:
    connection, wire = connected()
    rounds = _LONGEST_HEAD // (20 * len(HEAD)) + 2
    for done in range(1, rounds + 1):
        for _ in range(20):
            for byte in range(0, len(HEAD) + 4, 16):
                connection.data_received((HEAD + b"body")[byte : byte + 16])
        await until(lambda done=done: wire.sent.count(b"HTTP/1.1 200") == 20 * done)  # type: ignore[misc]
    assert not wire.is_closed
    connection.connection_lost(None)


async def test_requests_without_end_that_wait_for_their_turn_are_refused() -> None:
    connection, wire = connected()
    connection.data_received((HEAD + b"body") * 10_000)
    assert len(connection.pipeline) == _MOST_PIPELINED
    await until(lambda: wire.is_ended)
    assert statuses(wire) == [b"200"] * (1 + _MOST_PIPELINED) + [b"400"]
    connection.connection_lost(None)


@pytest.mark.parametrize("trailers", [b"a: b\r\n" * 100, b"x" * 1000], ids=["many", "one without end"])
async def test_trailers_are_not_kept_and_do_not_go_on(trailers: bytes) -> None:
    connection, wire = connected()
    connection.data_received(HEAD.replace(b"content-length: 4", b"transfer-encoding: chunked") + b"4\r\nbody\r\n0\r\n")
    headers = list(connection.headers)
    connection.data_received(b"x: ")
    for _ in range(_LONGEST_HEAD // len(trailers)):
        connection.data_received(trailers)
    assert not wire.is_closed and connection.headers == headers
    for _ in range(2):
        connection.data_received(trailers)
    assert wire.is_ended
    connection.connection_lost(None)


async def test_a_body_in_small_chunks_may_be_long() -> None:
    connection, wire = connected()
    connection.data_received(HEAD.replace(b"content-length: 4", b"transfer-encoding: chunked"))
    for _ in range(_LONGEST_HEAD):
        connection.data_received(b"1\r\nx\r\n")
    connection.data_received(b"0\r\n\r\n")
    await until(lambda: b"HTTP/1.1 200" in wire.sent)
    assert not wire.is_closed
    connection.connection_lost(None)


async def test_the_request_that_is_answered_learns_that_its_client_left_whatever_waits_behind_it() -> None:
    ended: list[str] = []

    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            pass
        ended.append(message["type"])

    connection, _ = connected(app=patient)
    connection.data_received(HEAD + b"body" + HEAD + b"body")
    await asyncio.sleep(0)
    connection.connection_lost(None)
    await until(lambda: ended == ["http.disconnect"])


async def test_an_application_that_fails_after_its_client_has_left_harms_nothing() -> None:
    goes_on = asyncio.Event()

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await goes_on.wait()
        raise ValueError("late")

    connection, wire = connected(app=fail)
    connection.data_received(HEAD)  # its body is still to come
    await until(lambda: b"HTTP/1.1 200" in wire.sent)
    (task,) = connection.tasks
    wire.close()
    connection.connection_lost(None)
    goes_on.set()
    await task
    assert not wire.is_ended


async def test_an_application_is_told_of_a_client_that_leaves_while_it_asks_to_be() -> None:
    told: list[str] = []
    clients: list[Sender] = []
    asks = asyncio.Event()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        client = client_of(scope)
        assert client is not None
        clients.append(client)
        assert not client.has_sent_all
        await receive()
        assert client.has_sent_all
        client.when_gone(lambda: told.append("gone"))
        asks.set()
        await asyncio.Event().wait()

    connection, _ = connected(app=answer)
    connection.data_received(HEAD)
    await until(lambda: len(clients) == 1)
    connection.data_received(b"body")
    await asks.wait()
    assert told == []
    connection.connection_lost(None)
    assert told == ["gone"]
    clients[0].when_gone(lambda: told.append("late"))  # it has left already
    clients[0].when_gone(lambda: told.append("later"))
    clients[0].when_gone(None)
    await asyncio.sleep(0)
    assert told == ["gone"]
    clients[0].when_gone(lambda: told.append("soon"))
    await until(lambda: told == ["gone", "soon"])
    for task in connection.tasks:
        task.cancel()
    await asyncio.wait(connection.tasks)


async def test_a_connection_says_once_that_it_is_lost() -> None:
    lost: list[int] = []
    config = uvicorn.Config(echo, log_config=None, access_log=False)
    connection = Connection(config, ServerState(), {}, on_lost=lambda: lost.append(1))
    connection.connection_made(Wire())
    assert not lost
    connection.connection_lost(None)
    assert lost == [1]


async def test_a_head_that_goes_on_is_refused() -> None:
    connection, wire = connected()
    connection.data_received(b"POST / HTTP/1.1\r\nx-long: ")
    for _ in range(_LONGEST_HEAD // 1024 - 1):
        connection.data_received(b"x" * 1024)
    assert not wire.is_closed
    connection.data_received(b"x" * 1024)
    assert wire.is_ended and wire.sent.startswith(b"HTTP/1.1 400 ")
    connection.connection_lost(None)


async def test_a_long_body_is_no_head() -> None:
    connection, wire = connected()
    connection.data_received(HEAD.replace(b"4", b"%d" % (4 * _LONGEST_HEAD)))
    for _ in range(4):
        connection.data_received(bytes(_LONGEST_HEAD))
    await until(lambda: b"HTTP/1.1 200" in wire.sent)
    assert not wire.is_closed
    connection.connection_lost(None)


@pytest.mark.parametrize("pieces", [1, 2, 3])
async def test_the_end_of_a_long_body_is_no_head_however_much_comes_at_once(pieces: int) -> None:
    connection, wire = connected()
    stream = HEAD.replace(b"4", b"%d" % (9 * _LONGEST_HEAD)) + bytes(9 * _LONGEST_HEAD)
    size = -(-len(stream) // pieces)
    for start in range(0, len(stream), size):
        connection.data_received(stream[start : start + size])
    await until(lambda: b"HTTP/1.1 200" in wire.sent)
    assert not wire.is_closed
    connection.connection_lost(None)
