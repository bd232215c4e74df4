"""The engine: deployment `r`, batcher and device thread behind the `Engine` protocol, in whichever process holds it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from server.batching.auto import AutoDial
from server.batching.batcher import Answer, Batcher
from server.batching.drift import DriftWatch
from server.batching.policy import Rung
from server.config.store import ConfigStore
from server.curve import Curve
from server.dial import AutoR, RSetting, Schedule
from server.errors import DeadlineError, NotFoundError, ServerError, UnavailableError
from server.metrics import BatchMetrics
from server.types import (
    BatchKey,
    Choice,
    Configuration,
    Explanation,
    Job,
    Merges,
    ModelInfo,
    Prediction,
    TopK,
    find_model,
)

logger = logging.getLogger(__name__)

A = TypeVar("A")
RunBatch = Callable[[BatchKey, Sequence[Any]], Sequence[TopK]]
"""Computes one batch on the device under the key's model and schedule, of jobs or of what was prepared of them; answers
in order."""

PrepareBatch = Callable[[BatchKey, Sequence[Job]], Sequence[Any]]
"""What `RunBatch` gets of each job instead of it, or the ServerError of that job alone; in order."""

ExplainBatch = Callable[[BatchKey, Sequence[Job]], Sequence[tuple[TopK, Merges]]]
"""The same for jobs that ask what merged."""

CHECK_TIMEOUT_S = 10.0

HANGS_AFTER_S = 300.0
"""A device that works on one batch for so long hangs; compiling a schedule for the first time takes less."""


@dataclass(frozen=True, slots=True)
class _Explaining:
    """What jobs to explain are batched by: never with jobs to classify, which take another way through the device."""

    key: BatchKey


@dataclass(frozen=True, slots=True)
class _Ready:
    """A job to classify, and what the device gets of it."""

    job: Job
    work: Any


class LocalEngine:
    """The engine of this process. One thread computes on the device, so that batches never overlap.

    Where batches are prepared, another thread does that, for the next batch while one computes.

    Args:
        models: The loaded models, the default first.
        run_batch: The device; a function of its input is enough for a test.
        explain_batch: The device for jobs that ask what merged.
        prepare_batch: Makes jobs ready for `run_batch`; None where it takes them as they are.
        check_device: Raises when the device no longer works; called on the device's thread.
        store: The deployment `r` of each model.
        steps: What `auto` chooses from, for each model: r=0 first, then ever faster. Where a model has none, r=0 alone.
        curves: What was measured of the models, those that have a curve.
        max_batch_size: Most images in a batch.
        max_queue_size: Most images waiting.
        batch_timeout_s: Age at which a waiting image goes before fuller batches.
        drift_sample: Share of the images answered with r > 0 that are checked at r=0 while the device is idle.

    Raises:
        InvalidError: A model's deployment `r` is out of its range.
    """

    def __init__(
        self,
        models: Mapping[str, ModelInfo],
        run_batch: RunBatch,
        store: ConfigStore,
        *,
        explain_batch: ExplainBatch,
        prepare_batch: PrepareBatch | None = None,
        steps: Mapping[str, Sequence[Rung]] | None = None,
        curves: Mapping[str, Curve] | None = None,
        check_device: Callable[[], None] = lambda: None,
        max_batch_size: int = 32,
        max_queue_size: int = 256,
        batch_timeout_s: float = 0.1,
        drift_sample: float = 0.0,
    ) -> None:
        self._models = dict(models)
        self._compute, self._explain, self._prepare = run_batch, explain_batch, prepare_batch
        self._check_device = check_device
        self._broken = asyncio.Event()
        self._store = store
        self._following: asyncio.Task[None] | None = None
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")  # has a thread once it is asked for one
        self._drift = DriftWatch(self._run_batch, curves or {}, drift_sample)
        # A key, a job and an answer are of one kind: classification, explanation, or a health check's None.
        self._batcher = Batcher[Any, Job | None, Any](
            self._run_batch if prepare_batch is None else self._compute_batch,
            prepare=None if prepare_batch is None else self._prepare_batch,
            max_batch_size=max_batch_size,
            max_queue_size=max_queue_size,
            batch_timeout_s=batch_timeout_s,
            observer=BatchMetrics(),
            idle=self._drift.idle,
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
        self._device.shutdown()

    def catalog(self) -> dict[str, ModelInfo]:
        return self._models

    async def classify(self, job: Job) -> Prediction:
        info, version, r = self._asked(job)
        if isinstance(r, AutoR):
            answer = await self._batcher.submit(self._auto[info.name].open(r), job, job.timeout_s)
        else:
            answer = await self._batcher.submit(info.batch_key(info.schedule(r)), job, job.timeout_s)
        assert isinstance(answer.key, BatchKey)  # only a health check is answered without one
        auto = self._choice(info.name, answer.key.schedule, r) if isinstance(r, AutoR) else None
        return _prediction(answer, answer.result, answer.key.schedule, version, auto)

    async def explain(self, job: Job) -> Explanation:
        info, version, r = self._asked(job)
        auto = await self.choose(info.name, r) if isinstance(r, AutoR) else None
        schedule = auto.schedule if auto else info.schedule(r)
        answer = await self._batcher.submit(_Explaining(info.batch_key(schedule)), job, job.timeout_s)
        top_k, merges = answer.result
        return Explanation(_prediction(answer, top_k, schedule, version, auto), merges)

    def _asked(self, job: Job) -> tuple[ModelInfo, int, RSetting]:
        """The job's model, the version of the configuration at this moment, and the `r` that holds for the job."""
        info, configuration = find_model(self._models, job.model), self._store.configuration
        return info, configuration.version, configuration.models[job.model] if job.r is None else job.r

    async def choose(self, model: str, bounds: AutoR) -> Choice:
        info = find_model(self._models, model)
        schedule = self._auto[info.name].choose(self._batcher.load(), bounds).schedule
        return self._choice(info.name, schedule, bounds)

    def _choice(self, model: str, schedule: Schedule, bounds: AutoR) -> Choice:
        auto = self._auto[model]
        return Choice(schedule, auto.why(schedule, bounds), auto.expected_agreement(schedule))

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
        return await self._store.change(changes, expected_version)

    async def _follow(self) -> None:
        try:
            await self._store.follow()
        except Exception:  # not worth the service: it goes on with what it has
            logger.exception("the configuration is no longer followed; a change is seen at the next start")

    async def check(self) -> None:
        try:
            await self._batcher.submit(None, None, CHECK_TIMEOUT_S, urgent=True)
        except DeadlineError as error:
            raise UnavailableError(f"the engine does not answer: {error.message}", retry_after_s=1) from None

    async def _run_batch(self, key: BatchKey | _Explaining | None, jobs: Sequence[Any]) -> Sequence[Any]:
        """A batch from its jobs to its answers, whatever else is prepared or computed meanwhile."""
        ready = await self._prepare_batch(key, jobs)
        for each in ready:
            if isinstance(each, ServerError):
                raise each
        return await self._compute_batch(key, ready)

    async def _prepare_batch(self, key: BatchKey | _Explaining | None, jobs: Sequence[Any]) -> Sequence[Any]:
        """What is computed of each job. Those to explain, and health checks, are taken as they are."""
        if not isinstance(key, BatchKey):
            return jobs
        prepare = self._prepare
        if prepare is None:
            return [_Ready(job, job) for job in jobs]
        works = await self._guarded(key, len(jobs), self._preparing, lambda: prepare(key, jobs))
        return [
            work if isinstance(work, ServerError) else _Ready(job, work) for job, work in zip(jobs, works, strict=True)
        ]

    async def _compute_batch(self, key: BatchKey | _Explaining | None, ready: Sequence[Any]) -> Sequence[Any]:
        """A batch on the device thread; without a key it is a health check, which a working device answers."""
        if key is None:
            await self._probe()
            return [None] * len(ready)
        if isinstance(key, _Explaining):
            return await self._guarded(key, len(ready), self._device, lambda: self._explain(key.key, ready))
        works = [each.work for each in ready]
        answers = await self._guarded(key, len(ready), self._device, lambda: self._compute(key, works))
        self._drift.offer(key, [each.job for each in ready], answers)
        return answers

    async def _guarded(
        self, key: BatchKey | _Explaining, num_jobs: int, thread: ThreadPoolExecutor, work: Callable[[], A]
    ) -> A:
        """The result of a batch's work; when that fails, the device shows that it still does the simplest."""
        try:
            return await self._on_device(work, thread)
        except UnavailableError:
            raise
        except Exception as error:  # the batch will be split: one job alone is the culprit, and has the traceback
            logger.error("a batch of %d for %s failed: %r", num_jobs, key, error, exc_info=num_jobs == 1)
            await self._probe()
            raise

    async def _on_device(self, work: Callable[[], A], thread: ThreadPoolExecutor) -> A:
        """The result of work on one of the threads; gives this engine up when that takes longer than any batch can."""
        working = asyncio.get_running_loop().run_in_executor(thread, work)
        await asyncio.wait([working], timeout=HANGS_AFTER_S)
        if not working.done():
            logger.critical("the device hangs: it has worked for %g s on one batch", HANGS_AFTER_S)
            self._broken.set()
            raise UnavailableError("the device hangs", retry_after_s=1)
        return working.result()

    async def _probe(self) -> None:
        """Raises UnavailableError, and gives this engine up, when the device fails at the simplest work."""
        try:
            await self._on_device(self._check_device, self._device)
        except UnavailableError:
            raise
        except Exception as error:
            logger.critical("the device works no more", exc_info=error)
            self._broken.set()
            raise UnavailableError(f"the device works no more: {error}", retry_after_s=1) from error


def _prediction(
    answer: Answer[Any, Any], top_k: TopK, schedule: Schedule, version: int, auto: Choice | None
) -> Prediction:
    return Prediction(
        top_k=top_k,
        schedule=schedule,
        batch_size=answer.batch_size,
        config_version=version,
        queue_s=answer.wait_s,
        inference_s=answer.run_s,
        auto=auto,
    )
