"""The engine: deployment `r`, batcher and device threads behind the `Engine` protocol, in any process."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

from server.batching.batcher import Batcher
from server.batching.drift import DriftWatch
from server.batching.jobs import Batched, Open
from server.batching.loader import Kept, Loader
from server.batching.loading import Loading
from server.batching.policy import Rung
from server.batching.served import Served, ServedModels
from server.config.store import ConfigStore
from server.curve import Curve
from server.dial import AutoR, RSetting, Schedule
from server.errors import ConflictError, NotFoundError, ServerError, UnavailableError
from server.ipc.messages import Answered, Choice, Classify, Item, Request
from server.metrics import BatchMetrics
from server.types import (
    BatchKey,
    Compiling,
    ComputedBy,
    Configuration,
    ModelInfo,
    ModelState,
    OnDevice,
    OnTimed,
    find_model,
)

logger = logging.getLogger(__name__)

A = TypeVar("A")
T = TypeVar("T")

CHECK_TIMEOUT_S = 10.0

HANGS_AFTER_S = 300.0
"""A device that works on one batch for so long hangs. The first compilation of a schedule takes less."""


class Device(Protocol):
    """Computes batches. A test can use a function of its input."""

    @property
    def prepares(self) -> bool:
        """Whether batches are prepared before they are computed, in a thread of their own."""
        ...

    def prepare(self, key: BatchKey, items: Sequence[Item]) -> Sequence[Any]:
        """Turns each item into the input of `compute`, or into the ServerError of that image; in order."""
        ...

    def compute(self, key: BatchKey, work: Sequence[Any]) -> Sequence[Any]:
        """Computes a batch under the key's model, schedule and operation: the result of each image, in order."""
        ...

    def computed_by(self, key: BatchKey) -> ComputedBy:
        """The backend that would compute a batch of this key now; right after `compute`, the one that did."""
        ...

    def compiling(self, info: ModelInfo) -> Compiling | None:
        """The progress of a model's background compilation; None without one. Thread-safe."""
        ...

    def begin(self, info: ModelInfo, on_device: OnDevice, timed: OnTimed) -> None:
        """Starts the background work for a model: it compiles and times its schedules.

        Args:
            info: The model.
            on_device: Does a piece of work on the thread that computes, between two batches.
            timed: Receives the times of batches, on any thread.
        """
        ...

    def close(self) -> None:
        """Ends the background work; work that cannot be interrupted is abandoned."""
        ...

    def check(self) -> None:
        """Raises if the device no longer works. Runs on the thread that computes."""
        ...

    def warm_further(self) -> bool:
        """Does one short piece of work that makes later batches faster; returns False if none is left. Same thread as
        `check`.
        """
        ...


class Spans(Protocol):
    """Records the requests and batches of an engine; its clock is `time.monotonic()`."""

    def asked(self, request: Request[Any], answering: asyncio.Future[Any]) -> None:
        """A request with a `trace` was taken."""
        ...

    def batch_ran(self, key: BatchKey, items: Sequence[Item], outcomes: Sequence[Any], started: float) -> None:
        """A batch ran that was taken at `started`. The outcome of an image may be its ServerError."""
        ...


class _Computed(NamedTuple):
    """The result of one image, and what computed it."""

    result: Any
    by: ComputedBy


