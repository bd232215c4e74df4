"""The engine: deployment `r`, batcher and device threads behind the `Engine` protocol, in whatever process."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from server.batching.auto import AutoDial
from server.batching.batcher import Batcher
from server.batching.drift import DriftWatch
from server.batching.jobs import Batched, Open
from server.batching.policy import Rung
from server.config.store import ConfigStore
from server.curve import Curve
from server.dial import AutoR, PlainR, RSetting, Schedule
from server.errors import NotFoundError, ServerError, UnavailableError
from server.ipc.messages import Answered, Choice, Classify, Item, Request
from server.metrics import BatchMetrics
from server.types import BatchKey, Configuration, ModelInfo, find_model

logger = logging.getLogger(__name__)

A = TypeVar("A")
T = TypeVar("T")

CHECK_TIMEOUT_S = 10.0

HANGS_AFTER_S = 300.0
"""A device that works on one batch for so long hangs; compiling a schedule for the first time takes less."""


class Device(Protocol):
    """What computes. A function of its input is enough for a test."""

    @property
    def prepares(self) -> bool:
        """Batches are prepared before they are computed, each by a thread of its own."""
        ...

    def prepare(self, key: BatchKey, items: Sequence[Item]) -> Sequence[Any]:
        """What `compute` gets of each image instead of the item, or the ServerError of that image; in order."""
        ...

    def compute(self, key: BatchKey, work: Sequence[Any]) -> Sequence[Any]:
        """A batch under the key's model, schedule and operation: the result of each image, in order."""
        ...

    def check(self) -> None:
        """Raises when the device no longer works; called on the thread that computes."""
        ...

    def warm_further(self) -> bool:
        """Does one short piece of what makes later batches faster; False where nothing is left. As `check`."""
        ...


class Spans(Protocol):
    """Watches the requests and batches of an engine; its clock is `time.monotonic()`."""

    def asked(self, request: Request[Any], answering: asyncio.Future[Any]) -> None:
        """A request was taken, which has a `trace`."""
        ...

    def batch_ran(self, key: BatchKey, items: Sequence[Item], outcomes: Sequence[Any], started: float) -> None:
        """A batch ran, which was taken at some moment; the outcome of an image may be its ServerError."""
        ...


