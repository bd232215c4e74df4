"""A cheap HTTP client: one POST after the other over kept connections, in plain HTTP/1.1.

It often shares its cores with the server that it measures, so it has no streams: a request is two byte strings, and an
answer is parsed where it arrives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, cast
from urllib.parse import urlsplit

from server.bench.answer import HttpAnswer as HttpAnswer
from server.bench.answer import read


@dataclass(frozen=True, slots=True)
class Target:
    """The address of a server.

    Attributes:
        prefix: Path before an endpoint's, without a slash at its end.
    """

    host: str
    port: int
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parses `http://HOST[:PORT][/PREFIX]`.

        Raises:
            ValueError: It has another form.
        """
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http":
            raise ValueError(f"{url!r} starts with {parts.scheme}://; only http:// can be measured, without TLS")
        if not parts.hostname or parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f"{url!r} must have the form http://HOST[:PORT][/PREFIX]")
        return cls(parts.hostname, 80 if parts.port is None else parts.port, parts.path.rstrip("/"))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.prefix}"


class BrokenError(Exception):
    """There is no answer: nobody listens, the connection broke, the time is over, or the bytes are not HTTP."""


class _SilentError(BrokenError):
    """The connection was closed before anything was sent on it."""


class Connections:
    """Connections to one server: as many as requests were in flight at once, and all are kept.

    Args:
        target: The server.
        timeout_s: Longest time for a request.
        headers: Headers of every request. The default content type is that of bytes.
    """

    def __init__(self, target: Target, timeout_s: float = 60.0, headers: Mapping[str, str] | None = None) -> None:
        self._target, self._timeout_s = target, timeout_s
        host = str(target).removeprefix("http://").removesuffix(target.prefix)
        said = {"host": host, "content-type": "application/octet-stream"} | dict(headers or {})
        self._lines = [f"{name}: {value}" for name, value in said.items()]
        self._heads: dict[str, bytes] = {}
        self._kept: list[_Connection] = []

    async def post(self, path: str, body: bytes) -> HttpAnswer:
        """Sends a body and reads the whole answer.

        Raises:
            BrokenError: No answer came.
        """
        head = b"%b%d\r\n\r\n" % (self._heads.get(path) or self._head(path), len(body))
        while self._kept:
            connection = self._kept.pop()
            try:
                return await self._exchange(connection, head, body)
            except _SilentError:
                continue  # A server may close a kept connection at any time. If it has sent nothing, try another.
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(await self._connect(), head, body)
        except TimeoutError:
            raise BrokenError(_silent_for(self._timeout_s)) from None
        except OSError as error:
            raise BrokenError(error.strerror or str(error)) from None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._target.host, self._target.port)
        return connection

    async def _exchange(self, connection: _Connection, head: bytes, body: bytes) -> HttpAnswer:
        try:
            answer = await connection.ask(head, body, self._timeout_s)
        except BaseException:
            connection.close()
            raise
        if connection.is_kept:
            self._kept.append(connection)
        else:
            connection.close()
        return answer

    def _head(self, path: str) -> bytes:
        """Everything of a request before its length."""
        lines = [f"POST {self._target.prefix}{path} HTTP/1.1", *self._lines, "content-length: "]
        self._heads[path] = head = "\r\n".join(lines).encode()
        return head

    async def close(self) -> None:
        """Closes the kept connections."""
        for connection in self._kept:
            connection.close()
        await asyncio.gather(*(connection.gone for connection in self._kept))
        self._kept.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


class _Connection(asyncio.Protocol):
    """One request at a time, and its answer so far.

    Attributes:
        is_kept: Whether another request may follow.
        gone: Done once the connection is closed.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._answer: asyncio.Future[HttpAnswer] | None = None
        self._come = b""
        self._needed = 0  # bytes that are necessary before the next look
        self.is_kept = False
        self.gone: asyncio.Future[None] = self._loop.create_future()

    async def ask(self, head: bytes, body: bytes, within_s: float) -> HttpAnswer:
        """Sends a request and reads its answer; raises BrokenError if none comes."""
        if self._transport.is_closing():
            raise _SilentError("closed")
        self._come, self._needed, self.is_kept = b"", 0, False
        answer: asyncio.Future[HttpAnswer] = self._loop.create_future()
        self._answer = answer
        timer = self._loop.call_later(within_s, self._fail, BrokenError(_silent_for(within_s)))
        try:
            # reads meanwhile, because a refusal may come before the whole body is sent
            self._transport.writelines((head, body))
            return await answer
        finally:
            timer.cancel()
            self._answer = None

    def close(self) -> None:
        """Ends the connection at once."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self.close()  # unexpected data
            return
        self._come = self._come + data if self._come else data
        if len(self._come) >= self._needed:
            self._look()

    def connection_lost(self, error: Exception | None) -> None:
        if self._come and error is None:
            self._look(ended=True)
        broken = BrokenError if self._come else _SilentError
        self._fail(broken("the connection ended before the answer did"))
        if not self.gone.done():
            self.gone.set_result(None)

    def _look(self, ended: bool = False) -> None:
        """Takes the answer if it is complete."""
        try:
            found = read(self._come, ended)
        except ValueError:
            self._fail(BrokenError("the answer is not HTTP"))
            return
        if isinstance(found, int):
            self._needed = found
        elif self._answer is not None and not self._answer.done():
            answer, self.is_kept = found
            self._answer.set_result(answer)

    def _fail(self, error: BrokenError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def _silent_for(seconds: float) -> str:
    return f"no answer in {seconds:g} s"
