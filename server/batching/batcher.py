"""Dynamic batching by key. It knows neither torch nor HTTP: payloads go in, one answer each comes out.

Work-conserving: while the device is idle whatever waits is taken at once, and batches grow only while it is busy. A job
may leave its key open: it gets one when its batch is formed, by the load of that moment, or fills up another's batch.
Where batches are prepared first, one is prepared while the one before computes.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from server.batching.policy import Load
from server.batching.speed import Rate, Speed
from server.batching.splitting import run_split
from server.errors import DeadlineError, QueueFullError, ServerError, UnavailableError

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
P = TypeVar("P")
A = TypeVar("A")
ARRIVALS_WINDOW_S = 2.0
"""Over which arrivals are counted: long enough that chance is small, short enough to follow a wave."""

BATCH_SHARE = 0.3
"""A batch takes no more than this share of the time that its first job was given: it also waits for the one before."""

K_contra = TypeVar("K_contra", contravariant=True)


class Observer(Protocol[K_contra]):
    """Is told what the batcher does; metrics are made of it."""

    def batch_ran(self, key: K_contra, waits_s: Sequence[float], run_s: float) -> None:
        """`len(waits_s)` jobs of a batch were answered, which kept the device for that long."""
        ...

    def job_dropped(self, reason: str) -> None:
        """A job, not urgent, was given up before it was computed: "cancelled" or "deadline"."""
        ...


@dataclass(frozen=True, slots=True)
class Open(Generic[K]):
    """Instead of a key: which keys would do.

    Attributes:
        group: Open jobs of one group wait together, and one choice is made for them.
        allows: Whether the job may be computed under a key.
        choose: The key for a batch that this job leads, by the load of the moment; one that it allows.
    """

    group: Hashable
    allows: Callable[[K], bool]
    choose: Callable[[Load], K]


@dataclass(frozen=True, slots=True)
class Answer(Generic[K, A]):
    """One job's result, and the batch that it was computed in; seconds in the queue, and from then on."""

    result: A
    key: K
    batch_size: int
    wait_s: float
    run_s: float


@dataclass(frozen=True, slots=True)
class _Group:
    """The queue of the open jobs of a group, beside those of keys."""

    name: Hashable


