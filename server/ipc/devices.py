"""Several engines as one, a device each: a request goes to the one with the least to do."""

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
    """An engine that may be down, and knows its load: `RemoteEngine`."""

    @property
    def is_up(self) -> bool:
        """Whether it takes calls, and its models are known."""
        ...

    @property
    def num_calls(self) -> int:
        """Calls that it has not answered."""
        ...

    def start(self) -> None:
        """Begins to connect."""
        ...

    async def close(self) -> None:
        """Leaves it."""
        ...


class Devices:
    """The engines of one server behind the `Engine` protocol.

    While one is down the others serve. What it held when it went down goes to another one, once: an image that ends two
    processes would end them all, and is refused. One that hangs answers nothing, has soon the most to do, and gets no
    more. One that fails would always have the least to do, so what it has failed at, or been too late for, counts for a
    second more.
    All have the same configuration and, but for the seconds in which they load, the same models, so any is asked for
    those. A request goes to one that has its model in the revision that its images were prepared for; a JPEG to one
    that decodes.

    Args:
        engines: In the order of the devices.
        clock: Monotonic seconds.
    """

    def __init__(self, engines: Sequence[Device], clock: Callable[[], float] = time.monotonic) -> None:
        self._engines, self._clock = tuple(engines), clock
        self._turns = list(engines)
        self._failed: dict[Device, deque[float]] = {engine: deque() for engine in engines}

    def start(self) -> None:
        """Begins to connect; call it inside a running event loop."""
        for engine in self._engines:
            engine.start()

    async def close(self) -> None:
        """Leaves the engines."""
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def catalog(self) -> dict[str, ModelInfo]:
        """As of `Engine`: what the first says, and what others have that it has not loaded yet."""
        up = [engine.catalog() for engine in self._engines if engine.is_up]
        if up:
            first, *others = up
            more = {name: info for other in others for name, info in other.items() if name not in first}
            return first | more if more else first
        return self._last_catalog()

    def _last_catalog(self) -> dict[str, ModelInfo]:
        """What one says that was up once.

        Raises:
            UnavailableError: None ever was.
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
            if request.deadline <= self._clock():  # given up by a caller who could wait no longer
                self._failed[engine].append(self._clock())
            raise

    async def curve(self, model: str) -> Curve:
        return await self._read(lambda engine: engine.curve(model))

    async def compiling(self, model: str) -> Compiling | None:
        return await self._read(lambda engine: engine.compiling(model))

    async def configuration(self) -> Configuration:
        return await self._read(lambda engine: engine.configuration())

    async def _read(self, ask: Callable[[Device], Awaitable[T]]) -> T:
        """What one engine says; another one is asked where it goes down meanwhile."""
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
        """Loads it on all engines side by side; where one refuses it, the others go back to what they had.

        One that is down or starts takes over later what the others have.
        """
        before = self.catalog().get(name)
        loaded, error = await self._on_all(lambda engine: engine.load(name, version))
        if error is None:
            return
        for engine in loaded:
            with contextlib.suppress(ServerError):  # it goes on with what it has
                await (engine.unload(name) if before is None else engine.load(name, before.version))
        raise error

    async def unload(self, name: str) -> None:
        unloaded, error = await self._on_all(lambda engine: engine.unload(name))
        if error is not None and not (unloaded and isinstance(error, NotFoundError)):  # one did not have it
            raise error

    async def _on_all(self, work: Callable[[Device], Awaitable[None]]) -> tuple[list[Device], Exception | None]:
        """Has all engines do something; gives those that did it, and what one of the others says against it."""
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
        """Asks all at once: one that answers is enough, and one that hangs delays nobody."""
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
        """Those that take calls, whoever was given one last at the end."""
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
        engine = min(up, key=self._load)  # of equals the first
        self._turns.remove(engine)
        self._turns.append(engine)
        return engine

    def _load(self, engine: Device) -> int:
        """Calls that it has not answered, and those that it has failed at just now."""
        failed, since = self._failed[engine], self._clock() - FAILED_COUNTS_S
        while failed and failed[0] < since:
            failed.popleft()
        return engine.num_calls + len(failed)


def _fit_for(request: Request[Any], engines: list[Device]) -> list[Device]:
    """Of the engines that are up, those that can answer a request."""
    infos = {engine: engine.catalog().get(request.model) for engine in engines}
    fit = [engine for engine, info in infos.items() if info is not None and info.revision == request.revision]
    # Else one that is about to free it: any, until its catalog has come, and then none that is listed here.
    fit = fit or [engine for engine, info in infos.items() if info is not None] or engines
    if any(isinstance(image, JpegFile) for image in request.images):
        fit = [engine for engine in fit if (info := infos[engine]) is not None and info.decodes_jpeg]
    return fit
