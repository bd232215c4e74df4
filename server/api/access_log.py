"""The access log: a line for each answered request. Lines of one turn of the event loop leave in one write."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import time
from collections.abc import Callable
from urllib.parse import quote

import msgspec

from server.log_format import Format
from server.tracing.context import RequestContext

PROBES = frozenset({"/livez", "/readyz", "/healthz", "/metrics", "/ping", "/v2/health/live", "/v2/health/ready"})
"""Paths that machines request every few seconds. They have no span, and a log line only at level debug."""

_LONGEST_PATH = 200
_SAFE = "!\"#$%&'()*+,/:;<=>?@[\\]^`{|}"


class _Line(msgspec.Struct, omit_defaults=True):
    """A line of JSON."""

    time: str
    level: str
    process: str
    message: str
    method: str
    path: str
    status: int
    ms: float
    bytes: int | None = None
    r: str | None = None
    request_id: str | None = None
    trace_id: str | None = None
    client: str | None = None


class AccessLog:
    """Writes a line for each request, without the counting of repeated lines. A line has neither query nor headers, so
    no key.

    Args:
        write: Takes text; it must not block.
        form: The format of lines.
        has_probes: Whether probes get lines too.
        clock: Nanoseconds of the wall clock.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        form: Format = "text",
        has_probes: bool = False,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._write, self._has_probes, self._clock = write, has_probes, clock
        self._shown = _json if form == "json" else _text
        self._is_utc = form == "json"
        self._process = multiprocessing.current_process().name
        self._lines: list[str] = []
        self._second, self._shown_second = -1, ""

    def note(
        self,
        method: str,
        path: str,
        status: int,
        took_s: float,
        context: RequestContext,
        *,
        size: int | None = None,
        r: str | None = None,
        client: str | None = None,
        is_probe: bool = False,
    ) -> None:
        """Logs an answered request. Call it inside the event loop.

        Args:
            method: The method.
            path: The path, as the client sent it.
            status: The status of the answer.
            took_s: Seconds until the answer was handed over.
            context: The ids of the request.
            size: Bytes of the answer's body, if they are known beforehand.
            r: The `r` that was used.
            client: The client's address.
            is_probe: The client only checks whether the server is up. `PROBES` are recognised without this.
        """
        is_probe = is_probe or path in PROBES
        if is_probe and not self._has_probes:
            return
        if not self._lines:
            asyncio.get_running_loop().call_soon(self.flush)
        path = _plain(path)
        line = _Line(
            time=self._now(),
            level="debug" if is_probe else "info",
            process=self._process,
            message=f"{method} {path} {status}",
            method=method,
            path=path,
            status=status,
            ms=round(1e3 * took_s, 2),
            bytes=size,
            r=r,
            request_id=context.request_id,
            trace_id=context.trace_id,
            client=None if client is None else _plain(client),
        )
        self._lines.append(self._shown(line))

    def flush(self) -> None:
        """Writes the collected lines."""
        lines, self._lines = self._lines, []
        self._write("".join(lines))

    def _now(self) -> str:
        """The time in the form of other log lines. All lines of a second share the text of its seconds."""
        now_ns = self._clock()
        second = now_ns // 1_000_000_000
        if second != self._second:
            self._second = second
            self._shown_second = (
                time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
                if self._is_utc
                else time.strftime("%Y-%m-%d %H:%M:%S,", time.localtime(second))
            )
        return f"{self._shown_second}{now_ns // 1_000_000 % 1000:03d}{'Z' if self._is_utc else ''}"


def _text(line: _Line) -> str:
    size = "-" if line.bytes is None else line.bytes
    r = f" r={line.r}" if line.r else ""
    trace = f" trace={line.trace_id}" if line.trace_id else ""
    return (
        f"{line.time} {line.level.upper()} {line.process}: {line.client or '-'} {line.message} "
        f"{size} bytes {line.ms} ms{r} request={line.request_id}{trace}\n"
    )


def _json(line: _Line) -> str:
    return _encode(line).decode() + "\n"


@functools.lru_cache(1024)
def _plain(text: str) -> str:
    """A client's text as a field of a line: short, ASCII, without blanks."""
    shown = text if len(text) <= _LONGEST_PATH else f"{text[:_LONGEST_PATH]}..."
    if shown.isascii() and shown.isprintable() and " " not in shown:
        return shown
    return quote(shown, safe=_SAFE)


_encode = msgspec.json.Encoder().encode
