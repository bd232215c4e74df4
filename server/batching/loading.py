"""Loads, replaces and frees models while the engine serves. A loaded model enters service in one step."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from server.batching.loader import Found, Kept, Loader
from server.batching.served import ServedModels
from server.documents import sentence
from server.errors import EngineError, InvalidError, ServerError, SettingsError, UnavailableError
from server.types import ModelInfo, ModelState, OnDevice, find_model

logger = logging.getLogger(__name__)

A = TypeVar("A")

FOLLOW_S = 1.0
"""How often an engine looks for loads and unloads of the server's other engines. A look reads memory only."""


LetGo = Callable[[ModelInfo, Callable[[], None]], Coroutine[Any, Any, None]]
"""Waits until nothing computes a retired model, then has the computing thread free it."""


class Loading:
    """Loads and unloads the models of one engine, one at a time.

    Args:
        served: The models that serve.
        loader: Loads other models.
        let_go: Has a retired model freed.
        on_device: Runs work on the computing thread.
        kept: Remembers loads and unloads over a restart; None remembers nothing.
    """

    def __init__(
        self, served: ServedModels, loader: Loader, let_go: LetGo, on_device: OnDevice, kept: Kept | None = None
    ) -> None:
        self._served, self._loader, self._kept = served, loader, kept
        self._free_later, self._on_device = let_go, on_device
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._coming: Found | None = None
        self._going: dict[tuple[str, str], tuple[ModelInfo, asyncio.Task[None]]] = {}
        self._failures: dict[tuple[str, str], str] = {}
        self._working: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to follow the other engines of the server. Call it inside a running event loop."""
        if self._kept is not None:
            self._following = asyncio.create_task(self._follow(self._kept), name="models")

    async def close(self) -> None:
        """Stops loading and freeing."""
        tasks = [*(task for _, task in self._going.values()), *self._working]
        if self._following is not None:
            tasks.append(self._following)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def load(self, name: str, version: str | None) -> None:
        """See `Engine`. It continues after its caller gives up."""

        async def work() -> None:
            await self._keep(name, await self._load(name, version))

        await self._in_turn(work)

    async def unload(self, name: str) -> None:
        """See `Engine`. It continues after its caller gives up."""

        async def work() -> None:
            await self._unload(name)
            await self._keep(name, None)

        await self._in_turn(work)

    async def states(self) -> list[ModelState]:
        """See `Engine.repository`."""
        folders = await asyncio.to_thread(self._loader.available)
        coming = [] if self._coming is None else [(self._coming.name, self._coming.version)]
        served = [(info.name, info.version) for info in self._served.models.values()]
        going = [(info.name, info.version) for info, _ in self._going.values()]
        available = [(name, version) for name, versions in folders.items() for version in versions]
        states = {each: ModelState(*each, "UNAVAILABLE", self._failures.get(each, "")) for each in available}
        states |= {each: ModelState(*each, "UNLOADING") for each in going}
        states |= {each: ModelState(*each, "LOADING") for each in coming}
        states |= {each: ModelState(*each, "READY") for each in served}
        return list(states.values())

    async def _load(self, name: str, version: str | None) -> str:
        """Returns the version that is served now."""
        found = await self._aside(name, self._loader.find, name, version)
        before = self._served.models.get(name)
        if before is None or before.revision != found.revision:
            try:
                await self._bring(found)
            except ServerError as error:
                self._failures[name, found.version] = error.message
                raise
            self._failures.pop((name, found.version), None)
            if before is not None:
                self._let_go(before)
        return found.version

    async def _bring(self, found: Found) -> None:
        """Puts a model into service; one that is still in memory at once."""
        key = (found.name, found.revision)
        if self._served.readopt(*key):
            self._going.pop(key)[1].cancel()
            return
        if key in self._going:
            await asyncio.wait([self._going[key][1]])
        r = self._served.deployed(found.name, found.r)
        self._coming = found
        try:
            loaded = await self._aside(found.name, self._loader.load, found, r, self._on_device)
        finally:
            self._coming = None
        try:
            self._served.adopt(loaded)
        except ServerError:
            free = functools.partial(self._loader.free, loaded.info)
            await self._aside(found.name, self._on_device, free)
            raise
        logger.info("model %s, version %s, is loaded", found.name, found.version)

    async def _unload(self, name: str) -> None:
        info = find_model(self._served.models, name)
        self._served.retire(name)
        self._let_go(info)
        logger.info("model %s, version %s, is unloaded", name, info.version)

    def _let_go(self, info: ModelInfo) -> None:
        """Has a retired model freed once nothing computes it any more."""
        key = (info.name, info.revision)

        async def let_go() -> None:
            try:
                await self._free_later(info, functools.partial(self._loader.free, info))
                logger.info("model %s, version %s, is freed", info.name, info.version)
            except UnavailableError:
                pass  # the engine ends
            except Exception:  # nobody waits for it
                logger.exception("model %s, version %s, could not be freed", info.name, info.version)
            finally:
                if key in self._going and self._going[key][0] is info:
                    del self._going[key]

        self._going[key] = info, asyncio.create_task(let_go(), name=f"freeing {info.name}")

    async def _keep(self, name: str, version: str | None) -> None:
        if self._kept is not None:
            await self._aside(name, self._kept.keep, name, version)

    async def _follow(self, kept: Kept) -> None:
        """Repeats the loads and unloads of the server's other engines."""
        seen: Mapping[str, str | None] | None = None
        while True:
            try:
                if (entries := kept.entries()) != seen:
                    await self._in_turn(lambda: self._catch_up(kept))
                    seen = entries
            except Exception:  # the next look may succeed
                logger.exception("the models of the other engines cannot be followed")
            await asyncio.sleep(FOLLOW_S)

    async def _catch_up(self, kept: Kept) -> None:
        """Records nothing: the repeated changes are recorded, and may be outdated already."""
        for name, version in kept.entries().items():
            served = self._served.models.get(name)
            if (served and served.version) == version:
                continue
            try:
                await (self._unload(name) if version is None else self._load(name, version))
            except ServerError as error:
                logger.error("%s could not be brought to the state that was set live: %s", name, error)

    async def _in_turn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs work after all work before it, and to its end even if the caller leaves."""

        async def turn() -> None:
            async with self._turn:
                await work()

        task = asyncio.create_task(turn())
        self._working.add(task)
        task.add_done_callback(self._worked)
        await asyncio.shield(task)

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._working.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left

    async def _aside(self, name: str, work: Callable[..., A], *args: Any) -> A:
        """Runs work on the loading thread; its errors become errors of the model."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        except ServerError:
            raise
        except SettingsError as error:
            raise InvalidError(str(error)) from error
        except Exception as error:  # any error of torch, timm or the disk
            logger.exception("model %s cannot be loaded", name)
            raise EngineError(f"model {name} cannot be loaded: {sentence(error)}") from error