class LocalEngine:
    """The engine of this process. One thread computes on the device, so that batches never overlap.

    A device that prepares batches gets another thread, which prepares the next batch while one computes.

    Args:
        models: The loaded models, the default first. The engine updates it while models come and go.
        device: Computes the batches.
        store: The deployment `r` of each model.
        steps: The ladder of `auto` of each model: r=0 first, then ever faster. A model without one has r=0 alone.
        curves: The curves of the models that have one.
        max_batch_size: Most images in a batch.
        max_queue_size: Most images waiting.
        batch_timeout_s: Age at which a waiting image goes before fuller batches.
        drift_sample: Share of the images answered with r > 0 that are checked at r=0 while the device is idle.
        loader: Loads other models at run time; None if the set of models is fixed.
        kept: Remembers over a restart which models were loaded and unloaded.
        linger_s: Seconds for which a retired model still answers requests prepared for it, before it is freed.
        spans: Receives requests that have a trace, and batches; None without tracing.

    Raises:
        InvalidError: A model's deployment `r` is out of its range.
    """

    def __init__(
        self,
        models: dict[str, ModelInfo],
        device: Device,
        store: ConfigStore,
        *,
        steps: Mapping[str, Sequence[Rung]] | None = None,
        curves: Mapping[str, Curve] | None = None,
        max_batch_size: int = 32,
        max_queue_size: int = 256,
        batch_timeout_s: float = 0.1,
        drift_sample: float = 0.0,
        loader: Loader | None = None,
        kept: Kept | None = None,
        linger_s: float = 0.0,
        spans: Spans | None = None,
    ) -> None:
        self._models = models
        self._spans = spans
        self._device = device
        self._broken = asyncio.Event()
        self._is_warming = True
        self._on_catalog: Callable[[], object] = lambda: None
        self._store = store
        self._configuration: Configuration | None = None
        self._following: asyncio.Task[None] | None = None
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")  # its thread starts with the first job
        self._drift = DriftWatch(self._prepare_and_compute, {}, drift_sample, models=self._models)
        self._batcher = Batcher[BatchKey, Item, Any](
            self._compute,
            prepare=self._prepare if device.prepares else None,
            max_batch_size=max_batch_size,
            max_queue_size=max_queue_size,
            batch_timeout_s=batch_timeout_s,
            observer=BatchMetrics(),
            watch=None if spans is None else spans.batch_ran,
            idle=self._idle,
            is_fallback=lambda key: device.computed_by(key).is_fallback,
            was_fallback=lambda computed: computed.by.is_fallback,
        )
        self._begun: set[tuple[str, str]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._max_batch_size, self._linger_s = max_batch_size, linger_s
        self._served = ServedModels(
            models, store, self._batcher.speed, self._drift, self._came_or_went, steps or {}, curves or {}
        )
        self._loading: Loading | None = None
        if loader is not None:
            self._loading = Loading(self._served, loader, self._let_go, self._by_computing, kept)

    def start(self) -> None:
        """Begins to serve, and to follow the configuration; call it inside a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._following = asyncio.create_task(self._follow(), name="configuration")
        if self._loading is not None:
            self._loading.start()
        self._batcher.start().add_done_callback(lambda _: self._broken.set())
        self._begin_background()

    async def broken(self) -> None:
        """Returns when this engine can no longer serve: its device or batch loop has failed, or it was closed."""
        await self._broken.wait()

    async def close(self) -> None:
        """Answers all that wait, then stops."""
        self._device.close()
        if self._loading is not None:
            await self._loading.close()
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        await self._batcher.close()
        self._preparing.shutdown()
        self._computing.shutdown()

    def catalog(self) -> dict[str, ModelInfo]:
        return self._models

    def answer(self, request: Request[T]) -> asyncio.Future[Answered[T]]:
        """See `Engine`. Resolves `r` and the version of the configuration once for all images of the request."""
        served, configuration = self._served.find(request), self._configuration_now()
        r: RSetting | None = request.r
        if r is None:
            r = configuration.models[request.model] if served.r is None else served.r
        key, auto = self._key(served, r, request)

        def finish(batched: Batched[BatchKey, Any]) -> Answered[Any]:
            results = [computed.result for computed in batched.results]
            if isinstance(request, Classify) and served.r is None:  # the drift of a retired model concerns nobody
                self._drift.offer(batched.key, request.images, results)
            return Answered(
                results=results,
                schedule=batched.key.schedule,
                config_version=configuration.version,
                batch_size=batched.batch_size,
                queue_s=batched.wait_s,
                inference_s=batched.run_s,
                computed_by=_computed_by(batched.results),
                auto=auto or batched.note,
            )

        asked: Any = request
        items = [Item(asked, index) for index in range(len(request.images))]
        answering = self._batcher.submit(key, items, request.deadline, finish)
        if self._spans is not None and request.trace is not None:
            self._spans.asked(request, answering)
        return answering

    def _configuration_now(self) -> Configuration:
        """The configuration in this turn of the event loop. A read takes a system call, and many requests come in one
        turn.
        """
        if self._configuration is None:
            self._configuration = self._store.configuration
            asyncio.get_running_loop().call_soon(self._forget_configuration)
        return self._configuration

    def _forget_configuration(self) -> None:
        self._configuration = None

    def _key(
        self, served: Served, r: RSetting, request: Request[Any]
    ) -> tuple[BatchKey | Open[BatchKey], Choice | None]:
        """The key of a request. One image under `auto` stays open; several share a choice made now."""
        if not isinstance(r, AutoR):
            return served.key(r, request.operation), None
        if len(request.images) == 1 and request.operation == "forward":
            return served.dial.open(r), None
        choice = served.dial.choose(self._batcher.load(), r)
        return served.key(choice.schedule, request.operation), choice

    async def curve(self, model: str) -> Curve:
        info = find_model(self._models, model)
        curve = self._served.curve(info.name)
        if curve is None:
            raise NotFoundError(
                f"{info.name} has no curve that holds for its weights; "
                f"measure it: tome-server calibrate --model {info.source} --images FOLDER"
            )

        def line(schedule: Schedule) -> tuple[float, float]:
            known = self._batcher.speed.own_line(info.batch_key(schedule))
            assert known is not None, "all rows are expected from the start"
            return known

        return curve.at(line, self._max_batch_size)

    async def compiling(self, model: str) -> Compiling | None:
        return self._device.compiling(find_model(self._models, model))

    async def configuration(self) -> Configuration:
        return self._store.configuration

    async def configure(self, changes: Mapping[str, RSetting], expected_version: int | None) -> Configuration:
        for name, r in changes.items():
            find_model(self._models, name).check(r)
        try:
            return await self._store.change(changes, expected_version)
        finally:
            self._forget_configuration()

    async def load(self, name: str, version: str | None = None) -> None:
        await self._able_to_load().load(name, version)

    async def unload(self, name: str) -> None:
        await self._able_to_load().unload(name)

    async def repository(self) -> list[ModelState]:
        if self._loading is not None:
            return await self._loading.states()
        return [ModelState(info.name, info.version, "READY") for info in self._models.values()]

    def _able_to_load(self) -> Loading:
        if self._loading is None:
            raise ConflictError(
                "this server loads and unloads no models at run time; deploy it again with other models"
            )
        return self._loading

    def on_catalog(self, changed: Callable[[], object]) -> None:
        """Sets the function to call after every change of the catalog."""
        self._on_catalog = changed

    def _came_or_went(self) -> None:
        self._forget_configuration()
        self._is_warming = True
        self._begin_background()
        self._on_catalog()

    def _begin_background(self) -> None:
        """Starts the background work of new models, but not before the engine serves."""
        if self._loop is None:
            return
        for info in self._models.values():
            if (key := (info.name, info.revision)) not in self._begun:
                self._begun.add(key)
                self._device.begin(info, self._by_computing, self._timed)

    def _timed(self, lines: Mapping[BatchKey, tuple[float, float]]) -> None:
        """Records the times of batches, from any thread."""

        def expect() -> None:
            for key, line in lines.items():
                if (key.model, key.revision) in self._begun:  # otherwise it was freed meanwhile
                    self._batcher.speed.expect(key, *line)

        assert self._loop is not None, "nothing is timed before the engine serves"
        self._loop.call_soon_threadsafe(expect)

    async def _let_go(self, info: ModelInfo, free: Callable[[], None]) -> None:
        """Waits until nothing computes a retired model, then has the computing thread free it."""
        await asyncio.sleep(self._linger_s)
        self._served.forget(info)
        await self._batcher.finished(lambda item: item.request.model == info.name)
        await self._batcher.between_batches(functools.partial(self._in_time, self._computing, free))
        self._begun.discard((info.name, info.revision))
        self._batcher.speed.forget(lambda key: (key.model, key.revision) == (info.name, info.revision))

    def _by_computing(self, work: Callable[[], A]) -> A:
        """Runs work on the computing thread between two batches and returns its result. Call it from another thread."""
        return self._computing.submit(_plainly, work).result()

    async def _follow(self) -> None:
        try:
            await self._store.follow()
        except Exception:  # the service goes on with the configuration that it has
            logger.exception("the configuration is no longer followed; a change is seen at the next start")

    async def check(self) -> None:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await self._batcher.between_batches(self._probe)
        except TimeoutError:
            raise UnavailableError(
                f"the engine does not answer: no answer within {CHECK_TIMEOUT_S:.3g} s", retry_after_s=1
            ) from None

    async def _idle(self, arrived: asyncio.Event) -> None:
        """Warms the device further, then checks for drift, until something arrives."""
        while self._is_warming and not arrived.is_set():
            try:
                self._is_warming = await self._in_time(self._computing, self._device.warm_further)
            except Exception:  # the device stays as fast as it was
                logger.exception("the device could not be warmed further")
                self._is_warming = False
        await self._drift.idle(arrived)

    async def _prepare_and_compute(self, key: BatchKey, items: Sequence[Item]) -> Sequence[Any]:
        """Prepares and computes a batch, independent of other batches."""
        work = await self._prepare(key, items) if self._device.prepares else items
        for each in work:
            if isinstance(each, ServerError):
                raise each
        return await self._on_device(self._computing, key, work, self._device.compute)

    async def _prepare(self, key: BatchKey, items: Sequence[Item]) -> Sequence[Any]:
        return await self._on_device(self._preparing, key, items, self._device.prepare)

    async def _compute(self, key: BatchKey, work: Sequence[Any]) -> Sequence[_Computed]:
        return await self._on_device(self._computing, key, work, self._computed)

    def _computed(self, key: BatchKey, work: Sequence[Any]) -> Sequence[_Computed]:
        """Computes a batch; called on the thread that computes."""
        results = self._device.compute(key, work)
        by = self._device.computed_by(key)
        return [_Computed(result, by) for result in results]

    async def _on_device(
        self,
        thread: ThreadPoolExecutor,
        key: BatchKey,
        batch: Sequence[Any],
        work: Callable[[BatchKey, Sequence[Any]], A],
    ) -> A:
        """Runs work on a batch. If it fails, the device must show that the simplest work still succeeds."""
        try:
            return await self._in_time(thread, lambda: work(key, batch))
        except UnavailableError:
            raise
        except Exception as error:  # the batch will be split; the image that fails alone is logged with its traceback
            logger.error("a batch of %d for %s failed: %r", len(batch), key, error, exc_info=len(batch) == 1)
            await self._probe()
            raise

    async def _in_time(self, thread: ThreadPoolExecutor, work: Callable[[], A]) -> A:
        """Runs work on a thread. Gives this engine up if that takes longer than any batch can."""
        working = asyncio.get_running_loop().run_in_executor(thread, _plainly, work)
        await asyncio.wait([working], timeout=HANGS_AFTER_S)
        if not working.done():
            logger.critical("the device hangs: it has worked for %g s on one batch", HANGS_AFTER_S)
            self._broken.set()
            raise UnavailableError("the device hangs", retry_after_s=1)
        return working.result()

    async def _probe(self) -> None:
        """Raises UnavailableError and gives this engine up if the device fails at the simplest work."""
        try:
            await self._in_time(self._computing, self._device.check)
        except UnavailableError:
            raise
        except Exception as error:
            logger.critical("the device no longer works", exc_info=error)
            self._broken.set()
            raise UnavailableError(f"the device no longer works: {error}", retry_after_s=1) from error


def _computed_by(computed: Sequence[_Computed]) -> ComputedBy:
    """The backend of a request's results; if they differ, the fallback."""
    return next((each.by for each in computed if each.by.is_fallback), computed[0].by)


def _plainly(work: Callable[[], A]) -> A:
    """Runs work, and turns errors that an asyncio future cannot carry into a RuntimeError.

    A StopIteration would never arrive, a cancellation would look like one of the batch loop, and SystemExit would end
    the process.
    """
    try:
        return work()
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration | CancelledError):
            raise
        raise RuntimeError(f"the device raised {error!r}") from error
