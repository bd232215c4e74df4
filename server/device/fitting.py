"""Splits batches that do not fit into the device's memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from server.metrics import OUT_OF_MEMORY
from server.recent import Recent
from server.types import BatchKey

logger = logging.getLogger(__name__)

P = TypeVar("P")
A = TypeVar("A")

REMEMBERED_S = 60.0
"""Seconds for which a size that fits is remembered. Then a whole batch is tried again, because memory may be free."""

MOST_REMEMBERED = 256
"""Keys whose size is remembered, because clients may name any number of lists of `r`."""


class Fitting(Generic[P, A]):
    """Runs a device's function of a batch, in parts of the size that last fitted under the batch's key.

    Args:
        run_batch: Computes one batch.
        clock: Monotonic seconds.
    """

    def __init__(
        self, run_batch: Callable[[BatchKey, Sequence[P]], Sequence[A]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run_batch, self._clock = run_batch, clock
        self._fits = Recent[BatchKey, tuple[int, float]](MOST_REMEMBERED)

    def __call__(self, key: BatchKey, jobs: Sequence[P]) -> list[A]:
        """Computes a batch. Raises the device's errors, and out-of-memory if one image alone does not fit."""
        size = self._size(key, len(jobs))
        answers: list[A] = []
        while len(answers) < len(jobs):
            part = jobs[len(answers) : len(answers) + size]
            try:
                answers += self._run_batch(key, part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
            # Outside the except block, because the exception keeps the tensors of its frames alive.
            size = len(part) // 2
            self._fits[key] = size, self._clock() + REMEMBERED_S
            OUT_OF_MEMORY.inc()
            logger.warning("%d images of %s do not fit into memory; %d are tried", len(part), key.model, size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return answers

    def _size(self, key: BatchKey, wanted: int) -> int:
        size, until = self._fits.get(key, (wanted, self._clock()))
        if until <= self._clock():
            self._fits.pop(key, None)
            return wanted
        return min(size, wanted)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is out-of-memory: torch has a class for it on a GPU, and only a message on the CPU."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(each in str(error) for each in words)
