"""What waits: requests, and the jobs that they consist of, one a payload. Every request gets exactly one answer.

They are structs of msgspec: those are made in a quarter of the time of a dataclass, thousands of times a second.
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
    """Instead of a key: which keys would do.

    Attributes:
        group: Open jobs of one group wait together, and one choice is made for them.
        allows: Whether the job may be computed under a key.
        choose: The key for a batch that this job leads, by the load of the moment; one that it allows.
        note: What is to be remembered of the key that it got, asked for at the moment when it gets it.
    """

    group: Hashable
    allows: Callable[[K], bool]
    choose: Callable[[Load], K]
    note: Callable[[K], Any]


class Batched(Struct, Generic[K, A]):
    """The results of one request, and the batches that they were computed in.

    Attributes:
        results: Of its payloads, in order.
        key: What they were computed under; None before an open request has one.
        batch_size: Jobs in the batch; of several batches the largest.
        wait_s: Seconds in the queue; of several jobs the longest.
        run_s: Seconds from there to the answer; of several jobs the longest.
        note: What an open request noted of its key.
    """

    results: list[A]
    key: K
    batch_size: int = 0
    wait_s: float = 0.0
    run_s: float = 0.0
    note: Any = None


class Asked(Struct, Generic[K, A], eq=False):
    """A request on its way.

    Attributes:
        future: What its caller waits for.
        finish: Makes of the results what the caller gets.
        batched: What is there of the results.
        num_left: Results that are missing.
        deadline: When the answer is worth nothing.
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
        index: Place of the payload in it.
        payload: What is computed.
        open: Which keys would do, where it has none.
        enqueued_at: When it came.
        deadline: The request's.
        is_queued: It waits for its batch.
    """

    asked: Asked[K, A]
    index: int
    payload: P
    open: Open[K] | None
    enqueued_at: float
    deadline: float
    is_queued: bool = True

    def choose(self, load: Load) -> K | None:
        """The key for a batch that this job leads, which it leaves open; None where the choice fails: so does it."""
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
        """Whether it may be computed under a key, of those that it stands beside."""
        try:
            return self.open is None or self.open.allows(key)
        except Exception as error:
            self._spoiled("the choice of r", error)
            return False

    def got(self, key: K) -> None:
        """Leaves the queue for a batch of a key."""
        self.is_queued = False
        if self.open is not None:  # now: later it would be the note of another moment
            self.asked.batched.key = key
            try:
                self.asked.batched.note = self.open.note(key)
            except Exception as error:
                self._spoiled("the choice of r", error)

    def answer(self, result: A, batch_size: int, wait_s: float, run_s: float) -> None:
        """Adds its result to the request's, and answers that when it was the last."""
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
        """Fails the request: a fault in what it brought along is not its neighbours', nor the batch loop's."""
        logger.exception("%s failed", what)
        self.asked.fail(EngineError(f"{what} failed: {error!r}"))
