"""Where a request ends: what RFC 9112 rules about that, and the parser (llhttp) does not hold."""

from __future__ import annotations

import http
import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_HOST = re.compile(rb"[^\s/?#@\\<>\"]*")


class Fault(NamedTuple):
    """Why a request is not answered by the application.

    Attributes:
        status: Of the answer.
        message: What is wrong.
    """

    status: int
    message: str

    def answer(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The whole answer, which ends its connection.

        Args:
            headers: Those that every answer of this server has.
        """
        code = http.HTTPStatus(self.status).name.lower()
        body = json.dumps({"error": {"code": code, "message": self.message, "details": {}}}).encode()
        lines = [b"HTTP/1.1 %d %s" % (self.status, http.HTTPStatus(self.status).phrase.encode())]
        lines += [name + b": " + value for name, value in headers if name != b"connection"]
        lines += [b"content-type: application/json", b"content-length: %d" % len(body), b"connection: close"]
        return b"\r\n".join([*lines, b"", body])


def fault_of(method: bytes, version: str, headers: Iterable[tuple[bytes, bytes]]) -> Fault | None:
    """What forbids to answer a request of such a head; None for a good one.

    Args:
        method: Its method.
        version: Its version of HTTP, as "1.1".
        headers: Its headers, with names in lower case.
    """
    hosts = 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
            if _HOST.fullmatch(value) is None:
                return Fault(400, "the Host header holds what is no host")
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":
                return Fault(501, "the only Transfer-Encoding that this server knows is chunked")
            if version == "1.0":
                return Fault(400, "HTTP/1.0 has no Transfer-Encoding")
    if version not in ("1.0", "1.1"):
        return Fault(505, "this server speaks HTTP/1.1 and HTTP/1.0")
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return Fault(400, f"the request has {hosts} Host headers; it must have one")
    if method == b"CONNECT":
        return Fault(501, "this server is no proxy: it does not know CONNECT")
    return None


def without_upgrade(method: bytes, target: bytes, version: str, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A head as the parser has read it, without the wish to go on in another protocol.

    The parser takes what follows such a wish for the other protocol. A server that does not speak it must read a body
    there (RFC 9110, 7.8).

    Args:
        method: Its method.
        target: What is asked for.
        version: Its version of HTTP.
        headers: Its headers, with names in lower case.
    """
    lines = [b"%s %s HTTP/%s" % (method, target, version.encode())]
    lines += [name + b": " + value for name, value in headers if name != b"upgrade"]
    return b"\r\n".join([*lines, b"", b""])
