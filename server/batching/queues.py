"""The queues of the batcher, one a key, and which jobs make the next batch."""

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
"""Over which arrivals are counted: long enough that chance is small, short enough to follow a wave."""

BATCH_SHARE = 0.3
"""A batch takes no more than this share of the time that its first job was given: it also waits for the one before."""

TRY_AFTER_S = 1.0
"""Where no batch of a key ran for so long, one job is tried that the estimate calls late. Else a slow moment would be
remembered for ever: what is given up teaches nothing. A device with nothing else to do tries it sooner where half of
the estimate would do, for times are never quite certain."""

TRY_SHARE, LONGEST_TRY_PAUSE_S = 0.1, 10.0
"""While other jobs wait, tries take this share of the time at most; the pause after one is no longer than that."""


@dataclass(frozen=True, slots=True)
class _Group:
    """The queue of the open jobs of a group, beside those of keys."""

    name: Hashable


class Queues(Generic[K, P, A]):
    """Jobs that wait. The fullest queue goes first, unless some job is due: then that one's does.

    Args:
        speed: How long batches take.
        dropped: Is told why a job was given up before it was computed: "cancelled" or "deadline".
        max_batch_size: Most jobs in a batch.
        batch_timeout_s: Age at which a job is due.
        num_stages: Through which a batch goes, one after the other.

    Attributes:
        num_waiting: Jobs queued whose callers still wait.
        stage_s: How long a batch keeps a stage, lately: a job is due so early that it is answered in time.
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
        """Notes that so many jobs came, whether or not they find room."""
        self._arrivals.add(now, count)

    def add(self, asked: Asked[K, A], key: K | Open[K]) -> None:
        """Queues the jobs of a request."""
        queue_key: K | _Group = _Group(key.group) if isinstance(key, Open) else key
        self._queues.setdefault(queue_key, []).extend(asked.jobs)
        self._unanswered.add(asked)
        self.num_waiting += len(asked.jobs)

    @property
    def has_full_batch(self) -> bool:
        """Whether a batch of some key could not grow."""
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
                continue  # it has failed, and is out of the queues by the next look
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
            for job in late:  # they would only keep the others waiting
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
        """Notes that a batch of a key ended, which kept the device for so long."""
        self._ran_at[key] = now
        if key == self._tried:
            pause_s = max(TRY_AFTER_S, pace_s * (1 / TRY_SHARE - 1))
            self._tried, self._next_try_at = None, now + min(pause_s, LONGEST_TRY_PAUSE_S)

    def load(self, now: float) -> Load:
        """What waits and what comes, at this moment."""
        left_s = sorted(job.deadline - now for queue in self._queues.values() for job in queue if job.is_queued)
        return Load(left_s, self._arrivals(now), self._max_batch_size)

    def expire(self, now: float) -> float:
        """Gives up the requests whose time is over, also those that are computed; gives the next deadline."""
        nearest = math.inf
        for asked in list(self._unanswered):
            if asked.deadline <= now:
                self._give_up(asked)
            else:
                nearest = min(nearest, asked.deadline)
        return nearest

    def unanswered(self, of: Callable[[P], bool]) -> list[asyncio.Future[Any]]:
        """What the callers of requests of such payloads wait for."""
        return [asked.future for asked in self._unanswered if any(of(job.payload) for job in asked.jobs)]

    def fail_all(self, error: ServerError) -> None:
        """Gives up all that waits, with an error."""
        for asked in {job.asked for queue in self._queues.values() for job in queue}:
            asked.fail(error)
            self.leave(asked)
        self._queues.clear()

    def leave(self, asked: Asked[K, A], reason: str = "cancelled") -> None:
        """Takes out what still waits of a request that is over: it is answered, or nobody waits for it."""
        self._unanswered.discard(asked)
        for job in asked.jobs:
            if job.is_queued:
                job.is_queued = False
                self.num_waiting -= 1
                self._dropped(reason)
        asked.jobs = []  # they know the request: as a circle they would keep its images until the collector comes

    def _give_up(self, asked: Asked[K, A]) -> None:
        if not asked.jobs:
            return  # another of its jobs was late, too
        timeout_s = max(0.0, asked.deadline - asked.jobs[0].enqueued_at)
        asked.fail(DeadlineError(f"no answer within {timeout_s:.3g} s", timeout_s=timeout_s))
        self.leave(asked, "deadline")

    def _prune(self, now: float) -> bool:
        """Clears the queues of what has left them or is too late; says whether anything waits."""
        for queue in self._queues.values():
            for job in queue:
                if job.asked.future.done():  # and its callback is still to come
                    self.leave(job.asked)
                elif job.deadline <= now:
                    self._give_up(job.asked)
        self._clear()
        return bool(self._queues)

    def _clear(self) -> None:
        """Drops from the queues what has left them."""
        for key, queue in list(self._queues.items()):
            queue[:] = [job for job in queue if job.is_queued]
            if not queue:
                del self._queues[key]

    def _may_try(self, key: K, late: Sequence[Job[K, P, A]], now: float, ahead: int) -> bool:
        """Whether one of the jobs that the estimate of their key calls late is computed all the same."""
        is_old = now - self._ran_at.get(key, -math.inf) >= TRY_AFTER_S
        if ahead == 0 and self.num_waiting == len(late):  # the device has nothing else to do
            return is_old or max(job.deadline for job in late) >= now + SHORTEST * self._speed(key, 1)
        return is_old and now >= self._next_try_at

    def _next_queue(self, due: dict[K | _Group, float], now: float) -> K | _Group:
        """The one with the oldest job that is due, else the fullest.

        Args:
            due: When the first job of each queue is due.
            now: Seconds of the clock.
        """
        key = min(due, key=due.__getitem__)
        if due[key] > now:
            key = max(self._queues, key=lambda key: (min(len(self._queues[key]), self._max_batch_size), -due[key]))
        return key

    def _most(self, key: K, within_s: float) -> int:
        """How many jobs a batch can have that is to be done within a time; at least one."""
        a, b = self._speed.line(key) or (0.0, 0.0)
        fitting = (within_s - a) / b if b else self._max_batch_size
        return max(1, int(min(fitting, self._max_batch_size)))  # `fitting` may be infinite

    def _batch(self, first: K | _Group, key: K, most: int, dues: dict[K | _Group, list[float]]) -> list[Job[K, P, A]]:
        """The jobs of a queue that go under a key, the most urgent first, and others that fill up their batch."""
        batch: list[Job[K, P, A]] = []
        others = [queue for queue in self._queues if queue != first and (queue == key or isinstance(queue, _Group))]
        for queue in (first, *others):
            jobs, due = self._queues[queue], dues[queue]
            # They mostly stand in this order already, and to sort them is then to look once.
            order = sorted(range(len(jobs)), key=due.__getitem__)
            fitting = (jobs[index] for index in order if jobs[index].may_go_under(key))
            batch += itertools.islice(fitting, most - len(batch))
        return batch

    def _dues(self, queue: Sequence[Job[K, P, A]]) -> list[float]:
        """When each job must go before fuller batches: of age, or early enough to be answered in time."""
        age_s, early_s = self._batch_timeout_s, (1 + self._num_stages) * self.stage_s
        return [min(job.enqueued_at + age_s, job.deadline - early_s) for job in queue]
