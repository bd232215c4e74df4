"""The engine: deployment `r`, batcher and device thread behind the `Engine` protocol, in whichever process holds it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from server.calibration.curve import Curve
from server.config_store import ConfigStore
from server.dial import AutoR, RSetting, Schedule
from server.engine.auto import AutoDial
from server.engine.batcher import Answer, Batcher
from server.engine.knob import Rung
from server.errors import DeadlineError, NotFoundError, UnavailableError
from server.metrics import CONFIG_VERSION, BatchMetrics
from server.types import (
    BatchKey,
    Choice,
    Deployment,
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
RunBatch = Callable[[BatchKey, Sequence[Job]], Sequence[TopK]]
"""Computes one batch on the device: every job of it under the key's model and schedule; answers in order."""

ExplainBatch = Callable[[BatchKey, Sequence[Job]], Sequence[tuple[TopK, Merges]]]
"""The same for jobs that ask what merged."""

CHECK_TIMEOUT_S = 10.0

HANGS_AFTER_S = 300.0
"""A device that works on one batch for so long hangs; compiling a schedule for the first time takes less."""


@dataclass(frozen=True, slots=True)
class _Explaining:
    """What jobs to explain are batched by: never with jobs to classify, which take another way through the device."""

    key: BatchKey


class LocalEngine:
    """The engine of this process. One thread runs the device, so that batches never overlap.

    Args:
        models: The loaded models, the default first.
        run_batch: The device; a function of its input is enough for a test.
        explain_batch: The device for jobs that ask what merged.
        check_device: Raises when the device no longer works; called on the device's thread.
        store: The deployment `r` of each model.
        steps: What `auto` chooses from, for each model: r=0 first, then ever faster. Where a model has none, r=0 alone.
        curves: What was measured of the models, those that have a curve.
        max_batch_size: Most images in a batch.
        max_queue_size: Most images waiting.
        batch_timeout_s: Age at which a waiting image goes before fuller batches.

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
        steps: Mapping[str, Sequence[Rung]] | None = None,
        curves: Mapping[str, Curve] | None = None,
        check_device: Callable[[], None] = lambda: None,
        max_batch_size: int = 32,
        max_queue_size: int = 256,
        batch_timeout_s: float = 0.1,
    ) -> None:
        self._models = dict(models)
        self._compute, self._explain = run_batch, explain_batch
        self._check_device = check_device
        self._broken = asyncio.Event()
        self._store = store
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        # A key, a job and an answer are of one kind: classification, explanation, or a health check's None.
        self._batcher = Batcher[Any, Job | None, Any](
            self._run_batch,
            max_batch_size=max_batch_size,
            max_queue_size=max_queue_size,
            batch_timeout_s=batch_timeout_s,
            observer=BatchMetrics(),
        )
        for name, info in self._models.items():
            info.check(store.deployment(name).r)
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
        CONFIG_VERSION.set(store.version)

    def start(self) -> None:
        """Begins to serve; call it inside a running event loop."""
        self._batcher.start().add_done_callback(lambda _: self._broken.set())

    async def broken(self) -> None:
        """Returns when this engine can serve no more: its device or its batch loop is gone, or it was closed."""
        await self._broken.wait()

    async def close(self) -> None:
        """Answers what waits, then stops."""
        await self._batcher.close()
        self._device.shutdown()

    def catalog(self) -> dict[str, ModelInfo]:
        return self._models

    async def classify(self, job: Job) -> Prediction:
        info, deployment, r = self._asked(job)
        if isinstance(r, AutoR):
            answer = await self._batcher.submit(self._auto[info.name].open(r), job, job.timeout_s)
        else:
            answer = await self._batcher.submit(info.batch_key(info.schedule(r)), job, job.timeout_s)
        assert isinstance(answer.key, BatchKey)  # only a health check is answered without one
        auto = self._choice(info.name, answer.key.schedule, r) if isinstance(r, AutoR) else None
        return _prediction(answer, answer.result, answer.key.schedule, deployment, auto)

    async def explain(self, job: Job) -> Explanation:
        info, deployment, r = self._asked(job)
        auto = await self.choose(info.name, r) if isinstance(r, AutoR) else None
        schedule = auto.schedule if auto else info.schedule(r)
        answer = await self._batcher.submit(_Explaining(info.batch_key(schedule)), job, job.timeout_s)
        top_k, merges = answer.result
        return Explanation(_prediction(answer, top_k, schedule, deployment, auto), merges)

    def _asked(self, job: Job) -> tuple[ModelInfo, Deployment, RSetting]:
        """The job's model, its deployment at this moment, and the `r` that holds for the job."""
        info = find_model(self._models, job.model)
        deployment = self._store.deployment(job.model)
        return info, deployment, deployment.r if job.r is None else job.r

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

    async def deployment(self, model: str) -> Deployment:
        find_model(self._models, model)
        return self._store.deployment(model)

    async def set_r(self, model: str, r: RSetting, expected_version: int | None) -> Deployment:
        find_model(self._models, model).check(r)
        deployment = self._store.set_r(model, r, expected_version)
        CONFIG_VERSION.set(deployment.config_version)
        return deployment

    async def check(self) -> None:
        try:
            await self._batcher.submit(None, None, CHECK_TIMEOUT_S, urgent=True)
        except DeadlineError as error:
            raise UnavailableError(f"the engine does not answer: {error.message}", retry_after_s=1) from None

    async def _run_batch(self, key: BatchKey | _Explaining | None, jobs: Sequence[Job | None]) -> Sequence[Any]:
        """A batch on the device thread; without a key it is a health check, which a working device answers."""
        if key is None:
            await self._probe()
            return [None] * len(jobs)
        try:
            if isinstance(key, _Explaining):
                return await self._on_device(lambda: self._explain(key.key, cast(Sequence[Job], jobs)))
            return await self._on_device(lambda: self._compute(key, cast(Sequence[Job], jobs)))
        except UnavailableError:
            raise
        except Exception as error:  # the batch will be split: one job alone is the culprit, and has the traceback
            logger.error("a batch of %d for %s failed: %r", len(jobs), key, error, exc_info=len(jobs) == 1)
            await self._probe()
            raise

    async def _on_device(self, work: Callable[[], A]) -> A:
        """The result of work on the device's thread; gives this engine up when that takes longer than any batch can."""
        working = asyncio.get_running_loop().run_in_executor(self._device, work)
        await asyncio.wait([working], timeout=HANGS_AFTER_S)
        if not working.done():
            logger.critical("the device hangs: it has worked for %g s on one batch", HANGS_AFTER_S)
            self._broken.set()
            raise UnavailableError("the device hangs", retry_after_s=1)
        return working.result()

    async def _probe(self) -> None:
        """Raises UnavailableError, and gives this engine up, when the device fails at the simplest work."""
        try:
            await self._on_device(self._check_device)
        except UnavailableError:
            raise
        except Exception as error:
            logger.critical("the device works no more", exc_info=error)
            self._broken.set()
            raise UnavailableError(f"the device works no more: {error}", retry_after_s=1) from error


def _prediction(
    answer: Answer[Any, Any], top_k: TopK, schedule: Schedule, deployment: Deployment, auto: Choice | None
) -> Prediction:
    return Prediction(
        top_k=top_k,
        schedule=schedule,
        batch_size=answer.batch_size,
        config_version=deployment.config_version,
        queue_s=answer.wait_s,
        inference_s=answer.run_s,
        auto=auto,
    )