@dataclass(slots=True, eq=False)
class _Waiting(Generic[K, P, A]):
    payload: P
    open: Open[K] | None
    enqueued_at: float
    deadline: float
    urgent: bool
    is_queued: bool = True
    future: asyncio.Future[Answer[K, A]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher(Generic[K, P, A]):
    """Queues jobs by key and feeds them to one device, which computes one batch of one key at a time.

    Every accepted job gets exactly one answer: its result or a ServerError. The fullest queue goes first, unless some
    job has waited `batch_timeout_s` or nears its deadline: then that one's does, so that no rare key starves.

    Args:
        run_batch: Computes one batch; must give one result for each payload, in order, or the ServerError of that one.
        max_batch_size: Most jobs in a batch.
        max_queue_size: Most jobs waiting; more are refused.
        batch_timeout_s: Age at which a job goes before fuller batches.
        prepare: Makes of each payload, or one batch of them, what `run_batch` gets instead, while that computes the
            batch before. No batch is taken from the queue before the last one has left this stage.
        observer: Is told of batches and drops.
        idle: Spends the time while nothing waits, until its event is set; what it does then delays the next batch.
        clock: Monotonic seconds.

    Attributes:
        speed: How long batches take, learned from those that ran.
    """

    def __init__(
        self,
        run_batch: Callable[[K, Sequence[Any]], Awaitable[Sequence[A | ServerError]]],
        *,
        max_batch_size: int,
        max_queue_size: int,
        batch_timeout_s: float,
        prepare: Callable[[K, Sequence[P]], Awaitable[Sequence[Any]]] | None = None,
        observer: Observer[K] | None = None,
        idle: Callable[[asyncio.Event], Awaitable[object]] = asyncio.Event.wait,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_batch, self._prepare = run_batch, prepare
        self._max_batch_size = max_batch_size
        self._max_queue_size = max_queue_size
        self._batch_timeout_s = batch_timeout_s
        self._observer = observer
        self._idle = idle
        self._clock = clock
        self._queues: dict[K | _Group, list[_Waiting[K, P, A]]] = {}
        self.speed = Speed[K]()
        self._arrivals = Rate(ARRIVALS_WINDOW_S)
        self._batch_s = 0.0
        self._per_job_s = 0.0
        self._num_waiting = 0
        self._arrived = asyncio.Event()
        self._closed = False
        self._loop: asyncio.Task[None] | None = None
        self._computing: asyncio.Task[None] | None = None  # a batch that has left its preparation

    @property
    def num_waiting(self) -> int:
        """Jobs queued whose callers still wait."""
        return self._num_waiting

    def start(self) -> asyncio.Task[None]:
        """Begins to serve; call it inside a running event loop. The task ends only by `close`."""
        self._loop = asyncio.create_task(self._serve(), name="batcher")
        return self._loop

    async def submit(self, key: K | Open[K], payload: P, timeout_s: float, *, urgent: bool = False) -> Answer[K, A]:
        """Queues one job and waits for its answer. Cancelling the call withdraws the job.

        Args:
            key: Jobs are batched with others of the same key only; an open job goes with any key that it allows.
            payload: What `run_batch` gets.
            timeout_s: Time until the answer is worth nothing.
            urgent: Goes first and is never refused for want of room; for health checks.

        Raises:
            QueueFullError: Too many jobs wait; it says when to come back.
            DeadlineError: The time is over.
            UnavailableError: The batcher is closed.
            EngineError: The batch failed, and so did the job alone.
        """
        if self._closed or self._loop is None or self._loop.done():
            raise UnavailableError("the engine is shutting down", retry_after_s=1)
        now = self._clock()
        self._arrivals.add(now)
        if self._num_waiting >= self._max_queue_size and not urgent:
            raise QueueFullError(
                f"{self._num_waiting} images wait already; at most {self._max_queue_size} may",
                retry_after_s=self._num_waiting * self._per_job_s,
            )
        job = _Waiting[K, P, A](payload, key if isinstance(key, Open) else None, now, now + timeout_s, urgent)
        self._queues.setdefault(_Group(key.group) if isinstance(key, Open) else key, []).append(job)
        self._num_waiting += 1
        self._arrived.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await job.future
        except TimeoutError:
            raise DeadlineError(f"no answer within {timeout_s:.3g} s", timeout_s=timeout_s) from None
        finally:
            if job.is_queued:
                self._give_up(job, "deadline" if self._clock() >= job.deadline else "cancelled")

    async def close(self) -> None:
        """Takes no more jobs, answers all that wait, and returns when the device is idle."""
        self._closed = True
        self._arrived.set()
        if self._loop is not None:
            await self._loop

    async def _serve(self) -> None:
        try:
            while True:
                # Lets callers that are ready in this turn of the loop join the batch; costs no waiting.
                await asyncio.sleep(0)
                taken = self._take()
                if taken is not None:
                    await self._run(*taken)
                elif self._computing is not None:
                    await self._computed_or_arrived(self._computing)
                elif self._closed:
                    return
                else:
                    self._arrived.clear()
                    await self._idle(self._arrived)
        finally:
            if self._computing is not None:
                self._computing.cancel()

    async def _computed_or_arrived(self, computing: asyncio.Task[None]) -> None:
        """Waits while a batch computes and nothing else is there to be prepared."""
        self._arrived.clear()
        arrived = asyncio.ensure_future(self._arrived.wait())
        try:
            await asyncio.wait([computing, arrived], return_when=asyncio.FIRST_COMPLETED)
        finally:
            arrived.cancel()
        if computing.done():
            await self._computed()

    async def _computed(self) -> None:
        """Waits until no batch computes."""
        if self._computing is not None:
            await self._computing
            self._computing = None

    def _take(self) -> tuple[K, list[_Waiting[K, P, A]]] | None:
        """Removes the next batch from the queues, and the jobs that cannot be answered in time."""
        now = self._clock()
        while self._prune(now):
            first = self._next_queue(now)
            leader = min(self._queues[first], key=self._due_at)
            key = leader.open.choose(self.load()) if leader.open else first
            assert not isinstance(key, _Group)
            batch = self._batch(first, key, self._most(key, BATCH_SHARE * (leader.deadline - leader.enqueued_at)))
            is_busy = self._computing is not None and not self._computing.done()
            done_at = now + (1 + is_busy) * self.speed(key, len(batch))
            late = [job for job in batch if job.deadline < done_at and not job.urgent]
            for job in late:  # they would only keep the others waiting
                self._give_up(job, "deadline")
            if not late:
                for job in batch:
                    self._leave_queue(job)
                return key, batch
        return None

    def _prune(self, now: float) -> bool:
        """Clears the queues of what has left them or is too late; says whether anything waits."""
        for queue_key, queue in list(self._queues.items()):
            for job in queue:
                if job.is_queued and job.deadline <= now:
                    self._give_up(job, "deadline")
            self._queues[queue_key] = [job for job in queue if job.is_queued]
            if not self._queues[queue_key]:
                del self._queues[queue_key]
        return bool(self._queues)

    def _next_queue(self, now: float) -> K | _Group:
        """The one with the oldest job that is due, else the fullest."""
        due = {key: min(self._due_at(job) for job in queue) for key, queue in self._queues.items()}
        key = min(due, key=lambda key: due[key])
        if due[key] > now:
            key = max(self._queues, key=lambda key: (min(len(self._queues[key]), self._max_batch_size), -due[key]))
        return key

    def _most(self, key: K, within_s: float) -> int:
        """How many jobs a batch can have that is to be done within a time; at least one."""
        a, b = self.speed.line(key) or (0.0, 0.0)
        fitting = (within_s - a) / b if b else self._max_batch_size
        return max(1, min(int(fitting), self._max_batch_size))

    def _batch(self, first: K | _Group, key: K, most: int) -> list[_Waiting[K, P, A]]:
        """The jobs of a queue that go under a key, the most urgent first, and others that fill up their batch."""
        batch: list[_Waiting[K, P, A]] = []
        others = [queue for queue in self._queues if queue != first and (queue == key or isinstance(queue, _Group))]
        for queue in (first, *others):
            fitting = (job for job in self._queues[queue] if job.open is None or job.open.allows(key))
            batch += heapq.nsmallest(most - len(batch), fitting, key=self._due_at)
        return batch

    def load(self) -> Load:
        """What waits and what comes, at this moment."""
        now = self._clock()
        left_s = sorted(job.deadline - now for queue in self._queues.values() for job in queue if job.is_queued)
        return Load(left_s, self._arrivals(now), self._max_batch_size)

    def _leave_queue(self, job: _Waiting[K, P, A]) -> None:
        self._num_waiting -= job.is_queued
        job.is_queued = False

    def _give_up(self, job: _Waiting[K, P, A], reason: str) -> None:
        """Takes a job out of the queue without a result; its caller may be gone."""
        _fail(job, DeadlineError("the deadline passed in the queue"))
        self._leave_queue(job)
        if not job.urgent:
            self._tell(lambda observer: observer.job_dropped(reason))

    def _due_at(self, job: _Waiting[K, P, A]) -> float:
        """When a job must go before fuller batches: at once, of age, or early enough to be answered in time."""
        if job.urgent:
            return float("-inf")
        num_stages = 1 if self._prepare is None else 2
        return min(job.enqueued_at + self._batch_timeout_s, job.deadline - (1 + num_stages) * self._batch_s)

    async def _run(self, key: K, jobs: list[_Waiting[K, P, A]]) -> None:
        """Takes a batch through both stages; returns when the first is free again."""
        started = self._clock()
        payloads: list[Any] = [job.payload for job in jobs]
        if self._prepare is None:
            await self._compute(key, jobs, payloads, started)
            return
        payloads = await self._stage(self._prepare, key, jobs, payloads)
        prepare_s = self._clock() - started
        try:
            await self._computed()
        except asyncio.CancelledError:
            _stop(jobs)
            raise
        self._computing = asyncio.create_task(self._compute(key, jobs, payloads, started, prepare_s), name="batch")

    async def _stage(
        self,
        work: Callable[[K, Sequence[Any]], Awaitable[Sequence[Any]]],
        key: K,
        jobs: list[_Waiting[K, P, A]],
        payloads: Sequence[Any],
    ) -> list[Any]:
        """What a stage makes of each payload, or its error; those that have one already are left out."""
        outcomes = dict(enumerate(payloads))
        good = {index: each for index, each in outcomes.items() if not isinstance(each, ServerError)}
        if good:
            try:
                made = await run_split(lambda part: work(key, part), list(good.values()))
            except asyncio.CancelledError:
                _stop(jobs)
                raise
            outcomes |= zip(good, made, strict=True)
        return list(outcomes.values())

    async def _compute(
        self,
        key: K,
        jobs: list[_Waiting[K, P, A]],
        payloads: Sequence[Any],
        started: float,
        prepare_s: float = 0.0,
    ) -> None:
        """Computes a batch and answers its jobs."""
        began = self._clock()
        outcomes = await self._stage(self._run_batch, key, jobs, payloads)
        ended = self._clock()
        # The pace of such batches: the slower stage alone counts, for the other works on their neighbours meanwhile.
        pace_s = max(prepare_s, ended - began)
        waits_s = [started - job.enqueued_at for job in jobs]
        for job, outcome, wait_s in zip(jobs, outcomes, waits_s, strict=True):
            if isinstance(outcome, ServerError):
                _fail(job, outcome)
            elif not job.future.done():
                job.future.set_result(Answer(outcome, key, len(jobs), wait_s, ended - started))
        answered = [
            each for each, outcome in zip(waits_s, outcomes, strict=True) if not isinstance(outcome, ServerError)
        ]
        if len(answered) == len(jobs):  # else it was split, and its time says nothing of a batch
            self.speed.observe(key, len(jobs), pace_s)
            self._batch_s = _moved(self._batch_s, pace_s)
            self._per_job_s = _moved(self._per_job_s, pace_s / len(jobs))
        if answered:
            self._tell(lambda observer: observer.batch_ran(key, answered, pace_s))

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


def _fail(job: _Waiting[K, P, A], error: ServerError) -> None:
    if not job.future.done():
        job.future.set_exception(error)


def _stop(jobs: Sequence[_Waiting[Any, Any, Any]]) -> None:
    for job in jobs:
        _fail(job, UnavailableError("the engine was stopped", retry_after_s=1))
