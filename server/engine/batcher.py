"""Dynamic batching by key. It knows neither torch nor HTTP: payloads go in, one answer each comes out.

Work-conserving: while the device is idle whatever waits is taken at once, and batches grow only while it is busy.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from server.errors import DeadlineError, EngineError, QueueFullError, ServerError, UnavailableError

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
P = TypeVar("P")
A = TypeVar("A")
K_contra = TypeVar("K_contra", contravariant=True)


class Observer(Protocol[K_contra]):
    """Is told what the batcher does; metrics are made of it."""

    def batch_ran(self, key: K_contra, waits_s: Sequence[float], run_s: float) -> None:
        """A batch of `len(waits_s)` jobs was answered."""
        ...

    def job_dropped(self, key: K_contra, reason: str) -> None:
        """A job was given up before it was computed: "cancelled" or "deadline"."""
        ...


@dataclass(frozen=True, slots=True)
class Answer(Generic[A]):
    """One job's result, and the batch that it was computed in; durations in seconds."""

    result: A
    batch_size: int
    wait_s: float
    run_s: float


@dataclass(slots=True, eq=False)
class _Waiting(Generic[P, A]):
    payload: P
    enqueued_at: float
    deadline: float
    urgent: bool
    is_queued: bool = True
    future: asyncio.Future[Answer[A]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher(Generic[K, P, A]):
    """Queues jobs by key and feeds them to one device, a batch of one key at a time.

    Every accepted job gets exactly one answer: its result or a ServerError. The fullest key goes first, unless some
    job has waited `batch_timeout_s` or nears its deadline: then that one's key does, so that no rare key starves.

    Args:
        run_batch: Computes one batch; must give one result for each payload, in order.
        max_batch_size: Most jobs in a batch.
        max_queue_size: Most jobs waiting; more are refused.
        batch_timeout_s: Age at which a job goes before fuller batches.
        observer: Is told of batches and drops.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        run_batch: Callable[[K, Sequence[P]], Awaitable[Sequence[A]]],
        *,
        max_batch_size: int,
        max_queue_size: int,
        batch_timeout_s: float,
        observer: Observer[K] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_batch = run_batch
        self._max_batch_size = max_batch_size
        self._max_queue_size = max_queue_size
        self._batch_timeout_s = batch_timeout_s
        self._observer = observer
        self._clock = clock
        self._queues: dict[K, list[_Waiting[P, A]]] = {}
        self._batch_s = 0.0
        self._per_job_s = 0.0
        self._num_waiting = 0
        self._arrived = asyncio.Event()
        self._closed = False
        self._loop: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Jobs queued whose callers still wait."""
        return self._num_waiting

    def start(self) -> asyncio.Task[None]:
        """Begins to serve; call it inside a running event loop. The task ends only by `close`."""
        self._loop = asyncio.create_task(self._serve(), name="batcher")
        return self._loop

    async def submit(self, key: K, payload: P, timeout_s: float, *, urgent: bool = False) -> Answer[A]:
        """Queues one job and waits for its answer. Cancelling the call withdraws the job.

        Args:
            key: Jobs are batched with others of the same key only.
            payload: What `run_batch` gets.
            timeout_s: Time until the answer is worth nothing.
            urgent: Goes first and is never refused for want of room; for health checks.

        Raises:
            QueueFullError: Too many jobs wait; it says when to come back.
            DeadlineError: The time is over.
            UnavailableError: The batcher is closed.
            EngineError: The batch failed.
        """
        if self._closed or self._loop is None or self._loop.done():
            raise UnavailableError("the engine is shutting down", retry_after_s=1)
        if self._num_waiting >= self._max_queue_size and not urgent:
            raise QueueFullError(
                f"{self._num_waiting} images wait already; at most {self._max_queue_size} may",
                retry_after_s=self._num_waiting * self._per_job_s,
            )
        now = self._clock()
        job = _Waiting[P, A](payload, now, now + timeout_s, urgent)
        self._queues.setdefault(key, []).append(job)
        self._num_waiting += 1
        self._arrived.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await job.future
        except TimeoutError:
            raise DeadlineError(f"no answer within {timeout_s:.3g} s", timeout_s=timeout_s) from None
        finally:
            self._leave_queue(job)

    async def close(self) -> None:
        """Takes no more jobs, answers all that wait, and returns when the device is idle."""
        self._closed = True
        self._arrived.set()
        if self._loop is not None:
            await self._loop

    async def _serve(self) -> None:
        while True:
            # Lets callers that are ready in this turn of the loop join the batch; costs no waiting.
            await asyncio.sleep(0)
            taken = self._take()
            if taken is not None:
                await self._run(*taken)
            elif self._closed:
                return
            else:
                self._arrived.clear()
                await self._arrived.wait()

    def _take(self) -> tuple[K, list[_Waiting[P, A]]] | None:
        """Removes the next batch from the queues, and the jobs that nobody waits for any more."""
        now = self._clock()
        for key, queue in list(self._queues.items()):
            self._queues[key] = [job for job in queue if not self._is_gone(key, job, now)]
            if not self._queues[key]:
                del self._queues[key]
        if not self._queues:
            return None
        due = {key: min(self._due_at(job) for job in queue) for key, queue in self._queues.items()}
        key = min(due, key=lambda key: due[key])
        if due[key] > now:
            key = max(self._queues, key=lambda key: (min(len(self._queues[key]), self._max_batch_size), -due[key]))
        batch = heapq.nsmallest(self._max_batch_size, self._queues[key], key=self._due_at)
        for job in batch:
            self._leave_queue(job)
        self._queues[key] = [job for job in self._queues[key] if job.is_queued]
        return key, batch

    def _leave_queue(self, job: _Waiting[P, A]) -> None:
        self._num_waiting -= job.is_queued
        job.is_queued = False

    def _is_gone(self, key: K, job: _Waiting[P, A], now: float) -> bool:
        if not job.future.done():
            if job.deadline > now:
                return False
            _fail(job, DeadlineError("the deadline passed in the queue"))
        self._tell(lambda observer: observer.job_dropped(key, "deadline" if job.deadline <= now else "cancelled"))
        return True

    def _due_at(self, job: _Waiting[P, A]) -> float:
        """When a job must go before fuller batches: at once, of age, or early enough to be answered in time."""
        if job.urgent:
            return float("-inf")
        return min(job.enqueued_at + self._batch_timeout_s, job.deadline - 2 * self._batch_s)

    async def _run(self, key: K, jobs: list[_Waiting[P, A]]) -> None:
        started = self._clock()
        try:
            results = await self._run_batch(key, [job.payload for job in jobs])
            if len(results) != len(jobs):
                raise EngineError(f"the engine gave {len(results)} answers to {len(jobs)} images")
        except asyncio.CancelledError:
            for job in jobs:
                _fail(job, UnavailableError("the engine was stopped", retry_after_s=1))
            raise
        except Exception as error:  # whatever one batch raises is the answer to that batch; the loop goes on
            answer = error if isinstance(error, ServerError) else EngineError(f"the model failed: {error!r}")
            for job in jobs:
                _fail(job, answer)
            return
        run_s = self._clock() - started
        waits_s = [started - job.enqueued_at for job in jobs]
        for job, result, wait_s in zip(jobs, results, waits_s, strict=True):
            if not job.future.done():
                job.future.set_result(Answer(result, len(jobs), wait_s, run_s))
        self._batch_s = _moved(self._batch_s, run_s)
        self._per_job_s = _moved(self._per_job_s, run_s / len(jobs))
        self._tell(lambda observer: observer.batch_ran(key, waits_s, run_s))

    def _tell(self, event: Callable[[Observer[K]], None]) -> None:
        """Tells the observer; its failure is not the jobs'."""
        if self._observer is None:
            return
        try:
            event(self._observer)
        except Exception:  # a full disk under the metrics, say
            logger.exception("the batcher's observer failed")


def _moved(mean: float, value: float) -> float:
    """A moving mean that starts at its first value."""
    return 0.8 * mean + 0.2 * value if mean else value


def _fail(job: _Waiting[P, A], error: ServerError) -> None:
    if not job.future.done():
        job.future.set_exception(error)
