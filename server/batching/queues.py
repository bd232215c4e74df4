"""The queues of the batcher, one for each key, and the choice of the next batch."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from server.batching.jobs import A, Asked, Job, K, Open, P
from server.batching.policy import Load
from server.batching.speed import MOST_LEARNED, SHORTEST, Rate, Speed
from server.errors import DeadlineError, ServerError
from server.recent import Recent

ARRIVALS_WINDOW_S = 2.0
"""Window for the arrival rate: long enough against chance, short enough to follow a wave."""

BATCH_SHARE = 0.3
"""Largest share of its first job's time that a batch may take: the job also waits for the batch before."""

TRY_AFTER_S = 1.0
"""When no batch of a key has run for so long, one job is tried although the estimate calls it late. Otherwise a slow
estimate would never change, because refused work is not measured. An idle device tries sooner if half of the
estimate would be enough, because estimates are never exact.
"""

TRY_SHARE, LONGEST_TRY_PAUSE_S = 0.1, 10.0
"""While other jobs wait, tries take at most this share of the time; the pause after a try is at most this long."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Key of the queue for the open jobs of a group."""

    name: Hashable


class Queues(Generic[K, P, A]):
    """The waiting jobs. The fullest queue goes first, unless a job of another queue is due.

    Args:
        speed: Estimates of how long batches take.
        dropped: Receives the reason for which a job was given up before it was computed: "cancelled" or "deadline".
        max_batch_size: Most jobs in a batch.
        batch_timeout_s: Age at which a job is due.
        num_stages: Number of stages of a batch, one after the other.

    Attributes:
        num_waiting: Queued jobs whose callers still wait.
        stage_s: Recent time of a batch in a stage. A job is due early enough to be answered in time.
    """

    def __init__(
        self,
        speed: Speed[K],
        dropped: Callable[[str], None],
        *,
        max_batch_size: int,
        batch_timeout_s: float,
        num_stages: int,
    ) -> None:
        self._speed, self._dropped = speed, dropped
        self._max_batch_size, self._batch_timeout_s, self._num_stages = max_batch_size, batch_timeout_s, num_stages
        self._queues: dict[K | _Group, list[Job[K, P, A]]] = {}
        self._unanswered: set[Asked[K, A]] = set()
        self._arrivals = Rate(ARRIVALS_WINDOW_S)
        self._ran_at = Recent[K, float](MOST_LEARNED)
        self._tried: K | None = None
        self._next_try_at = -math.inf
        self.num_waiting = 0
        self.stage_s = 0.0

    def arrived(self, count: int, now: float) -> None:
        """Counts arrivals, whether or not they find room."""
        self._arrivals.add(now, count)

    def add(self, asked: Asked[K, A], key: K | Open[K]) -> None:
        """Queues the jobs of a request."""
        queue_key: K | _Group = _Group(key.group) if isinstance(key, Open) else key
        self._queues.setdefault(queue_key, []).extend(asked.jobs)
        self._unanswered.add(asked)
        self.num_waiting += len(asked.jobs)

    @property
    def has_full_batch(self) -> bool:
        """Whether some key has a batch of full size."""
        return any(len(queue) >= self._max_batch_size for queue in self._queues.values())

    def take(self, now: float, ahead: int) -> tuple[K, list[Job[K, P, A]]] | None:
        """Removes the next batch, and the jobs that cannot be answered in time.

        Args:
            now: Seconds of the clock.
            ahead: Batches that are computed before this one.
        """
        while self._prune(now):
            dues = {key: self._dues(queue) for key, queue in self._queues.items()}
            first = self._next_queue({key: min(due) for key, due in dues.items()}, now)
            leader = self._queues[first][dues[first].index(min(dues[first]))]
            key = leader.choose(self.load(now)) if isinstance(first, _Group) else first
            if key is None:
                continue  # its request has failed, and leaves the queues at the next look
            most = self._most(key, BATCH_SHARE * (leader.deadline - leader.enqueued_at))
            batch = self._batch(first, key, most, dues)
            if not batch:
                continue  # its leader has failed meanwhile
            done_at = now + (1 + ahead) * self._speed(key, len(batch))
            late = [job for job in batch if job.deadline < done_at]
            if len(late) == len(batch) and self._may_try(key, late, now, ahead):
                self._speed.doubt(key)
                batch, late = [max(late, key=lambda job: job.deadline)], []
                self._tried, self._next_try_at = key, now + LONGEST_TRY_PAUSE_S
            for job in late:  # late jobs would only delay the others
                self._give_up(job.asked)
            if not late:
                self._ran_at[key] = now
                self.num_waiting -= len(batch)
                for job in batch:
                    job.got(key)
                self._clear()
                return key, batch
        return None

    def ran(self, key: K, now: float, pace_s: float) -> None:
        """Records the end of a batch of a key that kept the device busy for `pace_s`."""
        self._ran_at[key] = now
        if key == self._tried:
            pause_s = max(TRY_AFTER_S, pace_s * (1 / TRY_SHARE - 1))
            self._tried, self._next_try_at = None, now + min(pause_s, LONGEST_TRY_PAUSE_S)

    def load(self, now: float) -> Load:
        """The waiting jobs and the arrival rate at this moment."""
        left_s = sorted(job.deadline - now for queue in self._queues.values() for job in queue if job.is_queued)
        return Load(left_s, self._arrivals(now), self._max_batch_size)

    def expire(self, now: float) -> float:
        """Gives up the requests whose deadline has passed, also those in computation; returns the next deadline."""
        nearest = math.inf
        for asked in list(self._unanswered):
            if asked.deadline <= now:
                self._give_up(asked)
            else:
                nearest = min(nearest, asked.deadline)
        return nearest

    def unanswered(self, of: Callable[[P], bool]) -> list[asyncio.Future[Any]]:
        """The futures of the requests with such payloads."""
        return [asked.future for asked in self._unanswered if any(of(job.payload) for job in asked.jobs)]

    def fail_all(self, error: ServerError) -> None:
        """Fails all waiting requests with an error."""
        for asked in {job.asked for queue in self._queues.values() for job in queue}:
            asked.fail(error)
            self.leave(asked)
        self._queues.clear()

    def leave(self, asked: Asked[K, A], reason: str = "cancelled") -> None:
        """Removes the queued jobs of a request that is answered, or that nobody waits for."""
        self._unanswered.discard(asked)
        for job in asked.jobs:
            if job.is_queued:
                job.is_queued = False
                self.num_waiting -= 1
                self._dropped(reason)
        asked.jobs = []  # breaks the reference cycle, which would keep the images until the garbage collector runs

    def _give_up(self, asked: Asked[K, A]) -> None:
        if not asked.jobs:
            return  # another of its jobs was late, too
        timeout_s = max(0.0, asked.deadline - asked.jobs[0].enqueued_at)
        asked.fail(DeadlineError(f"no answer within {timeout_s:.3g} s", timeout_s=timeout_s))
        self.leave(asked, "deadline")

    def _prune(self, now: float) -> bool:
        """Removes jobs that are answered or too late from the queues; returns whether any wait."""
        for queue in self._queues.values():
            for job in queue:
                if job.asked.future.done():  # its callback is still to come
                    self.leave(job.asked)
                elif job.deadline <= now:
                    self._give_up(job.asked)
        self._clear()
        return bool(self._queues)

    def _clear(self) -> None:
        """Drops jobs that are no longer queued."""
        for key, queue in list(self._queues.items()):
            queue[:] = [job for job in queue if job.is_queued]
            if not queue:
                del self._queues[key]

    def _may_try(self, key: K, late: Sequence[Job[K, P, A]], now: float, ahead: int) -> bool:
        """Whether to compute one job of a key although the estimate calls all of them late."""
        is_old = now - self._ran_at.get(key, -math.inf) >= TRY_AFTER_S
        if ahead == 0 and self.num_waiting == len(late):  # the device has nothing else to do
            return is_old or max(job.deadline for job in late) >= now + SHORTEST * self._speed(key, 1)
        return is_old and now >= self._next_try_at

    def _next_queue(self, due: dict[K | _Group, float], now: float) -> K | _Group:
        """The queue of the oldest due job; the fullest queue if none is due.

        Args:
            due: When the first job of each queue is due.
            now: Seconds of the clock.
        """
        key = min(due, key=due.__getitem__)
        if due[key] > now:
            key = max(self._queues, key=lambda key: (min(len(self._queues[key]), self._max_batch_size), -due[key]))
        return key

    def _most(self, key: K, within_s: float) -> int:
        """Most jobs of a batch that takes at most `within_s`; at least one."""
        a, b = self._speed.line(key) or (0.0, 0.0)
        fitting = (within_s - a) / b if b else self._max_batch_size
        return max(1, int(min(fitting, self._max_batch_size)))  # `fitting` may be infinite

    def _batch(self, first: K | _Group, key: K, most: int, dues: dict[K | _Group, list[float]]) -> list[Job[K, P, A]]:
        """The jobs of a queue that go under a key, most urgent first, and jobs of other queues that fill up the
        batch.
        """
        batch: list[Job[K, P, A]] = []
        others = [queue for queue in self._queues if queue != first and (queue == key or isinstance(queue, _Group))]
        for queue in (first, *others):
            jobs, due = self._queues[queue], dues[queue]
            # Mostly sorted already, which makes sorting a single pass.
            order = sorted(range(len(jobs)), key=due.__getitem__)
            fitting = (jobs[index] for index in order if jobs[index].may_go_under(key))
            batch += itertools.islice(fitting, most - len(batch))
        return batch

    def _dues(self, queue: Sequence[Job[K, P, A]]) -> list[float]:
        """When each job must go before fuller batches: at its maximum age, or early enough to be answered in time."""
        age_s, early_s = self._batch_timeout_s, (1 + self._num_stages) * self.stage_s
        return [min(job.enqueued_at + age_s, job.deadline - early_s) for job in queue]
