"""Where requests end, by every rule of RFC 9112: how many answers there are, and that no body is read as a request."""

from __future__ import annotations

import asyncio
import random
from typing import NamedTuple

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from server.api.connection import Connection
from tests.server.listening import Listening, Recorder, all_of, statuses
from tests.server.test_connection import Wire

HOST = b"Host: x\r\n"
SMUGGLED = b'PATCH /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n{"r": 7}'
END = b"GET /end HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
GOOD = b"GET /good HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def post(headers: bytes, body: bytes = b"", version: bytes = b"1.1", host: bytes = HOST) -> bytes:
    return b"POST /post HTTP/" + version + b"\r\n" + host + headers + b"\r\n" + body


def length(value: bytes) -> bytes:
    return b"Content-Length: " + value + b"\r\n"


def upgrade(to: bytes, listed: bytes = b"Upgrade") -> bytes:
    return b"Connection: " + listed + b"\r\nUpgrade: " + to + b"\r\n"


class Kept(NamedTuple):
    """A stream of requests that are all answered with 200, and what they are."""

    stream: bytes
    done: list[str]


INSIDE = length(b"%d" % len(SMUGGLED))
IN_CHUNKS = b"%x\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\n\r\n"
READ = f"POST /post {SMUGGLED.decode()}"
KEPT = {
    "a length": Kept(post(length(b"2"), b"hi"), ["POST /post hi"]),
    "chunks": Kept(post(CHUNKED, b"2\r\nhi\r\n0\r\n\r\n"), ["POST /post hi"]),
    "chunks, said in capitals": Kept(post(b"TRANSFER-ENCODING: Chunked\r\n", b"0\r\n\r\n"), ["POST /post"]),
    "a chunk size in hexadecimal": Kept(post(CHUNKED, b"0A\r\n0123456789\r\n000\r\n\r\n"), ["POST /post 0123456789"]),
    "chunk extensions": Kept(post(CHUNKED, b'2;a=b;c="d"\r\nhi\r\n0;e\r\n\r\n'), ["POST /post hi"]),
    "trailers": Kept(post(CHUNKED, b"2\r\nhi\r\n0\r\nX-Key: y\r\n\r\n"), ["POST /post hi"]),
    "no body": Kept(post(b""), ["POST /post"]),
    "a GET with a body": Kept(
        GOOD.replace(b"\r\n\r\n", b"\r\n" + INSIDE + b"\r\n") + SMUGGLED, [READ.replace("POST /post", "GET /good")]
    ),
    "a request as a body": Kept(post(INSIDE, SMUGGLED), [READ]),
    "empty lines before a request": Kept(b"\r\n\r\n" + GOOD, ["GET /good"]),
    "an absolute target": Kept(GOOD.replace(b" /good", b" http://y/good"), ["GET /good"]),
    "three at once": Kept(GOOD + post(length(b"2"), b"hi") + GOOD, ["GET /good", "POST /post hi", "GET /good"]),
    "an upgrade with a length": Kept(post(upgrade(b"foo") + INSIDE, SMUGGLED), [READ]),
    "an upgrade after the length": Kept(post(INSIDE + upgrade(b"h2c", b"Upgrade, HTTP2-Settings"), SMUGGLED), [READ]),
    "an upgrade with chunks": Kept(post(upgrade(b"websocket") + CHUNKED, IN_CHUNKS), [READ]),
    "an upgrade without a body": Kept(post(upgrade(b"TLS/1.0, HTTP/1.1")) + GOOD, ["POST /post", "GET /good"]),
    "two upgrades": Kept(post(upgrade(b"a") + b"Upgrade: b\r\n" + INSIDE, SMUGGLED) * 2, [READ] * 2),
    "an upgrade in small letters": Kept(post(b"connection: upgrade\r\nupgrade: h2c\r\n" + INSIDE, SMUGGLED), [READ]),
    "an upgrade that Connection does not name": Kept(post(b"Upgrade: h2c\r\n" + INSIDE, SMUGGLED), [READ]),
}

