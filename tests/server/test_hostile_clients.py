"""Whatever clients send, and whenever they leave: no traceback in the log, and the next one is served."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
from base64 import b64encode
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.app import create_app
from server.settings import Settings
from tests.server.conftest import FakeDevice, grey_png, local_engine
from tests.server.listening import Listening, all_of, statuses

RESET = bytes([1, 0, 0, 0, 0, 0, 0, 0])
"""SO_LINGER: closing resets the connection at once."""

FORM = (
    b'--B\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    + grey_png()
    + b'\r\n--B\r\nContent-Disposition: form-data; name="r"\r\n\r\n8\r\n--B--\r\n'
)
JSON = json.dumps({"images": [b64encode(grey_png()).decode()], "r": 4}).encode()


def request(line: bytes, headers: bytes = b"", body: bytes = b"") -> bytes:
    announced = b"Content-Length: %d\r\n" % len(body) if body else b""
    return line + b" HTTP/1.1\r\nHost: x\r\n" + headers + announced + b"\r\n" + body


REQUESTS = {
    "a page": request(b"GET /", body=b"hello"),
    "a file": request(b"GET /static/samples/lighthouse.jpg", body=b"hello"),
    "a range": request(b"GET /static/samples/lighthouse.jpg", b"Range: bytes=0-100\r\n", b"hello"),
    "ranges": request(b"GET /static/app.js", b"Range: bytes=0-100,200-300\r\n", b"hello"),
    "a file's head": request(b"HEAD /static/app.js", body=b"hello"),
    "a file without a body": request(b"GET /static/samples/lighthouse.jpg"),
    "health": request(b"GET /livez", body=b"hello"),
    "metrics": request(b"GET /metrics", body=b"hello"),
    "docs": request(b"GET /docs", body=b"hello"),
    "models": request(b"GET /v1/models/tiny", body=b"hello"),
    "nothing": request(b"DELETE /nothing", body=b"hello"),
    "a change": request(b"PATCH /v1/models/tiny", b"Content-Type: application/json\r\n", b'{"r": 0}'),
    "a form": request(b"POST /classify", b"Content-Type: multipart/form-data; boundary=B\r\n", FORM),
    "an image": request(b"POST /classify?r=8", b"Content-Type: image/png\r\n", grey_png()),
    "JSON": request(b"POST /v1/classify", b"Content-Type: application/json\r\n", JSON),
    "explain": request(b"POST /v1/explain", b"Content-Type: multipart/form-data; boundary=B\r\n", FORM),
    "chunks": request(b"POST /classify", b"Transfer-Encoding: chunked\r\nContent-Type: image/png\r\n")
    + b"5\r\nhello\r\n0\r\n\r\n",
    "an expectation": request(
        b"POST /classify", b"Expect: 100-continue\r\nContent-Type: image/png\r\n", grey_png()
    ),
    "too much": request(
        b"POST /classify", b"Content-Type: image/png\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def service() -> Iterator[Listening]:
    """The application around a fake device, on a real socket."""
    engine = local_engine(FakeDevice())
    with Listening(create_app(Settings.model_validate({"state_dir": None}), engine)) as server:
        server.call(engine.start)
        yield server
        server.run(engine.close())


@pytest.fixture
def tracebacks(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What was logged with a traceback."""
    found: list[str] = []

    class Finder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info is not None or record.levelno >= logging.ERROR:
                found.append(logging.Formatter().format(record))

    finder = Finder()
    logging.getLogger().addHandler(finder)
    yield found
    logging.getLogger().removeHandler(finder)


def leave(client: socket.socket, how: str) -> None:
    """Lets a client leave."""
    if how == "waits":
        client.shutdown(socket.SHUT_WR)
        client.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            while client.recv(1 << 16):
                pass
    if how == "resets":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()


def assert_serves(service: Listening) -> None:
    with service.connect() as client:
        client.sendall(request(b"POST /classify", b"Connection: close\r\nContent-Type: image/png\r\n", grey_png()))
        assert statuses(all_of(client)) == [200]


@pytest.mark.parametrize("how", ["closes", "resets", "waits"])
@pytest.mark.parametrize("name", REQUESTS)
def test_who_leaves_makes_no_traceback(service: Listening, tracebacks: list[str], name: str, how: str) -> None:
    sent = REQUESTS[name]
    head, _, body = sent.partition(b"\r\n\r\n")
    for part in (head, head + b"\r\n\r\n", head + b"\r\n\r\n" + body[:3], sent[:-1], sent):
        client = service.connect()
        client.sendall(part)
        if how == "resets":
            service.until(lambda: bool(service.connections))
        leave(client, how)
    service.until(lambda: service.is_idle)
    assert tracebacks == []
    assert_serves(service)


def test_a_body_that_is_too_large_is_not_asked_for(service: Listening) -> None:
    with service.connect() as client:
        client.sendall(REQUESTS["too much"])
        assert statuses(all_of(client)) == [413]


PIECES = [
    b"\r\n", b"\n", b"\0", b":", b",", b'"', b" ", b"\t", b"%00", b"%ff", b"\xff\xfe", b"-1", b"9" * 20, b"{", b"[",
    b"A" * 5000, b"HTTP/1.0", b"chunked", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n",
    b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: x\r\n", b"Expect: 100-continue\r\n", b"boundary=",
    b"--B", b"name=\"image\"; filename*=UTF-8''%ff", b"charset=utf-16", b"Content-Type: application/json\r\n",
    b"Range: bytes=-1\r\n", b"Content-Encoding: gzip\r\n", b"Host: y\r\n", b"X-Request-Id: \xff\r\n",
]  # fmt: skip


def mutated(source: random.Random) -> bytes:
    """One or two requests, spoilt in some places."""
    stream = bytearray(b"".join(source.choices(list(REQUESTS.values()), k=source.choice([1, 1, 2]))))
    for _ in range(source.choice([1, 1, 2, 3, 6, 12])):
        place = source.randrange(len(stream) + 1)
        change = source.randrange(4)
        if change == 0 and place < len(stream):
            stream[place] = source.randrange(256)
        elif change == 1:
            stream[place:place] = source.choice(PIECES)
        elif change == 2:
            del stream[place : place + source.choice([1, 2, 10, 100])]
        else:
            stream[place:place] = stream[max(0, place - source.randrange(50)) : place]
    return bytes(stream)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.randoms(use_true_random=False), how=st.sampled_from(["closes", "resets", "waits"]))
def test_no_bytes_make_a_traceback(service: Listening, tracebacks: list[str], source: random.Random, how: str) -> None:
    stream = mutated(source)
    with service.connect() as client:
        with contextlib.suppress(ConnectionError):  # it has heard enough
            client.sendall(stream)
            leave(client, how)
    service.until(lambda: service.is_idle)
    assert tracebacks == [], stream
