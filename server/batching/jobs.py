"""Waiting requests, and their jobs, one for each payload. Every request gets exactly one answer.

They are msgspec structs: thousands are made each second, and a struct takes a quarter of the time of a dataclass.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from msgspec import Struct

from server.batching.policy import Load
from server.errors import EngineError, ServerError

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
P = TypeVar("P")
A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Open(Generic[K]):
    """A key that is not chosen yet: the keys that a job allows.

    Attributes:
        group: Open jobs of one group wait together, and one choice is made for them.
        allows: Whether the job may be computed under a key.
        choose: The key of a batch that this job leads, given the present load. It must be a key that the job allows.
        note: What to remember of the chosen key. It is called when the job gets the key.
    """

    group: Hashable
    allows: Callable[[K], bool]
    choose: Callable[[Load], K]
    note: Callable[[K], Any]


class Batched(Struct, Generic[K, A]):
    """The results of one request, and the batches that computed them.

    Attributes:
        results: One for each payload, in order.
        key: The key of its batches; None until an open request has one.
        batch_size: Jobs in the largest of its batches.
        wait_s: Longest time of a job in the queue, in seconds.
        run_s: Longest time of a job from the queue to the answer, in seconds.
        note: The note of an open request's key.
    """

    results: list[A]
    key: K
    batch_size: int = 0
    wait_s: float = 0.0
    run_s: float = 0.0
    note: Any = None


class Asked(Struct, Generic[K, A], eq=False):
    """A request that is being answered.

    Attributes:
        future: The caller waits for it.
        finish: Turns the results into the caller's answer.
        batched: The results so far.
        num_left: Number of missing results.
        deadline: Time after which the answer is useless.
        jobs: One for each payload.
    """

    future: asyncio.Future[Any]
    finish: Callable[[Batched[K, A]], Any]
    batched: Batched[K, A]
    num_left: int
    deadline: float
    jobs: list[Job[K, Any, A]]

    def fail(self, error: ServerError) -> None:
        """Answers with an error; the first one counts."""
        if not self.future.done():
            self.future.set_exception(error)


class Job(Struct, Generic[K, P, A], eq=False):
    """One payload of a request.

    Attributes:
        asked: The request.
        index: Place of the payload in the request.
        payload: The input of the computation.
        open: The keys that it allows, if its key is open.
        enqueued_at: Time of arrival.
        deadline: The request's deadline.
        is_queued: Whether it waits for its batch.
    """

    asked: Asked[K, A]
    index: int
    payload: P
    open: Open[K] | None
    enqueued_at: float
    deadline: float
    is_queued: bool = True

    def choose(self, load: Load) -> K | None:
        """Chooses the key of a batch that this open job leads. If the choice fails, the request fails and the result is
        None.
        """
        assert self.open is not None
        try:
            key = self.open.choose(load)
            if not self.open.allows(key):
                raise ValueError(f"{key} was chosen, which is not allowed")
            return key
        except Exception as error:
            self._spoiled("the choice of r", error)
            return None

    def may_go_under(self, key: K) -> bool:
        """Whether the job may be computed under a key."""
        try:
            return self.open is None or self.open.allows(key)
        except Exception as error:
            self._spoiled("the choice of r", error)
            return False

    def got(self, key: K) -> None:
        """Leaves the queue for a batch of a key."""
        self.is_queued = False
        if self.open is not None:  # noted now, because the reason may change later
            self.asked.batched.key = key
            try:
                self.asked.batched.note = self.open.note(key)
            except Exception as error:
                self._spoiled("the choice of r", error)

    def answer(self, result: A, batch_size: int, wait_s: float, run_s: float) -> None:
        """Adds a result to the request, and answers the request with the last one."""
        asked, batched = self.asked, self.asked.batched
        batched.results[self.index] = result
        if batch_size > batched.batch_size:
            batched.batch_size = batch_size
        if wait_s > batched.wait_s:
            batched.wait_s = wait_s
        if run_s > batched.run_s:
            batched.run_s = run_s
        asked.num_left -= 1
        if asked.num_left == 0 and not asked.future.done():
            try:
                asked.future.set_result(asked.finish(batched))
            except Exception as error:
                self._spoiled("the answer to a request", error)

    def _spoiled(self, what: str, error: Exception) -> None:
        """Fails the request alone: its fault must not fail other requests or the batch loop."""
        logger.exception("%s failed", what)
        self.asked.fail(EngineError(f"{what} failed: {error!r}"))
