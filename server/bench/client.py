"""An HTTP client that costs little: one POST after the other over connections that are kept, in plain HTTP/1.1."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server listens.

    Attributes:
        prefix: Path before that of an endpoint; without a slash at its end.
    """

    host: str
    port: int
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Self:
        """Reads `http://HOST[:PORT][/PREFIX]`.

        Raises:
            ValueError: It is none of these.
        """
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http":
            raise ValueError(f"{url!r} starts with {parts.scheme}://; only http:// can be measured, not TLS before it")
        if not parts.hostname or parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f"{url!r} must read http://HOST[:PORT][/PREFIX]")
        return cls(parts.hostname, 80 if parts.port is None else parts.port, parts.path.rstrip("/"))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.prefix}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said; names of headers in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class BrokenError(Exception):
    """There is no answer: nobody listens, the connection broke, time is up, or what came is not HTTP."""


class Client:
    """Connections to one server. As many are open as requests were in flight at once, and all are kept.

    Args:
        target: The server.
        timeout_s: Longest that a request may take.
        headers: Sent with every request; bodies are taken for bytes where they say nothing else.
    """

    def __init__(self, target: Target, timeout_s: float = 60.0, headers: Mapping[str, str] | None = None) -> None:
        self._target, self._timeout_s = target, timeout_s
        host = str(target).removeprefix("http://").removesuffix(target.prefix)
        said = {"host": host, "content-type": "application/octet-stream"} | dict(headers or {})
        self._lines = [f"{name}: {value}" for name, value in said.items()]
        self._kept: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes) -> Answer:
        """Sends a body and reads the whole answer.

        Raises:
            BrokenError: No answer came.
        """
        lines = [f"POST {self._target.prefix}{path} HTTP/1.1", *self._lines, f"content-length: {len(body)}", "", ""]
        request = "\r\n".join(lines).encode() + body
        try:
            async with asyncio.timeout(self._timeout_s):
                while self._kept:
                    connection = self._kept.pop()
                    try:
                        return await self._exchange(*connection, request)
                    except (ConnectionError, asyncio.IncompleteReadError) as error:
                        # A server may close a kept connection at any time; where it has said nothing, ask again.
                        if getattr(error, "partial", b""):
                            raise
                connection = await asyncio.open_connection(self._target.host, self._target.port)
                return await self._exchange(*connection, request)
        except TimeoutError:
            raise BrokenError(f"no answer in {self._timeout_s:g} s") from None
        except asyncio.IncompleteReadError:
            raise BrokenError("the connection ended before the answer did") from None
        except OSError as error:
            raise BrokenError(error.strerror or str(error)) from None
        except (ValueError, IndexError, asyncio.LimitOverrunError):
            raise BrokenError("what came is not HTTP") from None

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Answer:
        keep = False
        try:
            writer.write(request)  # and read at once: a refusal may come before all of the body has left
            answer, keep = await _read(reader)
        finally:
            if keep:
                self._kept.append((reader, writer))
            else:
                writer.close()
        return answer

    async def close(self) -> None:
        """Closes the connections that are kept."""
        for _, writer in self._kept:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in self._kept), return_exceptions=True)
        self._kept.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


async def _read(reader: asyncio.StreamReader) -> tuple[Answer, bool]:
    """An answer, and whether the connection can be kept."""
    status = 100
    while status < 200:  # 1xx announce another one
        start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, code = start.split(maxsplit=2)[:2]
        if not version.startswith("HTTP/"):
            raise ValueError(start)
        status = int(code)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    if status in (204, 304):
        body = b""
    elif headers.get("transfer-encoding", "").lower() == "chunked":
        body = await _read_chunks(reader)
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body, keep = await reader.read(), False
    return Answer(status, headers, body), keep


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    chunks = []
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        chunks.append((await reader.readexactly(size + 2))[:-2])
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass  # trailers
    return b"".join(chunks)
