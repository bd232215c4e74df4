"""Recorded forward passes: a CUDA graph for each schedule and bucket of batch sizes, replayed without its launches.

Token counts depend on the schedule alone, so every batch of one bucket under one schedule is the same graph.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from server.dial import Schedule

logger = logging.getLogger(__name__)

SEEN_OFTEN = 3
"""Batches after which a schedule that nobody warmed is recorded too; until then it runs launch by launch."""


class Recording(Protocol):
    """A function of fixed inputs, recorded."""

    output: Tensor

    def replay(self) -> None:
        """Computes `output` anew from what the inputs hold now."""
        ...


Record = Callable[[Callable[[], Tensor]], Recording]


class Graphs:
    """A model's forward passes by schedule and batch size. Called from one thread.

    Args:
        forward: Images (B, ...) and a schedule to logits (B, K).
        image: An image as `forward` takes it: its shape, dtype and device.
        max_batch_size: Most images in a batch.
        record: Makes a recording.
        max_recordings: Most that are kept; the one unused for longest goes first.

    Attributes:
        buckets: Batch sizes that are recorded; a batch runs padded to the next of them.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Schedule], Tensor],
        image: Tensor,
        max_batch_size: int,
        record: Record,
        max_recordings: int = 256,
    ) -> None:
        self._forward, self._record, self._max_recordings = forward, record, max_recordings
        self.buckets = buckets(max_batch_size)
        self._held = torch.zeros(max_batch_size, *image.shape, dtype=image.dtype, device=image.device)
        self._recordings: OrderedDict[tuple[Schedule, int], Recording] = OrderedDict()
        self._seen: Counter[tuple[Schedule, int]] = Counter()

    def __len__(self) -> int:
        return len(self._recordings)

    def warm_up(self, schedule: Schedule) -> None:
        """Records a schedule at every batch size that fits into memory."""
        for bucket in reversed(self.buckets):  # the largest first: the others fit into its memory
            try:
                self._recorded(schedule, bucket)
            except torch.OutOfMemoryError:
                logger.warning("a batch of %d does not fit into the device's memory", bucket)

    def __call__(self, images: Tensor, schedule: Schedule) -> Tensor:
        """Logits, (B, K), of images (B, ...), B at most `max_batch_size`."""
        bucket = next(size for size in self.buckets if size >= len(images))
        key = (schedule, bucket)
        if key not in self._recordings:
            self._seen[key] += 1
            if self._seen[key] < SEEN_OFTEN:
                return self._forward(images, schedule)
        recording = self._recorded(schedule, bucket)
        self._held[: len(images)] = images  # what a longer batch left behind it changes no other image
        recording.replay()
        return recording.output[: len(images)].clone()  # the next replay of any graph may take its memory

    def _recorded(self, schedule: Schedule, bucket: int) -> Recording:
        key = (schedule, bucket)
        if key not in self._recordings:
            self._recordings[key] = self._record(lambda: self._forward(self._held[:bucket], schedule))
            self._seen.pop(key, None)
            if len(self._recordings) > self._max_recordings:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        return self._recordings[key]


def buckets(max_batch_size: int) -> list[int]:
    """Batch sizes worth a recording: powers of two, and from 8 on those halfway between."""
    sizes = {max_batch_size}
    size = 1
    while size < max_batch_size:
        sizes |= {size, size * 3 // 2} if size >= 8 else {size}
        size *= 2
    return sorted(size for size in sizes if size <= max_batch_size)
