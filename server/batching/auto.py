"""`r=auto` of one model: its ladder, the dial's position, and the reason for each choice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from server.batching.jobs import Open
from server.batching.policy import Load, Rung, Stance, allows, highest, turn
from server.batching.speed import Speed
from server.dial import AutoR, Schedule
from server.ipc.messages import Choice, Reason
from server.types import BatchKey


class AutoDial:
    """Chooses `r` for the batches of one model.

    Args:
        key_of: Gives the batch key of a schedule.
        steps: The ladder, r=0 first, each step faster than the one before. A step counts once its own backend computes
            it, because a slower fallback would increase the load.
        speed: The batcher's estimates. They start from the times of the steps.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        key_of: Callable[[Schedule], BatchKey],
        steps: Sequence[Rung],
        speed: Speed[BatchKey],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert max(steps[0].schedule) == 0, "the ladder begins at r=0"
        self._keys = {step.schedule: key_of(step.schedule) for step in steps}
        self._unmerged = self._keys[steps[0].schedule]
        self._agreements = {step.schedule: step.agreement for step in steps}
        self._speed, self._clock, self._stance = speed, clock, Stance()
        for step in steps:
            if step.image_s:  # 0 means that nobody timed it
                speed.expect(self._keys[step.schedule], step.overhead_s, step.image_s)
        self._ladder = self._measured_ladder()

    def open(self, bounds: AutoR) -> Open[BatchKey]:
        """The open key of a job with these bounds. Its note is the `Choice`."""

        ours = self._unmerged

        def fits(key: BatchKey) -> bool:
            if key.model != ours.model or key.revision != ours.revision or key.operation != ours.operation:
                return False
            return allows(bounds, key.schedule, self.expected_agreement(key.schedule))

        return Open(
            self,
            fits,
            lambda load: self._keys[self.choose(load, bounds).schedule],
            lambda key: self._choice(key.schedule, bounds),
        )

    def choose(self, load: Load, bounds: AutoR) -> Choice:
        """Turns the dial to the load and chooses its rung, or the highest rung within bounds."""
        before, self._ladder = self._ladder[self._stance.rung].schedule, self._measured_ladder()
        places = [rung.schedule for rung in self._ladder]
        if self._stance.rung >= len(places) or places[self._stance.rung] != before:  # steps were added or removed
            place = places.index(before) if before in places else min(self._stance.rung, len(places) - 1)
            self._stance = replace(self._stance, rung=place)
        self._stance = turn(self._ladder, load, self._stance, self._clock())
        return self._choice(self._ladder[min(self._stance.rung, highest(self._ladder, bounds))].schedule, bounds)

    def _choice(self, schedule: Schedule, bounds: AutoR) -> Choice:
        return Choice(schedule, self._why(schedule, bounds), self.expected_agreement(schedule))

    def _why(self, schedule: Schedule, bounds: AutoR) -> Reason:
        """The reason for a job's schedule, given its bounds and the dial's present position."""
        top = highest(self._ladder, bounds)
        if schedule != self._ladder[min(self._stance.rung, top)].schedule:
            return "shared"
        if self._stance.rung > top:
            return "bounds"
        return "load" if self._stance.rung else "idle"

    def expected_agreement(self, schedule: Schedule) -> float | None:
        """Share of images that keep the answer of r=0 under a schedule; None if unknown."""
        return 1.0 if max(schedule) == 0 else self._agreements.get(schedule)

    def _measured_ladder(self) -> list[Rung]:
        return [
            Rung(schedule, *(self._speed.own_line(key) or (0.0, 0.0)), self.expected_agreement(schedule))
            for schedule, key in self._keys.items()
            if key == self._unmerged or not self._speed.is_fallback(key)
        ]
