"""Batches in progress. Each goes through a preparing and a computing stage, or through the computing stage alone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic

from server.batching.jobs import A, Job, K, P
from server.batching.splitting import run_split
from server.errors import EngineError, ServerError, UnavailableError

logger = logging.getLogger(__name__)

Stage = Callable[[K, Sequence[Any]], Awaitable[Sequence[Any]]]
"""Computes a result for each payload of a batch, in order, or that payload's ServerError. Calls come in the order of
the batches. A call may come before the previous one has returned; the stage then takes them one after the other.
"""

MOST_UNDER_WAY = 4
"""Most batches in progress when all waiting batches are full: one computes, one is launched behind it, and two are in
the preparing stage, which then never waits for the event loop.
"""


class Pipeline(Generic[K, P, A]):
    """Takes batches through their stages.

    Args:
        prepare: Turns each payload into the input of `compute`; None if `compute` takes payloads.
        compute: Computes the results.
        ran: Receives each batch that ran: its key and jobs, the outcome of each, the time when it was taken (seconds of
            the clock), and the seconds in its slower stage, which are the pace of such batches.
        stirred: Is set whenever a batch leaves a stage.
        clock: Monotonic seconds.

    Attributes:
        num_under_way: Batches that have not left yet.
    """

    def __init__(
        self,
        prepare: Stage[K] | None,
        compute: Stage[K],
        ran: Callable[[K, list[Job[K, P, A]], list[Any], float, float], None],
        stirred: asyncio.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prepare, self._compute, self._ran, self._stirred, self._clock = prepare, compute, ran, stirred, clock
        self._tasks: dict[asyncio.Task[None], list[Job[K, P, A]]] = {}
        self._num_preparing = 0
        self._left_preparing = self._left_computing = clock()

    @property
    def num_under_way(self) -> int:
        return len(self._tasks)

    def has_room(self, is_full: bool) -> bool:
        """Whether to take the next batch now. A batch that may still grow waits until the first stage is free.

        Args:
            is_full: The next batch has the most jobs that a batch may have.
        """
        if self._prepare is None:
            return not self._tasks
        is_free = self._num_preparing == 0 and len(self._tasks) < 2
        return is_free or (is_full and self._num_preparing < 2 and len(self._tasks) < MOST_UNDER_WAY)

    def begin(self, key: K, jobs: list[Job[K, P, A]]) -> None:
        """Starts a batch."""
        self._num_preparing += 1
        task = asyncio.create_task(self._carry(key, jobs), name="batch")
        self._tasks[task] = jobs
        task.add_done_callback(self._left)

    async def finished(self, of: Callable[[P], bool]) -> None:
        """Waits for the present batches with such payloads to leave."""
        tasks = [task for task, jobs in self._tasks.items() if any(of(job.payload) for job in jobs)]
        if tasks:
            await asyncio.wait(tasks)

    def stop(self) -> None:
        """Ends all batches; their jobs are answered with an error."""
        for task in self._tasks:
            task.cancel()

    def _left(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._stirred.set()

    async def _carry(self, key: K, jobs: list[Job[K, P, A]]) -> None:
        started = self._clock()
        payloads: list[Any] = [job.payload for job in jobs]
        prepare_s = 0.0
        try:
            try:
                if self._prepare is not None:
                    payloads = await _made(self._prepare, key, payloads)
                    left = self._clock()
                    prepare_s, self._left_preparing = left - max(started, self._left_preparing), left
            finally:
                self._num_preparing -= 1
                self._stirred.set()
            began = self._clock()
            outcomes = await _made(self._compute, key, payloads)
            left = self._clock()
            compute_s, self._left_computing = left - max(began, self._left_computing), left
        except asyncio.CancelledError:
            for job in jobs:
                job.asked.fail(UnavailableError("the engine was stopped", retry_after_s=1))
            raise
        try:
            self._ran(key, jobs, outcomes, started, max(prepare_s, compute_s))
        except Exception as error:  # a fault of ours
            logger.exception("a batch could not be ended")
            for job in jobs:  # only jobs without an answer fail
                job.asked.fail(EngineError(f"the batch could not be ended: {error!r}"))


async def _made(stage: Stage[K], key: K, payloads: Sequence[Any]) -> list[Any]:
    """The outcomes of a stage, or the errors. Payloads that already are errors skip the stage."""
    outcomes = dict(enumerate(payloads))
    good = {index: each for index, each in outcomes.items() if not isinstance(each, ServerError)}
    if good:
        outcomes |= zip(good, await run_split(lambda part: stage(key, part), list(good.values())), strict=True)
    return list(outcomes.values())
