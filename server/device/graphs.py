"""Recorded forward passes: a CUDA graph for each schedule and bucket of batch sizes, replayed without its launches.

Token counts depend only on the schedule, so every batch of one bucket under one schedule is the same graph.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from server.device.uses import Uses
from server.dial import Schedule
from server.recent import Recent

logger = logging.getLogger(__name__)

SEEN_OFTEN = 3
"""Batches after which a schedule that was not warmed is recorded too; until then it is launched normally. A failed
recording is tried again after twice as many, and so on.
"""

MOST_SEEN = 1024
"""Schedules and sizes that are counted towards a recording, because clients may name any number of others."""


class Recording(Protocol):
    """A recorded function of fixed inputs."""

    output: Tensor

    def replay(self) -> None:
        """Computes `output` from the present content of the inputs."""
        ...


Record = Callable[[Callable[[], Tensor]], Recording]


class Graphs:
    """A model's forward passes by schedule and batch size. Threads take turns.

    Args:
        forward: Images (B, ...) and a schedule to outputs, (B, K + C).
        image: An example image for `forward`: its shape, dtype and device.
        max_batch_size: Most images in a batch.
        record: Makes a recording.
        alone: Held while something is recorded, which tolerates no other thread's work on the device.
        has_room: Whether the device has memory for one more recording.
        max_recordings: Most recordings, including warmed ones. A warmed one is never dropped; of the others, a new
            one replaces the least used.

    Attributes:
        buckets: Recorded batch sizes; a batch is padded to the next of them.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Schedule], Tensor],
        image: Tensor,
        max_batch_size: int,
        record: Record,
        alone: AbstractContextManager[bool],
        has_room: Callable[[], bool] = lambda: True,
        max_recordings: int = 256,
    ) -> None:
        self._forward, self._record, self._max_recordings = forward, record, max_recordings
        self._alone, self._has_room = alone, has_room
        self.buckets = buckets(max_batch_size)
        self._held = torch.zeros(max_batch_size, *image.shape, dtype=image.dtype, device=image.device)
        self._recordings: dict[tuple[Schedule, int], Recording] = {}
        self._warmed: set[tuple[Schedule, int]] = set()
        self._uses = Uses[tuple[Schedule, int]]()
        self._later: deque[tuple[Schedule, int]] = deque()
        self._turn = threading.Lock()
        self._seen = Recent[tuple[Schedule, int], int](MOST_SEEN)

    def __len__(self) -> int:
        return len(self._recordings)

    def warm_up(self, schedule: Schedule, is_likely: bool = True) -> None:
        """Records a schedule.

        Args:
            schedule: `r` of each block.
            is_likely: Whether it will be used at once: every batch size is recorded. Otherwise the largest and 1 are,
                and the others are left to `record_next`.
        """
        sizes = list(reversed(self.buckets))  # the largest first, because the others fit into its memory
        self._warmed |= {(schedule, bucket) for bucket in sizes}
        first = sizes if is_likely else list(dict.fromkeys([sizes[0], sizes[-1]]))
        for bucket in first:
            self._try_to_record(schedule, bucket)
        self._later.extend((schedule, bucket) for bucket in sizes if bucket not in first)

    def record_next(self) -> bool:
        """Records one of the batch sizes that `warm_up` left; returns False if none is left."""
        if not self._later:
            return False
        self._try_to_record(*self._later.popleft())
        return True

    def has(self, num_images: int, schedule: Schedule) -> bool:
        """Whether a batch would be replayed, which returns at once."""
        return (schedule, self._bucket(num_images)) in self._recordings

    def __call__(self, images: Tensor, schedule: Schedule) -> Tensor:
        """Outputs, (B, K + C), of images (B, ...); batches larger than `max_batch_size` are launched normally."""
        key = (schedule, self._bucket(len(images)))
        if key not in self._recordings and len(images) <= self.buckets[-1]:
            self._seen[key] = seen = self._seen.get(key, 0) + 1
            if _is_time(seen) and self._make_room_for(key):
                self._try_to_record(*key)
        with self._turn:
            self._uses.note(key)
            recording = self._recordings.get(key)
            if recording is None:
                return self._forward(images, schedule)
            self._held[: len(images)] = images  # rows of a longer, earlier batch do not affect other images
            recording.replay()
            return recording.output[: len(images)].clone()  # the next replay of any graph may reuse its memory

    def _try_to_record(self, schedule: Schedule, bucket: int) -> None:
        """Records a batch size, or logs why it cannot; it is then launched normally."""
        if (schedule, bucket) in self._recordings:
            return
        try:
            with self._alone, self._turn:
                self._recordings[schedule, bucket] = self._record(lambda: self._forward(self._held[:bucket], schedule))
        except torch.OutOfMemoryError:
            logger.warning("a batch of %d does not fit into the device's memory", bucket)
        except Exception:
            logger.exception("a batch of %d cannot be recorded", bucket)

    def _make_room_for(self, key: tuple[Schedule, int]) -> bool:
        """Whether an unwarmed graph may be recorded. If memory is short it replaces a less used one."""
        with self._turn:
            if key in self._warmed or (len(self._recordings) < self._max_recordings and self._has_room()):
                return True
            unwarmed = [each for each in self._recordings if each not in self._warmed]
            if not unwarmed or self._uses.of(least := self._uses.least(unwarmed)) >= self._uses.of(key):
                return False
            del self._recordings[least]
            return True

    def _bucket(self, num_images: int) -> int:
        return next((size for size in self.buckets if size >= num_images), num_images)


def _is_time(seen: int) -> bool:
    """Whether this count is due for a recording: after 3, 6, 12, ... batches."""
    times, rest = divmod(seen, SEEN_OFTEN)
    return rest == 0 and times & (times - 1) == 0


def buckets(max_batch_size: int) -> list[int]:
    """Batch sizes worth a recording: powers of two, and from 8 on those halfway between."""
    sizes = {max_batch_size}
    size = 1
    while size < max_batch_size:
        sizes |= {size, size * 3 // 2} if size >= 8 else {size}
        size *= 2
    return sorted(size for size in sizes if size <= max_batch_size)
