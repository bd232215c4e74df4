"""The rules of RFC 9112 on the end of a request that the parser (llhttp) does not enforce."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

_HOST = re.compile(rb"[^\s/?#@\\<>\"]*")


def refusal(message: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The complete answer to a request that cannot be parsed: status 400, and the connection closes.

    Args:
        message: The fault.
        headers: The headers of every answer of this server.
    """
    body = json.dumps({"error": {"code": "bad_request", "message": message, "details": {}}}).encode()
    lines = [b"HTTP/1.1 400 Bad Request"]
    lines += [name + b": " + value for name, value in headers if name != b"connection"]
    lines += [b"content-type: application/json", b"content-length: %d" % len(body), b"connection: close"]
    return b"\r\n".join([*lines, b"", body])


def fault_of(method: bytes, version: str, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The reason to refuse a request with this head; None for a valid one.

    Args:
        method: Its method.
        version: Its HTTP version, such as "1.1".
        headers: Its headers, with names in lower case.
    """
    hosts = 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
            if _HOST.fullmatch(value) is None:
                return "the Host header is not a valid host"
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":
                return "the only Transfer-Encoding that this server knows is chunked"
            if version == "1.0":
                return "HTTP/1.0 has no Transfer-Encoding"
    if version not in ("1.0", "1.1"):
        return "this server speaks HTTP/1.1 and HTTP/1.0"
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return f"the request has {hosts or 'no'} Host header{'s' * (hosts > 1)}; it must have one"
    if method == b"CONNECT":
        return "this server is not a proxy; it does not support CONNECT"
    return None


def without_upgrade(method: bytes, target: bytes, version: str, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A parsed head without the request to upgrade to another protocol.

    After such a request the parser treats the following bytes as the other protocol. A server that does not speak that
    protocol must read a body there (RFC 9110, 7.8).

    Args:
        method: Its method.
        target: Its target.
        version: Its HTTP version.
        headers: Its headers, with names in lower case.
    """
    lines = [b"%s %s HTTP/%s" % (method, target, version.encode())]
    lines += [name + b": " + value for name, value in headers if name != b"upgrade"]
    return b"\r\n".join([*lines, b"", b""])
