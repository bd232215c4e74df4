"""A client's connection by itself: what is held of a head, and for how long something is awaited."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from server.api.connection import _LONGEST_HEAD, Connection
from tests.server.conftest import until

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n"


class Wire(asyncio.Transport):
    """A transport that keeps what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.is_closed = b"", False

    def write(self, data: Any) -> None:
        self.sent += data

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def connected(patience_s: int = 1000) -> tuple[Connection, Wire]:
    config = uvicorn.Config(echo, timeout_keep_alive=patience_s, log_config=None, access_log=False)
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
    number = _LONGEST_HEAD // len(HEAD) + 10
    for _ in range(number):
        for byte in range(0, len(HEAD) + 4, 16):
            connection.data_received((HEAD + b"body")[byte : byte + 16])
    await until(lambda: wire.sent.count(b"HTTP/1.1 200") == number)
    assert not wire.is_closed
    connection.connection_lost(None)


async def test_a_head_that_goes_on_is_refused() -> None:
    connection, wire = connected()
    connection.data_received(b"POST / HTTP/1.1\r\nx-long: ")
    for _ in range(_LONGEST_HEAD // 1024 - 1):
        connection.data_received(b"x" * 1024)
    assert not wire.is_closed
    connection.data_received(b"x" * 1024)
    assert wire.is_closed and wire.sent.startswith(b"HTTP/1.1 400 ")
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
