"""Clients that stall: nobody waits for them for long, and good ones are answered meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.e2e.clients import classify, connect, head, png
from tests.e2e.service import Service

pytestmark = pytest.mark.slow

LIMIT_S = 2


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that waits two seconds for its clients; at the end it stops with some of them connected."""
    service = Service("--client-timeout-s", str(LIMIT_S), state_dir=tmp_path_factory.mktemp("state"))
    service.wait_until_ready()
    yield service
    stalled = [connect(service) for _ in range(3)]
    for client, sent in zip(stalled, (b"", b"POST /cl", head(1000) + b"half"), strict=True):
        client.sendall(sent)
    assert service.stop() == 0
    for client in stalled:
        client.close()


def answer_to(client: socket.socket) -> bytes:
    """All that the service sends until it hangs up; the test fails when it never does."""
    received = b""
    try:
        while data := client.recv(1 << 16):
            received += data
    except ConnectionResetError:
        pass  # it hung up with bytes of ours unread
    return received


STALLED = {
    "nothing": b"",
    "half a head": b"POST /classify HTTP/1.1\r\nhost: loc",
    "half a body": head(1000) + b"half",
    "half a form": (
        b"POST /classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=x\r\n"
        b'content-length: 500\r\n\r\n--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\nhal'
    ),
    "half a chunk": head(9).replace(b"content-length: 9", b"transfer-encoding: chunked") + b"64\r\nhalf",
    "a second request": b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\nGET /li",
    "the rest of a refused body": head(1000, "/nothing") + b"half",
}


def drip(client: socket.socket, until: threading.Event) -> None:
    """Sends a byte now and then, for as long as the service listens."""
    try:
        while not until.wait(0.05):
            client.sendall(b"x")
    except OSError:
        pass  # it hung up


@pytest.mark.parametrize("dripping", [False, True], ids=["silent", "dripping"])
def test_who_stalls_is_hung_up_on_and_holds_nobody_up(impatient: Service, dripping: bool) -> None:
    clients = {name: connect(impatient) for name in STALLED}
    told = threading.Event()
    drips = [threading.Thread(target=drip, args=(client, told)) for client in clients.values() if dripping]
    try:
        for name, client in clients.items():
            client.sendall(STALLED[name])
        for each in drips:
            each.start()
        assert classify(impatient, png(100)).status_code == 200
        answers = {name: answer_to(client) for name, client in clients.items()}
    finally:
        told.set()
        for each in drips:
            each.join()
        for client in clients.values():
            client.close()
    for name in ("half a body", "half a form", "half a chunk"):
        if not (name == "half a chunk" and dripping):  # then its drips are no chunks
            assert answers[name].startswith(b"HTTP/1.1 408 ") and b'"too_slow"' in answers[name], name
            assert b"connection: close" in answers[name]
    assert answers["a second request"].startswith(b"HTTP/1.1 200 ")
    assert answers["the rest of a refused body"].startswith(b"HTTP/1.1 404 ")
    if not dripping:
        assert answers["nothing"] == answers["half a head"] == b""
    assert impatient.metrics()["tome_in_flight_images"] == 0


def test_a_head_of_any_length_is_not_held(impatient: Service) -> None:
    with connect(impatient) as client:
        client.sendall(b"POST /classify HTTP/1.1\r\nhost: localhost\r\nx-long: ")
        with contextlib.suppress(ConnectionError):  # it hung up with bytes of ours under way
            for _ in range(1000):
                client.sendall(bytes(b"x" * 1024))
        assert answer_to(client)[:12] in (b"HTTP/1.1 400", b"")  # a reset may overtake the answer
    assert classify(impatient, png(100)).status_code == 200
