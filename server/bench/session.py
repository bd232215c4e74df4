"""Loads on one server. Each has its own event loop and connections, so that nothing carries over to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from urllib.parse import urlencode

import uvloop

from server.bench.client import BrokenError, Connections, Target
from server.bench.load import Request, Run, closed_loop, message_of, open_loop, poisson
from server.bench.progress import Progress
from server.bench.rows import R, name_of, text_of

TIMEOUT_S = 60.0


class Session:
    """A server, and the requests for it.

    Args:
        target: The server.
        photos: Image files, used in turn.
        model: Its name; None for the server's default.
        deadline_ms: The deadline of each request.
        headers: Headers of every request.
        seed: Seed of the open loops' times, which all differ.
    """

    def __init__(
        self,
        target: Target,
        photos: Sequence[bytes],
        *,
        model: str | None = None,
        deadline_ms: float | None = None,
        headers: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self._target, self._photos, self._headers, self._seed = target, photos, headers, seed
        self._said = {"model": model, "deadline_ms": None if deadline_ms is None else f"{deadline_ms:g}"}

    def check(self, r: R) -> str | None:
        """Sends one request; returns its error, or None if it succeeds."""

        async def ask() -> str | None:
            async with self._client() as client:
                answer = await client.post(self._path(r), self._photos[0])
            return None if answer.status == 200 else f"{answer.status} {message_of(answer)}"

        try:
            return uvloop.run(ask())
        except BrokenError as error:
            return str(error)

    def at_rate(self, r: R, per_s: float, seconds: float) -> Run:
        """Poisson arrivals, which do not wait for the server."""
        due = poisson(per_s, seconds, self._seed)
        self._seed += 1
        progress = Progress(f"{name_of(r)} at {per_s:.4g}/s", seconds)

        async def send() -> Run:
            async with self._client() as client:
                return await open_loop(client, self._requests(r), due, watch=progress)

        try:
            run = uvloop.run(send())
        finally:
            progress.end()
        return replace(run, seconds=max(run.seconds, seconds))  # the last request may be due long before the end

    def with_clients(self, r: R, clients: int, seconds: float) -> Run:
        """Clients that wait for their answers."""
        progress = Progress(f"{name_of(r)}, {clients} clients", seconds)

        async def send() -> Run:
            async with self._client() as client:
                return await closed_loop(client, self._requests(r), clients, seconds, watch=progress)

        try:
            return uvloop.run(send())
        finally:
            progress.end()

    def _client(self) -> Connections:
        return Connections(self._target, TIMEOUT_S, self._headers)

    def _requests(self, r: R) -> list[Request]:
        path = self._path(r)
        return [Request(path, photo) for photo in self._photos]

    def _path(self, r: R) -> str:
        said = {name: value for name, value in {"r": text_of(r) or None, **self._said}.items() if value is not None}
        return "/classify" + (f"?{urlencode(said)}" if said else "")
