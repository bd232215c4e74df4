"""Dynamic batching by key, without torch or HTTP. Each request gets exactly one answer.

Work-conserving: an idle device takes waiting jobs at once, and batches grow only while it is busy. A request may
leave its key open. It then gets a key when its batch is formed, by the load of that moment, or fills up the batch of
another key. With a preparing stage, one batch is prepared while the one before computes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from server.batching.jobs import A, Asked, Batched, Job, K, Open, P
from server.batching.pipeline import Pipeline, Stage
from server.batching.policy import Load
from server.batching.queues import Queues
from server.batching.speed import Mean, Speed
from server.deadlines import Deadlines
from server.errors import EngineError, QueueFullError, ServerError, UnavailableError

logger = logging.getLogger(__name__)

R = TypeVar("R")
K_contra = TypeVar("K_contra", contravariant=True)


class Observer(Protocol[K_contra]):
    """Receives the batcher's events, for metrics."""

    def batch_ran(self, key: K_contra, waits_s: Sequence[float], run_s: float) -> None:
        """A batch answered `len(waits_s)` jobs and kept the device busy for `run_s`."""
        ...

    def job_dropped(self, reason: str) -> None:
        """A job was given up before it was computed; `reason` is "cancelled" or "deadline"."""
        ...


class Batcher(Generic[K, P, A]):
    """Queues jobs by key and feeds them to one device, which computes one batch of one key at a time.

    Every accepted request gets exactly one answer: its results or a ServerError. `Queues` chooses the next jobs.

    Args:
        run_batch: The `Stage` that computes the results of a batch.
        max_batch_size: Most jobs in a batch.
        max_queue_size: Most jobs waiting; more are refused.
        batch_timeout_s: Age at which a job goes before fuller batches.
        prepare: A `Stage` before `run_batch` that turns each payload into its input. A batch may grow until this stage
            is free.
        observer: Receives batches and drops.
        watch: Receives every batch that ran: its key, its payloads, the outcome of each (a result or a ServerError),
            and the time when it was taken, in seconds of the clock.
        idle: Runs while nothing waits, until its event is set. Its work delays the next batch.
        clock: Monotonic seconds.
        is_fallback: Whether a slower backend would compute a batch of a key now, in place of its own.
        was_fallback: Whether a slower backend computed this result.

    Attributes:
        speed: Estimates of how long batches take, learned from those that ran.
    """

    def __init__(
        self,
        run_batch: Stage[K],
        *,
        max_batch_size: int,
        max_queue_size: int,
        batch_timeout_s: float,
        prepare: Stage[K] | None = None,
        observer: Observer[K] | None = None,
        watch: Callable[[K, Sequence[P], Sequence[Any], float], None] | None = None,
        idle: Callable[[asyncio.Event], Awaitable[object]] = asyncio.Event.wait,
        clock: Callable[[], float] = time.monotonic,
        is_fallback: Callable[[K], bool] = lambda key: False,
        was_fallback: Callable[[A], bool] = lambda result: False,
    ) -> None:
        self._max_queue_size, self._was_fallback = max_queue_size, was_fallback
        self._observer, self._watch, self._idle, self._clock = observer, watch, idle, clock
        self.speed = Speed[K](clock, is_fallback)
        self._queues = Queues[K, P, A](
            self.speed,
            self._dropped,
            max_batch_size=max_batch_size,
            batch_timeout_s=batch_timeout_s,
            num_stages=1 if prepare is None else 2,
        )
        self._deadlines = Deadlines(self._queues.expire, clock)
        self._stage_s, self._per_job_s = Mean(0.2), Mean(0.2)
        self._between: list[tuple[Callable[[], Awaitable[None]], asyncio.Future[None]]] = []
        self._stirred = asyncio.Event()
        self._pipeline = Pipeline[K, P, A](prepare, run_batch, self._ran, self._stirred, clock)
        self._closed = False
        self._loop: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Queued jobs whose callers still wait."""
        return self._queues.num_waiting

    def load(self) -> Load:
        """The waiting jobs and the arrival rate at this moment."""
        return self._queues.load(self._clock())

    def start(self) -> asyncio.Task[None]:
        """Begins to serve. Call it inside a running event loop. The task ends only by `close`."""
        self._loop = asyncio.create_task(self._serve(), name="batcher")
        return self._loop

    def submit(
        self,
        key: K | Open[K],
        payloads: Sequence[P],
        deadline: float,
        finish: Callable[[Batched[K, A]], R],
    ) -> asyncio.Future[R]:
        """Queues a request's jobs; each may be computed in another batch. Cancelling the future withdraws them.

        Args:
            key: Jobs are batched with others of the same key only. An open job goes with any key that it allows. An
                open request has one payload, because two might get two keys.
            payloads: The inputs of `run_batch`.
            deadline: Seconds of the clock after which the answer is useless.
            finish: Turns the results into the caller's answer.

        Returns:
            A future of the answer. It may raise DeadlineError; EngineError, if the job failed in a batch and alone;
            UnavailableError, if the batcher was stopped; and the errors that `run_batch` gives for a payload.

        Raises:
            QueueFullError: Too many jobs wait. It says when to retry.
            UnavailableError: The batcher is closed.
        """
        assert payloads, "a request of nothing would never be answered"
        self._check_open()
        now = self._clock()
        self._queues.arrived(len(payloads), now)
        if self.num_waiting + len(payloads) > self._max_queue_size:
            raise QueueFullError(
                f"{self.num_waiting} images wait already; at most {self._max_queue_size} may",
                retry_after_s=self.num_waiting * self._per_job_s.value,
            )
        open_ = key if isinstance(key, Open) else None
        assert len(payloads) == 1 or open_ is None, "two open jobs might get two keys"
        results: list[Any] = [None] * len(payloads)
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        asked: Asked[Any, Any] = Asked(
            future, finish, Batched(results, None if open_ else key), len(payloads), deadline, []
        )
        asked.jobs = [Job(asked, index, each, open_, now, deadline) for index, each in enumerate(payloads)]
        self._queues.add(asked, key)
        future.add_done_callback(lambda _: self._queues.leave(asked))
        self._deadlines.watch(deadline)
        self._stirred.set()
        return future

    async def between_batches(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs work before the next batch is taken. Raises the work's own error, or UnavailableError."""
        self._check_open()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._between.append((work, done))
        self._stirred.set()
        await done

    async def finished(self, of: Callable[[P], bool]) -> None:
        """Waits until all present requests with such payloads are answered and none of their batches runs."""
        if unanswered := self._queues.unanswered(of):
            await asyncio.wait(unanswered)
        await self._pipeline.finished(of)

    async def close(self) -> None:
        """Stops taking jobs, answers all that wait, and returns when the device is idle."""
        self._closed = True
        self._stirred.set()
        if self._loop is not None:
            await self._loop
        self._deadlines.close()

    def _check_open(self) -> None:
        if self._closed or self._loop is None or self._loop.done():
            raise UnavailableError("the engine is shutting down", retry_after_s=1)

    async def _serve(self) -> None:
        try:
            while True:
                # Lets callers that are ready in this turn of the loop join the batch, without a wait.
                await asyncio.sleep(0)
                self._stirred.clear()  # cleared before the checks below, so that a later arrival sets it again
                await self._do_between()
                if self._begin_next():
                    continue
                if self._pipeline.num_under_way:
                    await self._stirred.wait()
                elif self._closed:
                    return
                else:
                    await self._be_idle()
        finally:
            self._pipeline.stop()
            for _, done in self._between:
                if not done.done():
                    done.set_exception(UnavailableError("the engine was stopped", retry_after_s=1))

    def _begin_next(self) -> bool:
        """Starts the next batch if there is one to take; returns whether it did."""
        if not self._pipeline.has_room(self._queues.has_full_batch):
            return False
        try:
            taken = self._queues.take(self._clock(), self._pipeline.num_under_way)
        except Exception as error:  # a fault of ours must neither end the service nor repeat
            logger.exception("no batch could be formed of what waits")
            self._queues.fail_all(EngineError(f"no batch could be formed: {error!r}"))
            return False
        if taken is None:
            return False
        self._pipeline.begin(*taken)
        return True

    async def _be_idle(self) -> None:
        """Spends the time until something arrives."""
        try:
            await self._idle(self._stirred)
        except Exception:  # nobody waits for it
            logger.exception("work of the idle device failed")
            await self._stirred.wait()

    async def _do_between(self) -> None:
        """Does the queued work between batches, once each. Work that arrives meanwhile waits, so that batches do not
        starve.
        """
        for _ in range(len(self._between)):
            work, done = self._between[0]  # stays listed until it is done, so that a stop of the loop tells its caller
            if not done.done():  # otherwise nobody waits for it any more
                try:
                    await work()
                except Exception as error:  # the error belongs to the caller
                    if not done.done():
                        done.set_exception(error)
                else:
                    if not done.done():
                        done.set_result(None)
            del self._between[0]

    def _ran(self, key: K, jobs: list[Job[K, P, A]], outcomes: list[Any], started: float, pace_s: float) -> None:
        """Answers the jobs of a batch and learns from its time."""
        now = self._clock()
        run_s = now - started
        waits_s = []
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, ServerError):
                job.asked.fail(outcome)
            else:
                waits_s.append(started - job.enqueued_at)
                job.answer(outcome, len(jobs), waits_s[-1], run_s)
        self._queues.ran(key, now, pace_s)
        if len(waits_s) == len(jobs):  # a split batch tells nothing about the time of a whole one
            if len(was_fallback := set(map(self._was_fallback, outcomes))) == 1:
                self.speed.observe(key, len(jobs), pace_s, was_fallback.pop())
            self._stage_s.add(pace_s)
            self._per_job_s.add(pace_s / len(jobs))
            self._queues.stage_s = self._stage_s.value
        if waits_s:
            self._tell(lambda observer: observer.batch_ran(key, waits_s, pace_s))
        if self._watch is not None:
            try:
                self._watch(key, [job.payload for job in jobs], outcomes, started)
            except Exception:  # not the jobs' failure
                logger.exception("the watcher of the batches failed")

    def _dropped(self, reason: str) -> None:
        self._tell(lambda observer: observer.job_dropped(reason))

    def _tell(self, event: Callable[[Observer[K]], None]) -> None:
        """Calls the observer. Its failure does not fail the jobs."""
        if self._observer is None:
            return
        try:
            event(self._observer)
        except Exception:  # for example a full disk under the metrics
            logger.exception("the batcher's observer failed")