REFUSED = {
    "two equal lengths": post(length(b"5") * 2, b"hello"),
    "two lengths": post(length(b"5") + length(b"0"), b"hello"),
    "two lengths in one line": post(length(b"5, 5"), b"hello"),
    "a length with a sign": post(length(b"+5"), b"hello"),
    "a negative length": post(length(b"-5")),
    "a length in hexadecimal": post(length(b"0x5"), b"hello"),
    "a length with an underscore": post(length(b"1_0"), b"0123456789"),
    "a length that no integer holds": post(length(b"9" * 30), b"hello"),
    "an empty length": post(length(b"")),
    "a length and chunks": post(length(b"5") + CHUNKED, b"0\r\n\r\n"),
    "chunks and a length": post(CHUNKED + length(b"5"), b"0\r\n\r\n"),
    "an upgrade with a length and chunks": post(upgrade(b"foo") + length(b"5") + CHUNKED, b"0\r\n\r\n"),
    "chunked, but not last": post(b"Transfer-Encoding: chunked, identity\r\n", b"0\r\n\r\n"),
    "chunked twice": post(CHUNKED * 2, b"0\r\n\r\n"),
    "chunked and then another": post(CHUNKED + b"Transfer-Encoding: identity\r\n", b"0\r\n\r\n"),
    "another and then chunked": post(b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"),
    "another transfer coding": post(b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n"),
    "chunked and a vertical tab": post(b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n"),
    "chunks in HTTP/1.0": post(CHUNKED, b"0\r\n\r\n", version=b"1.0"),
    "bare LFs": GOOD.replace(b"\r\n", b"\n"),
    "bare CRs": GOOD.replace(b"\r\n", b"\r"),
    "a bare LF in a header": post(b"X: a\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    "a bare CR in a header": post(b"X: a\rContent-Length: 5\r\n", b"hello"),
    "a bare LF after a chunk size": post(CHUNKED, b"2\nhi\r\n0\r\n\r\n"),
    "a bare LF after an extension": post(CHUNKED, b"2;\nhi\r\n0\r\n\r\n"),
    "a bare LF after a chunk": post(CHUNKED, b"2\r\nhi\n0\r\n\r\n"),
    "a folded line": post(b"X: a\r\n b\r\n"),
    "a space before the first header": b"GET /good HTTP/1.1\r\n Host: x\r\n\r\n",
    "a space before a colon": post(b"Content-Length : 5\r\n", b"hello"),
    "a NUL in a header": post(b"X: a\0b\r\n"),
    "a NUL in the target": GOOD.replace(b"good", b"go\0od"),
    "a space in the target": GOOD.replace(b"good", b"go od"),
    "a target that is none": GOOD.replace(b"/good", b"good"),
    "a target of bytes beyond ASCII": GOOD.replace(b"good", b"\xc3\xa4"),
    "no chunk size": post(CHUNKED, b"\r\nhi\r\n0\r\n\r\n"),
    "a chunk size with a sign": post(CHUNKED, b"+2\r\nhi\r\n0\r\n\r\n"),
    "a negative chunk size": post(CHUNKED, b"-2\r\nhi\r\n0\r\n\r\n"),
    "a chunk size with 0x": post(CHUNKED, b"0x2\r\nhi\r\n0\r\n\r\n"),
    "a space after a chunk size": post(CHUNKED, b"2 \r\nhi\r\n0\r\n\r\n"),
    "a chunk size that no integer holds": post(CHUNKED, b"f" * 17 + b"\r\nhi\r\n0\r\n\r\n"),
    "a chunk that is longer than said": post(CHUNKED, b"2\r\nhello\r\n0\r\n\r\n"),
    "a length among the trailers": post(CHUNKED, b"0\r\nContent-Length: 5\r\n\r\n"),
    "HTTP/0.9": b"GET /good\r\n\r\n",
    "HTTP/1.2": GOOD.replace(b"1.1", b"1.2"),
    "HTTP/2.0": GOOD.replace(b"1.1", b"2.0"),
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "a method in small letters": GOOD.replace(b"GET", b"get"),
    "an unknown method": GOOD.replace(b"GET", b"FOO"),
    "CONNECT": GOOD.replace(b"GET /good", b"CONNECT y:443"),
    "CONNECT with a path": GOOD.replace(b"GET", b"CONNECT"),
    "no host": GOOD.replace(HOST, b""),
    "no host, with an upgrade": post(upgrade(b"foo"), host=b""),
    "two hosts": post(HOST),
    "two equal hosts in HTTP/1.0": post(HOST, version=b"1.0"),
    "a host with a path": GOOD.replace(HOST, b"Host: x/y\r\n"),
}

ONCE = {
    "HTTP/1.0": GOOD.replace(b"1.1", b"1.0"),
    "HTTP/1.0 without a host": GOOD.replace(b"1.1", b"1.0").replace(HOST, b""),
    "HTTP/1.0 that would be kept": GOOD.replace(b"1.1", b"1.0").replace(
        b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n"
    ),
    "a request to close": GOOD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
    "a request to close or upgrade": GOOD.replace(b"\r\n\r\n", b"\r\nUpgrade: a\r\nConnection: close, upgrade\r\n\r\n"),
}
"""Answered, and the connection is closed: nothing behind it is executed."""


@pytest.mark.parametrize("name", KEPT)
def test_good_requests_are_answered_one_by_one(listening: Listening, recorder: Recorder, name: str) -> None:
    stream, done = KEPT[name]
    with listening.connect() as client:
        client.sendall(stream + END)
        assert statuses(all_of(client)) == [200] * (len(done) + 1)
    assert recorder.done == [*done, "GET /end"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_ambiguous_is_refused_and_nothing_behind_it_is_executed(
    listening: Listening, recorder: Recorder, name: str
) -> None:
    with listening.connect() as client:
        client.sendall(REFUSED[name] + SMUGGLED)
        received = all_of(client)
    assert statuses(received) == [400]
    assert b"connection: close" in received and b'"bad_request"' in received
    assert recorder.done == [] and "/smuggled" not in recorder.called


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_waits_for_its_turn(listening: Listening, recorder: Recorder, name: str) -> None:
    with listening.connect() as client:
        client.sendall(GOOD * 3 + REFUSED[name] + SMUGGLED)
        assert statuses(all_of(client)) == [200, 200, 200, 400]
    assert recorder.done == ["GET /good"] * 3 and "/smuggled" not in recorder.called


@pytest.mark.parametrize("name", ONCE)
def test_who_wants_one_answer_gets_one(listening: Listening, recorder: Recorder, name: str) -> None:
    with listening.connect() as client:
        client.sendall(ONCE[name] + SMUGGLED)
        assert statuses(all_of(client)) == [200]
    assert recorder.done == ["GET /good"] and "/smuggled" not in recorder.called


def test_an_upgrade_in_two_packets_is_one_request(listening: Listening, recorder: Recorder) -> None:
    head = post(upgrade(b"foo") + INSIDE)
    with listening.connect() as client:
        client.sendall(head)
        listening.until(lambda: "/post" in recorder.called)
        client.sendall(SMUGGLED + END)
        assert statuses(all_of(client)) == [200, 200]
    assert recorder.done == [READ, "GET /end"]


def test_an_answer_before_the_end_of_the_body_closes_the_connection(listening: Listening, recorder: Recorder) -> None:
    with listening.connect() as client:
        client.sendall(post(length(b"1000000")).replace(b"/post", b"/early"))
        head = client.recv(1 << 16)
        assert statuses(head) == [404] and b"connection: close" in head
        client.sendall(bytes(1_000_000) + SMUGGLED)  # all is read away: no reset takes the answer with it
        assert statuses(all_of(client)) == []
    assert recorder.called == ["/early"]


def test_a_body_that_is_broken_after_its_answer_gets_no_second_one(listening: Listening, recorder: Recorder) -> None:
    with listening.connect() as client:
        client.sendall(post(CHUNKED).replace(b"/post", b"/early"))
        assert statuses(client.recv(1 << 16)) == [404]
        client.sendall(b"no chunk" + SMUGGLED)
        assert statuses(all_of(client)) == []
    assert recorder.called == ["/early"]


def test_an_expectation_is_met_once_and_not_in_http_1_0(listening: Listening, recorder: Recorder) -> None:
    expecting = length(b"2") + b"Expect: 100-continue\r\n"
    with listening.connect() as client:
        client.sendall(post(expecting))
        assert client.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"hi" + END)
        assert statuses(all_of(client)) == [200, 200]
    with listening.connect() as client:
        client.sendall(post(expecting, b"hi", version=b"1.0"))
        assert statuses(all_of(client)) == [200]
    with listening.connect() as client:
        client.sendall(post(expecting).replace(b"/post", b"/early"))
        assert statuses(all_of(client)) == [404]


STREAMS = [kept.stream for kept in KEPT.values()] + list(REFUSED.values()) + list(ONCE.values())


async def _answers(pieces: list[bytes]) -> tuple[list[int], list[str]]:
    recorder = Recorder()
    config = uvicorn.Config(recorder, timeout_keep_alive=1000, log_config=None, access_log=False, ws="none")
    connection, wire = Connection(config, ServerState(), {}), Wire()
    connection.connection_made(wire)
    for piece in pieces:
        if not wire.is_closed:
            connection.data_received(piece)
            await asyncio.sleep(0)
    while connection.tasks:
        await asyncio.sleep(0)
        if connection._is_in_body:  # for the rest of it the application waits
            break
    connection.connection_lost(None)
    while connection.tasks:
        await asyncio.sleep(0)
    return statuses(wire.sent), recorder.done


@given(st.lists(st.sampled_from(STREAMS), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_however_a_stream_is_cut_the_answers_are_the_same(requests: list[bytes], source: random.Random) -> None:
    stream = b"".join([*requests, SMUGGLED])
    cuts = sorted(source.randrange(len(stream)) for _ in range(source.choice([1, 3, 10, len(stream)])))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert asyncio.run(_answers(pieces)) == asyncio.run(_answers([stream]))


@pytest.mark.parametrize("num_before", range(5))
@pytest.mark.parametrize("name", REFUSED)
def test_all_requests_before_a_refused_one_are_answered(name: str, num_before: int) -> None:
    stream = post(length(b"2"), b"hi") * num_before + REFUSED[name] + SMUGGLED
    answers, done = asyncio.run(_answers([stream]))
    assert answers[:num_before] == [200] * num_before and len(answers) == num_before + 1
    assert done[:num_before] == ["POST /post hi"] * num_before
