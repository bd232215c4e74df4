"""Drift: whether live images keep the answer of r=0 as often as their model's curve says.

While the device has nothing else to do, a small share of the images answered with r > 0 is computed again at r=0.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from msgspec import structs

from server.curve import Curve, CurveRow
from server.dial import label_of
from server.images.image import Image
from server.intervals import wilson
from server.ipc.messages import Classify, Item, TopK
from server.metrics import DRIFT, DRIFT_AGREED, DRIFT_CHECKED, LIVE_AGREEMENT
from server.types import LABEL_THRESHOLD, BatchKey, ModelInfo

logger = logging.getLogger(__name__)

KEPT = 8
"""Most images that wait for their check: 150,528 bytes of pixels each at 224 x 224, 1.2 MB in all, or JPEG files."""

WINDOW = 500
FEWEST = 50
"""The checks that live agreement counts, and the fewest that may be called drift."""

Z = 3.290527
"""Z value of a 99.9 % interval, because drift is judged after every check. Simulated traffic like the photos of a curve
was called drift about once in 5,000 checks at 95 %, and about once in 200,000 at 99.9 %. At 99.9 % a fall of ten points
is still noticed within 170 to 400 checks.
"""

LONGEST_QUIET_S = 0.1


@dataclass(frozen=True, slots=True)
class _Sample:
    """An answered image, its key, and its answer: the likeliest class, or its labels.

    A request does not tell all labels of a multi-label model: they are None until the check.
    """

    key: BatchKey
    image: Image
    answer: tuple[int, ...] | None


class LiveAgreement:
    """The last checks of a model at one `r`, beside the row of its curve.

    It drifts when its interval and the row's no longer meet. It is back when its interval holds the row's agreement
    again. The second condition is stricter, so that the state does not flicker at the edge.

    Args:
        row: The row of the curve. Without one nothing counts as drift.

    Attributes:
        drifts: Whether live agreement has left the curve.
    """

    def __init__(self, row: CurveRow | None = None) -> None:
        self.row = row
        self.drifts = False
        self._checks: deque[bool] = deque(maxlen=WINDOW)

    def add(self, agreed: bool) -> bool:
        """Counts a check; returns whether `drifts` has changed."""
        self._checks.append(agreed)
        before, self.drifts = self.drifts, self._judge()
        return self.drifts != before

    @property
    def share(self) -> float:
        """Share of the checked images that keep the answer of r=0."""
        return sum(self._checks) / len(self._checks)

    def _judge(self) -> bool:
        if self.row is None or len(self._checks) < FEWEST:
            return False
        low, high = wilson(sum(self._checks), len(self._checks), Z)
        if self.drifts:
            return not low <= self.row.agreement <= high
        curve_low, curve_high = self.row.agreement_interval
        return high < curve_low or low > curve_high

    def __str__(self) -> str:
        return f"{sum(self._checks)} of the last {len(self._checks)} images checked keep the answer of r=0"


class DriftWatch:
    """Samples answered images and computes them again at r=0, one at a time, while the device is idle.

    All lists of `r` share one label, so they are counted but never compared with a curve.

    Args:
        run_batch: Classifies images on the device. Nothing else may run there meanwhile.
        curves: The curves of the models that have one.
        models: The served models. The answer of a multi-label model is the set of its labels.
        share: Share of the images answered with r > 0 to check, from 0 (none) to 1 (all).
        random: Uniform numbers in [0, 1).
        clock: Seconds of the event loop's clock.
    """

    def __init__(
        self,
        run_batch: Callable[[BatchKey, Sequence[Item]], Awaitable[Sequence[TopK]]],
        curves: Mapping[str, Curve],
        share: float,
        *,
        models: Mapping[str, ModelInfo] | None = None,
        random: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_batch, self._share, self._random, self._clock = run_batch, share, random, clock
        self._models = models or {}
        # The newest are kept: drift shows in today's traffic.
        self._samples: deque[_Sample] = deque(maxlen=KEPT)
        self._rows: dict[tuple[str, str], CurveRow] = {}
        for name, curve in curves.items():
            self.expect(name, curve)
        self._live: dict[tuple[str, str], LiveAgreement] = {}
        self._quiet_s = 0.0

    def expect(self, name: str, curve: Curve) -> None:
        """Adds the curve of a model."""
        if curve.agreement_of != "neighbours":  # the checks compare classes, not vectors
            self._rows |= {(name, label_of(row.r)): row for row in curve.rows if len(set(row.r)) == 1}

    def forget(self, name: str) -> None:
        """Forgets a model that no longer serves: its curve, its waiting samples and its counts."""
        kept = [sample for sample in self._samples if sample.key.model != name]
        self._samples.clear()
        self._samples.extend(kept)
        for labels, live in self._live.items():
            if labels[0] == name and live.drifts:  # the gauge, and its alert, would otherwise stay set
                DRIFT.labels(*labels).set(False)
        for of_r in (self._rows, self._live):
            for labels in [labels for labels in of_r if labels[0] == name]:
                del of_r[labels]

    @property
    def num_waiting(self) -> int:
        """Samples that wait for an idle device."""
        return len(self._samples)

    def offer(self, key: BatchKey, images: Sequence[Image], answers: Sequence[TopK]) -> None:
        """Takes a classified request and keeps some of its images for a check."""
        if max(key.schedule) > 0:
            for image, answer in zip(images, answers, strict=True):
                if self._random() < self._share:
                    is_known = self._num_labels(key) is None and answer.indices
                    self._samples.append(_Sample(key, image, (answer.indices[0],) if is_known else None))

    async def idle(self, arrived: asyncio.Event) -> None:
        """Checks samples until something arrives: the batcher's work while nothing waits.

        An arrival waits for one image at r=0 at most. To make even that rare, a check begins only after a pause as long
        as the last check took. A client that asks again as soon as it is answered is then not delayed.
        """
        while not await _set_within(arrived, self._quiet_s if self._samples else None):
            await self._check(self._samples.popleft())

    async def _check(self, sample: _Sample) -> None:
        started = self._clock()
        try:
            answer = sample.answer or await self._answer(sample.key, sample.image)
            unmerged = sample.key._replace(schedule=(0,) * len(sample.key.schedule))
            self._count(sample.key, await self._answer(unmerged, sample.image) == answer)
        except Exception:  # nobody waits for it, and the batch loop must go on
            logger.exception("an image of %s could not be checked at r=0", sample.key.model)
        self._quiet_s = min(self._clock() - started, LONGEST_QUIET_S)

    async def _answer(self, key: BatchKey, image: Image) -> tuple[int, ...]:
        """The likeliest class of an image, or all labels under a multi-label model."""
        asked = Classify(model=key.model, images=[image], deadline=inf, top_k=1)
        num_labels = self._num_labels(key)
        if num_labels is not None:
            asked = structs.replace(asked, top_k=num_labels, activation="sigmoid", threshold=LABEL_THRESHOLD)
        (answer,) = await self._run_batch(key, [Item(asked, 0)])
        return tuple(sorted(answer.indices))

    def _num_labels(self, key: BatchKey) -> int | None:
        """Number of labels of a multi-label model; None for other models."""
        info = self._models.get(key.model)
        return len(info.labels) if info is not None and info.activation == "sigmoid" else None

    def _count(self, key: BatchKey, agreed: bool) -> None:
        labels = model, r = key.model, label_of(key.schedule)
        if labels not in self._live:
            self._live[labels] = LiveAgreement(self._rows.get(labels))
        live = self._live[labels]
        changed = live.add(agreed)
        DRIFT_CHECKED.labels(*labels).inc()
        DRIFT_AGREED.labels(*labels).inc(agreed)
        LIVE_AGREEMENT.labels(*labels).set(live.share)
        if live.row is None:
            return
        DRIFT.labels(*labels).set(live.drifts)
        if changed:
            said = "has left its curve; calibrate anew, on such images" if live.drifts else "is back on its curve"
            low, high = live.row.agreement_interval
            logger.warning("%s at r=%s %s: %s; the curve says %.3f to %.3f", model, r, said, live, low, high)


async def _set_within(event: asyncio.Event, timeout_s: float | None) -> bool:
    """Waits for an event, at most `timeout_s`; returns whether it is set."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
    return event.is_set()
