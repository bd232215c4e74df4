"""`r=auto` of a model: its ladder of choices, where the dial stands, and what is said of a choice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from server.batching.batcher import Open
from server.batching.policy import Load, Rung, Stance, allows, highest, turn
from server.batching.speed import Speed
from server.dial import AutoR, Schedule
from server.types import BatchKey, Reason


class AutoDial:
    """Chooses `r` for the batches of one model.

    Args:
        key_of: The batch key of a schedule.
        steps: The ladder, r=0 first and then ever faster.
        speed: What the batcher learns of batches; it is told what the steps are expected to take.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        key_of: Callable[[Schedule], BatchKey],
        steps: Sequence[Rung],
        speed: Speed[BatchKey | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert max(steps[0].schedule) == 0, "the ladder begins at r=0"
        self._keys = {step.schedule: key_of(step.schedule) for step in steps}
        self._model = self._keys[steps[0].schedule].model
        self._agreements = {step.schedule: step.agreement for step in steps}
        self._speed, self._clock, self._stance = speed, clock, Stance()
        for step in steps:
            if step.image_s:  # else nobody timed it
                speed.expect(self._keys[step.schedule], step.overhead_s, step.image_s)

    def expected_agreement(self, schedule: Schedule) -> float | None:
        """The share of images that keep the answer of r=0 under a schedule; None where it is unknown."""
        return 1.0 if max(schedule) == 0 else self._agreements.get(schedule)

    def open(self, bounds: AutoR) -> Open[BatchKey | None]:
        """What a job of these bounds is queued by."""

        def fits(key: BatchKey | None) -> bool:
            if key is None or key.model != self._model:
                return False
            return allows(bounds, key.schedule, self.expected_agreement(key.schedule))

        return Open(self, fits, lambda load: self.choose(load, bounds))

    def why(self, schedule: Schedule, bounds: AutoR) -> Reason:
        """In a word, why a job of these bounds was computed so: "idle", "load", "bounds" or "shared".

        "idle": nothing asks for more than r=0; "load": what waits and comes; "bounds": the load asks for more than the
        job allows; "shared": it filled up a batch that merges otherwise.
        """
        ladder = self._ladder()
        top = highest(ladder, bounds)
        if schedule != ladder[min(self._stance.rung, top)].schedule:
            return "shared"
        if self._stance.rung > top:
            return "bounds"
        return "load" if self._stance.rung else "idle"

    def choose(self, load: Load, bounds: AutoR) -> BatchKey:
        """Turns the dial to the load; gives the key of where it stands, or of the highest rung within bounds."""
        ladder = self._ladder()
        self._stance = turn(ladder, load, self._stance, self._clock())
        return self._keys[ladder[min(self._stance.rung, highest(ladder, bounds))].schedule]

    def _ladder(self) -> list[Rung]:
        lines = ((schedule, self._speed.line(key) or (0.0, 0.0)) for schedule, key in self._keys.items())
        return [Rung(schedule, *line, self.expected_agreement(schedule)) for schedule, line in lines]
