"""The learning loop: judges the parameters now and then, keeps the best, and can resume after a stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.errors import EngineError
from server.images.preprocessing import Preprocessing
from server.tuning.judging import Judge
from server.tuning.photos import normalised
from tome_core.tuning import Tuner
from tome_core.views import views

GLANCES = 15
"""Number of judgements while learning, if there is time for all steps."""

PATIENCE = 5
"""Judgements without a new best after which learning ends."""


@dataclass
class Progress:
    """Progress of the learning.

    Attributes:
        step: Batches learned from.
        seconds: Time so far, including judgements.
        best: Least mean divergence of the judging photos from r=0, in nats.
        numbers: The parameters of `best`, by name.
        glances: Number of judgements.
        idle: Judgements since the best.
        agreement: Share of the judging photos that kept the answer of r=0, at the last judgement.
        loss: Mean loss since the previous judgement.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    numbers: dict[str, Tensor] = field(default_factory=dict)
    glances: int = 0
    idle: int = 0
    agreement: float = 0.0
    loss: float = 0.0

    def share(self, steps: int, longest_s: float) -> float:
        """Share of the learning that is done: by steps or by time, whichever is nearer its end."""
        return min(1.0, max(self.step / steps, self.seconds / longest_s))


class Learning:
    """Learns until all steps are done, the time is over, or no improvement is expected.

    Args:
        tuner: Learns; its recipe has the number of steps.
        judge: Judging photos.
        photos: Photos to learn from, (N, 3, H, W) uint8, on the device.
        preprocessing: The model's preprocessing.
        band: Smallest and largest `r` to learn for.
        longest_s: Most seconds.
        progress: The progress to resume from.
    """

    def __init__(
        self,
        tuner: Tuner,
        judge: Judge,
        photos: Tensor,
        preprocessing: Preprocessing,
        band: tuple[int, int],
        longest_s: float,
        progress: Progress,
    ) -> None:
        self._tuner, self._judge, self._photos, self._seen = tuner, judge, photos, preprocessing
        self._band, self._longest_s, self.progress = band, longest_s, progress

    def run(
        self,
        told: Callable[[Progress, float], None],
        keep: Callable[[Progress], None],
        stop: Callable[[], bool],
    ) -> None:
        """Runs the loop.

        Args:
            told: Called with the progress and the share that is done, after every step.
            keep: Called with the progress after every judgement, so that it can be resumed.
            stop: Whether to stop after this step; the parameters are judged before.

        Raises:
            EngineError: The loss, or the divergence of the judging photos, is not finite.
        """
        now, steps, clock = self.progress, self._tuner.recipe.steps, time.perf_counter()
        losses: list[Tensor] = []
        share = now.share(steps, self._longest_s)
        next_glance = share + 1 / GLANCES
        is_stopped = False
        while share < 1 and now.idle < PATIENCE and not is_stopped:
            losses.append(self._step(share))
            now.step += 1
            now.seconds, clock = now.seconds + time.perf_counter() - clock, time.perf_counter()
            share = now.share(steps, self._longest_s)
            is_stopped = stop()
            if is_stopped or share >= min(next_glance, 1.0):
                now.loss = float(torch.stack(losses).mean())
                self._glance()
                now.seconds, clock = now.seconds + time.perf_counter() - clock, time.perf_counter()
                # The judgement takes time too: a share of the time lies between its end and the next one.
                share = now.share(steps, self._longest_s)
                losses, next_glance = [], share + 1 / GLANCES
                keep(now)
            told(now, share)

    def _step(self, share: float) -> Tensor:
        batch_size = self._tuner.recipe.batch_size
        images, r = drawn(self.progress.step, self._photos, batch_size, self._seen, self._band)
        return self._tuner.step(images, r, share)

    def _glance(self) -> None:
        now = self.progress
        nats, now.agreement = self._judge.glance(sum(self._band) // 2)
        if not math.isfinite(now.loss + nats):
            raise EngineError(f"the loss is {now.loss + nats} near step {now.step}: this model cannot be tuned")
        now.glances += 1
        now.idle += 1
        if nats < now.best:
            now.best, now.numbers, now.idle = nats, self._tuner.numbers(), 0


def drawn(
    step: int, photos: Tensor, batch_size: int, preprocessing: Preprocessing, band: tuple[int, int], mixed: int = 2
) -> tuple[Tensor, int]:
    """The batch of a step: normalised images (batch_size, 3, H, W) and their `r`. It depends only on the step, so a
    resumed run continues alike.

    Args:
        step: Counted from 0.
        photos: (N, 3, H, W) uint8, on the device.
        batch_size: Number of images.
        preprocessing: The model's preprocessing.
        band: Smallest and largest `r`.
        mixed: Every `mixed`-th batch is mixed; 0 for none.
    """
    torch.manual_seed(step)
    r = int(torch.randint(band[0], band[1] + 1, ()))
    mix = bool(mixed) and step % mixed == mixed - 1
    return normalised(views(photos, preprocessing.input_size, batch_size, mix), preprocessing), r
