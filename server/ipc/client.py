"""The HTTP process's view of an engine in another process."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, TypeVar

from server.curve import Curve
from server.deadlines import Deadlines
from server.dial import RSetting
from server.errors import DeadlineError, UnavailableError
from server.ipc.door import Door
from server.ipc.frames import Frames
from server.ipc.messages import (
    Answered,
    Call,
    Catalog,
    Configure,
    Deployed,
    Failure,
    GetCompiling,
    GetConfiguration,
    GetCurve,
    GetRepository,
    Load,
    Measured,
    Probe,
    Progress,
    Reply,
    Repository,
    Request,
    Seen,
    Unload,
    Withdraw,
    reply_of,
)
from server.metrics import ENGINE_UP
from server.types import Compiling, Configuration, ModelInfo, ModelState

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECONNECT_S = 0.05
CALL_TIMEOUT_S = 12.0  # longer than the engine takes to report a failed check
LOAD_TIMEOUT_S = 3600.0
"""A large model from a slow disk takes minutes when it is compiled for the first time."""
GRACE_S = 1.0
"""The engine keeps the deadline. This much later, the caller gives up on an engine that does not."""


MOST_UNSENT = 256 << 20
"""Bytes that wait for an engine that does not read. Beyond that, requests are refused or go to another engine."""


class LostEngineError(UnavailableError):
    """The connection broke while a call was in flight."""


class RemoteEngine:
    """An engine in another process. It reconnects for as long as it lives.

    When the connection breaks, every call in flight fails at once. A caller that gives up withdraws its call. While no
    engine runs, a connection waits for the next one; so the engine is up once it has sent its catalog.

    Args:
        door: Connects to the engine.
        index: The engine's place among the server's engines, for the metrics.
    """

    def __init__(self, door: Door, index: int = 0) -> None:
        self._door, self._up = door, ENGINE_UP.labels(str(index))
        self._catalog: dict[str, ModelInfo] | None = None
        self._connected: Frames[Reply] | None = None
        self._frames: Frames[Reply] | None = None
        """The connection, after the engine has sent its catalog."""
        self._calls: dict[int, tuple[asyncio.Future[Any], float]] = {}
        self._deadlines = Deadlines(self._expire)
        self._ids = itertools.count()
        self._connection: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to connect. Call it inside a running event loop."""
        self._connection = asyncio.create_task(self._stay_connected(), name="engine connection")

    async def close(self) -> None:
        """Closes the connection."""
        assert self._connection is not None
        self._connection.cancel()
        await asyncio.wait([self._connection])
        self._deadlines.close()

    @property
    def is_up(self) -> bool:
        """Whether the engine is connected and has sent its catalog."""
        return self._frames is not None

    @property
    def num_calls(self) -> int:
        """Calls of this process that the engine has not answered."""
        return len(self._calls)

    def catalog(self) -> dict[str, ModelInfo]:
        if self._catalog is None:
            raise UnavailableError("the models are still loading", retry_after_s=1)
        return self._catalog

    async def answer(self, request: Request[T]) -> Answered[T]:
        answered: Answered[T] = await self._call(request, request.deadline + GRACE_S)
        return answered

    async def curve(self, model: str) -> Curve:
        measured: Measured = await self._call(GetCurve(model))
        return measured.curve

    async def compiling(self, model: str) -> Compiling | None:
        progress: Progress = await self._call(GetCompiling(model))
        return progress.compiling

    async def configuration(self) -> Configuration:
        deployed: Deployed = await self._call(GetConfiguration())
        return deployed.configuration

    async def configure(self, changes: Mapping[str, RSetting], expected_version: int | None) -> Configuration:
        deployed: Deployed = await self._call(Configure(changes, expected_version))
        return deployed.configuration

    async def load(self, name: str, version: str | None = None) -> None:
        await self._call(Load(name, version), time.monotonic() + LOAD_TIMEOUT_S)

    async def unload(self, name: str) -> None:
        await self._call(Unload(name), time.monotonic() + LOAD_TIMEOUT_S)  # a load may come before it

    async def repository(self) -> list[ModelState]:
        repository: Repository = await self._call(GetRepository())
        return repository.models

    async def check(self) -> None:
        try:
            await self._call(Probe())
        except DeadlineError as error:
            raise UnavailableError(error.message, retry_after_s=1) from None

    async def _call(self, ask: Any, deadline: float | None = None) -> Any:
        if self._frames is None:
            raise UnavailableError("the engine is not running", retry_after_s=1)
        call_id, frames = next(self._ids), self._frames
        if frames.num_unsent > MOST_UNSENT:
            raise UnavailableError("the engine does not read its requests", retry_after_s=1)
        deadline = time.monotonic() + CALL_TIMEOUT_S if deadline is None else deadline
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future, deadline
        self._deadlines.watch(deadline)
        try:
            frames.send(Call(call_id, ask))
            return await future
        except asyncio.CancelledError:
            frames.send(Call(call_id, Withdraw()))
            raise
        finally:
            del self._calls[call_id]

    def _expire(self, now: float) -> float:
        """Gives up the calls that the engine should have answered; returns the next deadline."""
        nearest = math.inf
        for future, deadline in self._calls.values():
            if deadline > now:
                nearest = min(nearest, deadline)
            elif not future.done():
                future.set_exception(DeadlineError("the engine did not answer within the deadline"))
        return nearest

    async def _stay_connected(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            is_lost = asyncio.Event()
            self._connected = frames = Frames(reply_of, self._receive, is_lost.set)
            try:
                await loop.create_unix_connection(lambda frames=frames: frames, sock=self._door.knock())  # type: ignore[misc]
            except OSError:
                await asyncio.sleep(RECONNECT_S)
                continue
            try:
                await is_lost.wait()
                logger.warning("the connection to the engine broke; %d calls fail", len(self._calls))
            finally:
                self._up.set(0)
                self._frames = None
                frames.close()
                for future, _ in self._calls.values():
                    if not future.done():
                        future.set_exception(LostEngineError("the engine went down", retry_after_s=1))
            await asyncio.sleep(RECONNECT_S)

    def _receive(self, reply: Reply) -> None:
        answer = reply.answer
        if isinstance(answer, Catalog):
            assert self._connected is not None, "it has come over a connection"
            self._catalog = {info.name: info for info in answer.models}
            self._connected.send(Call(reply.id, Seen()))
            self._frames = self._connected
            self._up.set(1)
            return
        future, _ = self._calls.get(reply.id, (None, None))
        if future is None or future.done():
            return  # its caller has given up
        if isinstance(answer, Failure):
            future.set_exception(answer.error())
        else:
            future.set_result(answer)
