"""Several engines as one, an engine for each device. A request goes to the least loaded engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from server.curve import Curve
from server.dial import RSetting
from server.errors import DeadlineError, EngineError, NotFoundError, ServerError, UnavailableError
from server.images.image import JpegFile
from server.ipc.client import LostEngineError
from server.ipc.engine import Engine
from server.ipc.messages import Answered, Request
from server.types import Compiling, Configuration, ModelInfo, ModelState

T = TypeVar("T")

FAILED_COUNTS_S = 1.0


class Device(Engine, Protocol):
    """An engine that may be down and knows its load, as `RemoteEngine` does."""

    @property
    def is_up(self) -> bool:
        """Whether it takes calls and its models are known."""
        ...

    @property
    def num_calls(self) -> int:
        """Calls that it has not answered."""
        ...

    def start(self) -> None:
        """Begins to connect."""
        ...

    async def close(self) -> None:
        """Closes the connection."""
        ...


class Devices:
    """The engines of one server behind the `Engine` protocol.

    While an engine is down the others serve. Its requests go to another engine, once: an image that ends two processes
    would end them all, and is refused. An engine that hangs answers nothing, soon has the most calls, and gets no more.
    An engine that fails fast would always have the fewest calls, so each failure or late answer counts as a call for
    one more second.

    All engines have the same configuration and, except for the seconds of a load, the same models; so any engine
    answers questions about those. A request goes to an engine with the model revision that its images were prepared
    for, and a JPEG to an engine that decodes.

    Args:
        engines: In the order of the devices.
        clock: Monotonic seconds.
    """

    def __init__(self, engines: Sequence[Device], clock: Callable[[], float] = time.monotonic) -> None:
        self._engines, self._clock = tuple(engines), clock
        self._turns = list(engines)
        self._failed: dict[Device, deque[float]] = {engine: deque() for engine in engines}

    def start(self) -> None:
        """Begins to connect. Call it inside a running event loop."""
        for engine in self._engines:
            engine.start()

    async def close(self) -> None:
        """Closes the connections."""
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def catalog(self) -> dict[str, ModelInfo]:
        """See `Engine`. The catalog of the first engine, and models that it has not loaded yet but others have."""
        up = [engine.catalog() for engine in self._engines if engine.is_up]
        if up:
            first, *others = up
            more = {name: info for other in others for name, info in other.items() if name not in first}
            return first | more if more else first
        return self._last_catalog()

    def _last_catalog(self) -> dict[str, ModelInfo]:
        """The catalog of an engine that was up once.

        Raises:
            UnavailableError: No engine was up yet.
        """
        for engine in self._engines[:-1]:
            with contextlib.suppress(UnavailableError):  # it has not been up yet
                return engine.catalog()
        return self._engines[-1].catalog()

    async def answer(self, request: Request[T]) -> Answered[T]:
        first = self._least_loaded(request)
        try:
            return await self._answer(first, request)
        except LostEngineError:
            if not self._is_up_besides(first):
                raise
        try:
            return await self._answer(self._least_loaded(request, besides=first), request)
        except LostEngineError:
            raise EngineError("two engines went down while they held this request; it is not tried again") from None

    async def _answer(self, engine: Device, request: Request[T]) -> Answered[T]:
        try:
            return await engine.answer(request)
        except (EngineError, UnavailableError, DeadlineError):
            self._failed[engine].append(self._clock())
            raise
        except asyncio.CancelledError:
            if request.deadline <= self._clock():  # the caller could wait no longer
                self._failed[engine].append(self._clock())
            raise

    async def curve(self, model: str) -> Curve:
        return await self._read(lambda engine: engine.curve(model))

    async def compiling(self, model: str) -> Compiling | None:
        return await self._read(lambda engine: engine.compiling(model))

    async def configuration(self) -> Configuration:
        return await self._read(lambda engine: engine.configuration())

    async def _read(self, ask: Callable[[Device], Awaitable[T]]) -> T:
        """Asks one engine; asks another if the first goes down meanwhile."""
        first = self._least_loaded()
        try:
            return await ask(first)
        except LostEngineError:
            if not self._is_up_besides(first):
                raise
        return await ask(self._least_loaded(besides=first))

    def _is_up_besides(self, first: Device) -> bool:
        return any(engine.is_up for engine in self._engines if engine is not first)

    async def configure(self, changes: Mapping[str, RSetting], expected_version: int | None) -> Configuration:
        return await self._least_loaded().configure(changes, expected_version)

    async def load(self, name: str, version: str | None = None) -> None:
        """Loads a model on all engines at once. If one refuses it, the others return to their previous version.

        An engine that is down or starting takes over the models of the others later.
        """
        before = self.catalog().get(name)
        loaded, error = await self._on_all(lambda engine: engine.load(name, version))
        if error is None:
            return
        for engine in loaded:
            with contextlib.suppress(ServerError):  # the engine keeps what it has
                await (engine.unload(name) if before is None else engine.load(name, before.version))
        raise error

    async def unload(self, name: str) -> None:
        unloaded, error = await self._on_all(lambda engine: engine.unload(name))
        if error is not None and not (unloaded and isinstance(error, NotFoundError)):  # one engine did not have it
            raise error

    async def _on_all(self, work: Callable[[Device], Awaitable[None]]) -> tuple[list[Device], Exception | None]:
        """Runs work on all engines; returns those that succeeded, and the error of one that did not."""
        engines = self._up()
        outcomes = await asyncio.gather(*(work(engine) for engine in engines), return_exceptions=True)
        done = [engine for engine, outcome in zip(engines, outcomes, strict=True) if outcome is None]
        errors = [each for each in outcomes if isinstance(each, Exception)]
        refused = [each for each in errors if not isinstance(each, LostEngineError)]
        if refused:
            return done, refused[0]
        return done, None if done else errors[0]

    async def repository(self) -> list[ModelState]:
        return await self._read(lambda engine: engine.repository())

    async def check(self) -> None:
        """Asks all engines at once: one answer is enough, and an engine that hangs delays nobody."""
        asked = {asyncio.create_task(engine.check()) for engine in self._up()}
        try:
            while asked:
                answered, asked = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                failures = [check.exception() for check in answered]
                if None in failures:
                    return
        finally:
            for check in asked:
                check.cancel()
        assert failures[0] is not None
        raise failures[0]

    def _up(self) -> list[Device]:
        """Engines that take calls; the one that got the last call comes last."""
        up = [engine for engine in self._turns if engine.is_up]
        if not up:
            raise UnavailableError("no engine is running", retry_after_s=1)
        return up

    def _least_loaded(self, request: Request[Any] | None = None, besides: Device | None = None) -> Device:
        up = [engine for engine in self._up() if engine is not besides]
        if request is not None:
            up = _fit_for(request, up)
        if not up:
            raise UnavailableError("the engine that decodes went down", retry_after_s=1)
        engine = min(up, key=self._load)  # the first of equals
        self._turns.remove(engine)
        self._turns.append(engine)
        return engine

    def _load(self, engine: Device) -> int:
        """Unanswered calls, and recent failures."""
        failed, since = self._failed[engine], self._clock() - FAILED_COUNTS_S
        while failed and failed[0] < since:
            failed.popleft()
        return engine.num_calls + len(failed)


def _fit_for(request: Request[Any], engines: list[Device]) -> list[Device]:
    """The engines that can answer a request, of those that are up."""
    infos = {engine: engine.catalog().get(request.model) for engine in engines}
    fit = [engine for engine, info in infos.items() if info is not None and info.revision == request.revision]
    # Without a fit, any engine that has the model will do: it is about to free it. Before a catalog has come, any
    # engine will do.
    fit = fit or [engine for engine, info in infos.items() if info is not None] or engines
    if any(isinstance(image, JpegFile) for image in request.images):
        fit = [engine for engine in fit if (info := infos[engine]) is not None and info.decodes_jpeg]
    return fit