class LocalEngine:
    """The engine of this process. One thread computes on the device, so that batches never overlap.

    Where batches are prepared, another thread does that, for the next batch while one computes.

    Args:
        models: The loaded models, the default first.
        device: What computes.
        store: The deployment `r` of each model.
        steps: What `auto` chooses from, for each model: r=0 first, then ever faster. Where a model has none, r=0 alone.
        curves: What was measured of the models, those that have a curve.
        max_batch_size: Most images in a batch.
        max_queue_size: Most images waiting.
        batch_timeout_s: Age at which a waiting image goes before fuller batches.
        drift_sample: Share of the images answered with r > 0 that are checked at r=0 while the device is idle.
        spans: Is told of requests that have a trace, and of batches; None without tracing.

    Raises:
        InvalidError: A model's deployment `r` is out of its range.
    """

    def __init__(
        self,
        models: Mapping[str, ModelInfo],
        device: Device,
        store: ConfigStore,
        *,
        steps: Mapping[str, Sequence[Rung]] | None = None,
        curves: Mapping[str, Curve] | None = None,
        max_batch_size: int = 32,
        max_queue_size: int = 256,
        batch_timeout_s: float = 0.1,
        drift_sample: float = 0.0,
        spans: Spans | None = None,
    ) -> None:
        self._models = dict(models)
        self._spans = spans
        self._device = device
        self._broken = asyncio.Event()
        self._is_warming = True
        self._store = store
        self._configuration: Configuration | None = None
        self._batch_key = functools.lru_cache(1024)(self._made_key)
        self._following: asyncio.Task[None] | None = None
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")  # has a thread once it is asked for one
        self._drift = DriftWatch(self._prepare_and_compute, curves or {}, drift_sample, models=self._models)
        self._batcher = Batcher[BatchKey, Item, Any](
            self._compute,
            prepare=self._prepare if device.prepares else None,
            max_batch_size=max_batch_size,
            max_queue_size=max_queue_size,
            batch_timeout_s=batch_timeout_s,
            observer=BatchMetrics(),
            watch=None if spans is None else spans.batch_ran,
            idle=self._idle,
        )
        for name, info in self._models.items():
            info.check(store.configuration.models[name])
        self._curves, self._max_batch_size = dict(curves or {}), max_batch_size
        for name, curve in self._curves.items():  # all rows, also those that `auto` has no use for
            for row in curve.rows:
                assert row.line is not None, "the speeds of a curve that is served are known"
                self._batcher.speed.expect(self._models[name].batch_key(row.r), *row.line)
        only = {name: [Rung(info.schedule(0))] for name, info in self._models.items()}
        self._auto = {
            name: AutoDial(self._models[name].batch_key, ladder, self._batcher.speed)
            for name, ladder in (only | dict(steps or {})).items()
        }

    def start(self) -> None:
        """Begins to serve, and to follow the configuration; call it inside a running event loop."""
        self._following = asyncio.create_task(self._follow(), name="configuration")
        self._batcher.start().add_done_callback(lambda _: self._broken.set())

    async def broken(self) -> None:
        """Returns when this engine can serve no more: its device or its batch loop is gone, or it was closed."""
        await self._broken.wait()

    async def close(self) -> None:
        """Answers what waits, then stops."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        await self._batcher.close()
        self._preparing.shutdown()
        self._computing.shutdown()

    def catalog(self) -> dict[str, ModelInfo]:
        return self._models

    def answer(self, request: Request[T]) -> asyncio.Future[Answered[T]]:
        """As of `Engine`. Here `r` and the version of the configuration are resolved, once for all of the images."""
        info, configuration = find_model(self._models, request.model), self._configuration_now()
        r = configuration.models[info.name] if request.r is None else request.r
        key, auto = self._key(info, r, request)

        def finish(batched: Batched[BatchKey, Any]) -> Answered[Any]:
            if isinstance(request, Classify):
                self._drift.offer(batched.key, request.images, batched.results)
            return Answered(
                results=batched.results,
                schedule=batched.key.schedule,
                config_version=configuration.version,
                batch_size=batched.batch_size,
                queue_s=batched.wait_s,
                inference_s=batched.run_s,
                auto=auto or batched.note,
            )

        asked: Any = request
        items = [Item(asked, index) for index in range(len(request.images))]
        answering = self._batcher.submit(key, items, request.deadline, finish)
        if self._spans is not None and request.trace is not None:
            self._spans.asked(request, answering)
        return answering

    def _configuration_now(self) -> Configuration:
        """What holds in this turn of the event loop; to ask takes a system call, and many requests come in one turn."""
        if self._configuration is None:
            self._configuration = self._store.configuration
            asyncio.get_running_loop().call_soon(self._forget_configuration)
        return self._configuration

    def _forget_configuration(self) -> None:
        self._configuration = None

    def _key(
        self, info: ModelInfo, r: RSetting, request: Request[Any]
    ) -> tuple[BatchKey | Open[BatchKey], Choice | None]:
        """What a request is queued by. One image under `auto` is left open; several share a choice made now."""
        if not isinstance(r, AutoR):
            return self._batch_key(info.name, r, request.operation), None
        auto = self._auto[info.name]
        if len(request.images) == 1 and request.operation == "forward":
            return auto.open(r), None
        choice = auto.choose(self._batcher.load(), r)
        return self._batch_key(info.name, choice.schedule, request.operation), choice

    def _made_key(self, model: str, r: PlainR, operation: str) -> BatchKey:
        info = self._models[model]
        return info.batch_key(info.schedule(r), operation)

    async def curve(self, model: str) -> Curve:
        info = find_model(self._models, model)
        if info.name not in self._curves:
            raise NotFoundError(
                f"{info.name} has no curve that holds for its weights; "
                f"measure it: tome-server calibrate --model {info.source} --images FOLDER"
            )

        def line(schedule: Schedule) -> tuple[float, float]:
            known = self._batcher.speed.line(info.batch_key(schedule))
            assert known is not None, "all rows are expected from the start"
            return known

        return self._curves[info.name].at(line, self._max_batch_size)

    async def configuration(self) -> Configuration:
        return self._store.configuration

    async def configure(self, changes: Mapping[str, RSetting], expected_version: int | None) -> Configuration:
        for name, r in changes.items():
            find_model(self._models, name).check(r)
        try:
            return await self._store.change(changes, expected_version)
        finally:
            self._forget_configuration()

    async def _follow(self) -> None:
        try:
            await self._store.follow()
        except Exception:  # not worth the service: it goes on with what it has
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
        """Spends the time until something arrives on what makes the device faster, then on checks."""
        while self._is_warming and not arrived.is_set():
            try:
                self._is_warming = await self._in_time(self._computing, self._device.warm_further)
            except Exception:  # the device is as fast as it was
                logger.exception("the device could not be warmed further")
                self._is_warming = False
        await self._drift.idle(arrived)

    async def _prepare_and_compute(self, key: BatchKey, items: Sequence[Item]) -> Sequence[Any]:
        """A batch from its images to its results, whatever else is prepared or computed meanwhile."""
        work = await self._prepare(key, items) if self._device.prepares else items
        for each in work:
            if isinstance(each, ServerError):
                raise each
        return await self._on_device(self._computing, key, work, self._device.compute)

    async def _prepare(self, key: BatchKey, items: Sequence[Item]) -> Sequence[Any]:
        return await self._on_device(self._preparing, key, items, self._device.prepare)

    async def _compute(self, key: BatchKey, work: Sequence[Any]) -> Sequence[Any]:
        return await self._on_device(self._computing, key, work, self._device.compute)

    async def _on_device(
        self,
        thread: ThreadPoolExecutor,
        key: BatchKey,
        batch: Sequence[Any],
        work: Callable[[BatchKey, Sequence[Any]], A],
    ) -> A:
        """The result of work on a batch; when that fails, the device shows that it still does the simplest."""
        try:
            return await self._in_time(thread, lambda: work(key, batch))
        except UnavailableError:
            raise
        except Exception as error:  # the batch will be split: one image alone is the culprit, and has the traceback
            logger.error("a batch of %d for %s failed: %r", len(batch), key, error, exc_info=len(batch) == 1)
            await self._probe()
            raise

    async def _in_time(self, thread: ThreadPoolExecutor, work: Callable[[], A]) -> A:
        """The result of work on a thread; gives this engine up when that takes longer than any batch can."""
        working = asyncio.get_running_loop().run_in_executor(thread, _plainly, work)
        await asyncio.wait([working], timeout=HANGS_AFTER_S)
        if not working.done():
            logger.critical("the device hangs: it has worked for %g s on one batch", HANGS_AFTER_S)
            self._broken.set()
            raise UnavailableError("the device hangs", retry_after_s=1)
        return working.result()

    async def _probe(self) -> None:
        """Raises UnavailableError, and gives this engine up, when the device fails at the simplest work."""
        try:
            await self._in_time(self._computing, self._device.check)
        except UnavailableError:
            raise
        except Exception as error:
            logger.critical("the device works no more", exc_info=error)
            self._broken.set()
            raise UnavailableError(f"the device works no more: {error}", retry_after_s=1) from error


def _plainly(work: Callable[[], A]) -> A:
    """Does work; what a future of asyncio does not carry as an error becomes one that it does.

    StopIteration would never arrive there, a cancellation would look like one of the batch loop, and SystemExit would
    end the process.
    """
    try:
        return work()
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration | CancelledError):
            raise
        raise RuntimeError(f"the device raised {error!r}") from error
