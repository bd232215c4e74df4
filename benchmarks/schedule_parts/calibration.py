"""The distance of a schedule's answers for photos from those at r=0, and their latency."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from server.device.models import LoadedModel
from server.device.prepared import stacked
from server.device.runner import Runner
from server.dial import Schedule


class Calibration:
    """A model on a device, photos, and its answers for them at r=0.

    Args:
        runner: The device that holds the model.
        loaded: The model.
        photos: Pixels of each photo.
        batch_size: Photos that run together.
    """

    def __init__(self, runner: Runner, loaded: LoadedModel, photos: Sequence[bytes], batch_size: int) -> None:
        self._runner, self._loaded, self._photos, self._batch_size = runner, loaded, photos, batch_size
        self._unmerged = self.probabilities((0,) * loaded.info.num_blocks, range(len(photos)))

    def probabilities(self, schedule: Schedule, chosen: Sequence[int]) -> Tensor:
        """Probability of each class, for the chosen photos, (len(chosen), K) float32."""
        starts = range(0, len(chosen), self._batch_size)
        return torch.cat([self._batch(schedule, chosen[at : at + self._batch_size]) for at in starts])

    def distance(self, schedule: Schedule, chosen: Sequence[int]) -> float:
        """Mean Hellinger distance of the answers from those at r=0: 0 if they are equal, at most 1.

        Agreement itself is too coarse for a search. Of the smooth distances this one depends least on single photos:
        measured on some photos, it says most about the agreement on others.
        """
        alike = (self.probabilities(schedule, chosen) * self._unmerged[chosen]).sqrt().sum(dim=1)
        return float((1 - alike).clamp(min=0).sqrt().mean())

    def agreements(self, schedule: Schedule, chosen: Sequence[int]) -> list[bool]:
        """Whether the likeliest class is that at r=0, for each of the chosen photos."""
        same = self.probabilities(schedule, chosen).argmax(dim=1) == self._unmerged[chosen].argmax(dim=1)
        answers: list[bool] = same.tolist()
        return answers

    def seconds(self, schedule: Schedule | None) -> float:
        """Seconds of a batch now; None is timm's own forward, without merging."""
        start = time.perf_counter()
        self._batch(schedule, range(min(self._batch_size, len(self._photos))))
        return time.perf_counter() - start

    @torch.inference_mode()
    def _batch(self, schedule: Schedule | None, chosen: Sequence[int]) -> Tensor:
        info = self._loaded.info
        merged = self._runner.merged(info.name)
        photos = [self._photos[index] for index in chosen]
        pixels = stacked(photos, info.preprocessing.input_size, self._runner.device)
        if schedule is None:
            logits: Tensor = merged.model(merged.normalised(pixels))
        else:
            logits = merged(pixels, schedule)[:, : len(info.labels)]  # features follow
        return logits.float().softmax(dim=1).cpu()  # waits for the device
