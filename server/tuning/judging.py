"""The gain of tuning: the share of held-out photos that keep the answer of r=0, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from server.images.preprocessing import Preprocessing
from server.intervals import Z
from server.tuning.photos import normalised
from tome_core.tuning import Tuner, divergence

BATCH = 50


class Gain(NamedTuple):
    """The gain of tuning on the judging photos.

    Attributes:
        r: `r` of each row.
        before: Share of photos that kept the answer of r=0, at each `r`.
        after: The same, tuned.
        mean: Difference of the means over all `r`.
        interval: Its 95 % interval, over photos.
    """

    r: Sequence[int]
    before: Sequence[float]
    after: Sequence[float]
    mean: float
    interval: tuple[float, float]

    @property
    def is_sure(self) -> bool:
        """Whether the gain is significant."""
        return self.interval[0] > 0


class Judge:
    """Judging photos, and the model's own answers for them at r=0.

    Args:
        tuner: The model.
        photos: (N, 3, H, W) uint8, as the service sees them, on the model's device.
        preprocessing: The model's preprocessing.
    """

    def __init__(self, tuner: Tuner, photos: Tensor, preprocessing: Preprocessing) -> None:
        self._tuner, self._photos, self._seen = tuner, photos, preprocessing
        self._unmerged = self._answers(0, tuned=False)
        self._wanted = self._unmerged.argmax(dim=1)

    def glance(self, r: int) -> tuple[float, float]:
        """At one `r`: mean divergence from r=0 in nats, and the share of photos that keep its answer."""
        logits = self._answers(r, tuned=True)
        agreed = (logits.argmax(dim=1) == self._wanted).float().mean()
        return float(divergence(logits, self._unmerged)), float(agreed)

    def gain(self, ladder: Sequence[int]) -> Gain:
        """The gain of tuning at these `r`, before and after on the same photos."""
        before, after = (torch.stack([self._agreed(r, tuned) for r in ladder]) for tuned in (False, True))
        return gain_of(list(ladder), before, after)

    def _agreed(self, r: int, tuned: bool) -> Tensor:
        return self._answers(r, tuned).argmax(dim=1) == self._wanted

    def _answers(self, r: int, tuned: bool) -> Tensor:
        parts = (normalised(part.float() / 255, self._seen) for part in self._photos.split(BATCH))
        return torch.cat([self._tuner.answers(part, r, tuned) for part in parts])


def gain_of(ladder: Sequence[int], before: Tensor, after: Tensor) -> Gain:
    """The gain, computed from whether each photo kept its answer.

    Args:
        ladder: Each `r`.
        before: (len(ladder), N) bool.
        after: The same, tuned.
    """
    # A photo is one sample for any number of r, because its answers at neighbouring r are nearly the same.
    by_photo = (after.double() - before.double()).mean(dim=0)
    mean, n = float(by_photo.mean()), len(by_photo)
    half = Z * float(by_photo.std(correction=1)) / math.sqrt(n)
    return Gain(list(ladder), _shares(before), _shares(after), mean, (mean - half, mean + half))


def _shares(agreed: Tensor) -> list[float]:
    shares: list[float] = agreed.double().mean(dim=1).tolist()
    return shares
