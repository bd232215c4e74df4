"""An engine on a Unix socket, for any number of HTTP processes."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from server.errors import EngineError, ServerError
from server.ipc.door import Door
from server.ipc.engine import Engine
from server.ipc.frames import Frames
from server.ipc.messages import (
    Alive,
    Call,
    Catalog,
    Configure,
    Deployed,
    Done,
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
    call_of,
)

logger = logging.getLogger(__name__)


SEEN_WITHIN_S = 2.0
"""An HTTP process that has not confirmed a new catalog within this time is stopped, or about to end."""


class EngineServer:
    """Answers calls in the order in which they finish. The calls of a process that is gone are withdrawn.

    A load or unload is answered once every HTTP process has the new catalog, because its caller may use the model
    through any of them.

    Args:
        engine: Answers the calls.
        door: Brings the connections of HTTP processes.
    """

    def __init__(self, engine: Engine, door: Door) -> None:
        self._engine, self._door = engine, door
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[Any]] = set()
        self._connections: set[_Connection] = set()
        self._is_alone = asyncio.Event()
        self._is_alone.set()
        self._loop.add_reader(door.fileno(), self._take)

    def close(self) -> None:
        """Takes no new connections."""
        self._loop.remove_reader(self._door.fileno())

    def _take(self) -> None:
        """Takes one connection; the loop calls again while more wait."""
        end = self._door.take()
        if end is None:
            return
        end.setblocking(False)
        opening = self._loop.create_task(self._loop.connect_accepted_socket(self._connect, end))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    def _connect(self) -> Frames[Call]:
        connection = _Connection(self._engine, self._forget, self._spread)
        self._connections.add(connection)
        self._is_alone.clear()
        return connection.frames

    async def left(self, within_s: float) -> None:
        """Waits until every HTTP process has left, at most `within_s`."""
        try:
            async with asyncio.timeout(within_s):
                await self._is_alone.wait()
        except TimeoutError:
            logger.warning("%d HTTP processes have not left within %g s", len(self._connections), within_s)

    def show_catalog(self) -> list[asyncio.Future[None]]:
        """Sends the catalog to all HTTP processes; each future is done when a process has it."""
        return [connection.show_catalog() for connection in self._connections]

    async def _spread(self) -> None:
        """Sends the catalog to all HTTP processes, and waits until they have it."""
        if seeing := self.show_catalog():
            await asyncio.wait(seeing, timeout=SEEN_WITHIN_S)

    def _forget(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._is_alone.set()


class _Connection:
    """The engine's end of one HTTP process's connection, and its calls in flight."""

    def __init__(self, engine: Engine, lost: Any, spread: Callable[[], Awaitable[None]]) -> None:
        self._engine, self._lost, self._spread = engine, lost, spread
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._unseen: dict[int, asyncio.Future[None]] = {}
        self._num_shown = 0
        self.frames = Frames(call_of, self._receive, self._withdraw_all, greeting=self._catalog)

    def _catalog(self) -> Reply:
        return Reply(self._num_shown, Catalog(list(self._engine.catalog().values())))

    def show_catalog(self) -> asyncio.Future[None]:
        """Sends the catalog; the future is done when it has been confirmed, or the process is gone."""
        self._num_shown += 1
        self._unseen[self._num_shown] = seen = asyncio.get_running_loop().create_future()
        if self.frames.is_open:
            self.frames.send(self._catalog())
        else:  # the greeting will carry this catalog, or the process is gone
            self._has_seen(self._num_shown)
        return seen

    def _has_seen(self, number: int) -> None:
        if (seen := self._unseen.pop(number, None)) is not None:  # not the greeting
            seen.set_result(None)

    def _receive(self, call: Call) -> None:
        if isinstance(call.ask, Withdraw):
            if call.id in self._calls:
                self._calls[call.id].cancel()
            return
        if isinstance(call.ask, Seen):
            return self._has_seen(call.id)
        try:
            answering = asyncio.ensure_future(self._answer(call.ask))
        except Exception as error:  # the engine refuses the call at once, or fails
            self._fail(call.id, error)
            return
        self._calls[call.id] = answering
        answering.add_done_callback(functools.partial(self._reply, call.id))

    def _answer(self, ask: Any) -> Any:
        """The awaitable of the answer. A request uses the engine's own future, which saves a task."""
        if isinstance(ask, Request):
            return self._engine.answer(ask)
        return self._tell(ask)

    async def _tell(
        self, ask: Probe | GetCurve | GetCompiling | GetConfiguration | Configure | Load | Unload | GetRepository
    ) -> Alive | Measured | Progress | Deployed | Done | Repository:
        engine = self._engine
        match ask:
            case Probe():
                await engine.check()
                return Alive()
            case GetCurve():
                return Measured(await engine.curve(ask.model))
            case GetCompiling():
                return Progress(await engine.compiling(ask.model))
            case GetConfiguration():
                return Deployed(await engine.configuration())
            case Configure():
                return Deployed(await engine.configure(ask.changes, ask.expected_version))
            case Load():
                await engine.load(ask.model, ask.version)
                await self._spread()
                return Done()
            case Unload():
                await engine.unload(ask.model)
                await self._spread()
                return Done()
            case GetRepository():
                return Repository(await engine.repository())

    def _reply(self, call_id: int, answering: asyncio.Future[Any]) -> None:
        del self._calls[call_id]
        if answering.cancelled():
            return
        error = answering.exception()
        if error is not None:
            self._fail(call_id, error)
            return
        try:
            self.frames.send(Reply(call_id, answering.result()))
        except Exception as unsendable:  # the engine's answer has a wrong type
            self._fail(call_id, unsendable)

    def _fail(self, call_id: int, error: BaseException) -> None:
        if not isinstance(error, ServerError):  # the caller must get an answer in any case
            logger.error("call %d failed", call_id, exc_info=error)
            error = EngineError(f"the engine failed: {error!r}")
        self.frames.send(Reply(call_id, Failure.of(error)))

    def _withdraw_all(self) -> None:
        if self._calls:
            logger.info("an HTTP process left; %d of its calls are withdrawn", len(self._calls))
        for answering in list(self._calls.values()):
            answering.cancel()
        for number in list(self._unseen):
            self._has_seen(number)
        self._lost(self)
