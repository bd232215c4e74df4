"""Clients that mean ill: a request inside a body stays there, and nobody fills the log."""

from __future__ import annotations

import httpx
import pytest

from tests.e2e.clients import connect, png
from tests.e2e.service import Service

pytestmark = pytest.mark.slow

CHANGE = b'PATCH /v1/config HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"r": 77}'


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /classify?top_k=1 HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode()


@pytest.mark.parametrize(
    "headers",
    [
        ("Connection: Upgrade", "Upgrade: foo"),
        ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),  # as Java's does
        ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
    ],
)
def test_what_comes_behind_an_upgrade_is_a_body(shared_service: Service, headers: tuple[str, ...]) -> None:
    before = httpx.get(f"{shared_service.url}/v1/config").json()
    for body, status in ((png(100), b"200"), (CHANGE, b"415")):
        with connect(shared_service) as client:
            client.sendall(post(body, *headers))
            client.sendall(body + post(b"", "Connection: close"))
            received = b""
            while data := client.recv(1 << 16):
                received += data
        assert received.startswith(b"HTTP/1.1 " + status)
        assert received.count(b"HTTP/1.1 ") == 2  # and the one to close
    assert httpx.get(f"{shared_service.url}/v1/config").json() == before


def test_clients_that_leave_while_a_file_is_sent_leave_nothing_in_the_log(shared_service: Service) -> None:
    said = len(shared_service.log)
    for path in ("/", "/static/app.js", "/static/samples/lighthouse.jpg"):
        for headers in ("Content-Length: 5", "Content-Length: 5\r\nRange: bytes=0-100"):
            client = connect(shared_service)
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n".encode())
            client.recv(10)
            client.close()
    assert httpx.get(f"{shared_service.url}/livez").status_code == 200
    assert [line for line in shared_service.log[said:] if " GET /" not in line] == []  # beside their own lines
