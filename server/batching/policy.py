"""The policy of `r=auto`: how far to turn the dial under the present load. Pure functions.

A ladder holds the choices, slowest and most accurate first. The dial goes up as soon as the load needs it. It comes
down when a lower rung has been enough, with some margin, for a while; so it does not flap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.dial import AutoR, Schedule

BUSY = 0.95
"""Largest share of a rung's capacity for arrivals."""

SLACK = 0.4
"""Every waiting job must be done within this share of its remaining time."""

CALM_BUSY, CALM_SLACK = 0.9, 0.3
"""A lower rung must keep up within these shares before the dial comes down."""

HOLD_S = 1.0
"""Seconds for which it must do so."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One choice.

    Attributes:
        schedule: `r` of each block.
        overhead_s: Seconds of a batch of any size.
        image_s: Seconds for each image of a batch; 0 if nobody timed it.
        agreement: Share of images that keep the answer of r=0; None if nobody measured it.
    """

    schedule: Schedule
    overhead_s: float = 0.0
    image_s: float = 0.0
    agreement: float | None = None

    def batch_s(self, images: int) -> float:
        """Seconds for a batch of this many images."""
        return self.overhead_s + self.image_s * images


@dataclass(frozen=True, slots=True)
class Load:
    """The waiting images and the arrival rate.

    Attributes:
        left_s: Seconds that each waiting image has left, shortest first.
        arrivals_per_s: Recent arrivals, images each second.
        max_batch_size: Most images in a batch.
    """

    left_s: Sequence[float]
    arrivals_per_s: float
    max_batch_size: int


@dataclass(frozen=True, slots=True)
class Stance:
    """Position of the dial.

    Attributes:
        rung: Place in the ladder.
        calm_since: Since when a lower rung would be enough; None if it would not.
    """

    rung: int = 0
    calm_since: float | None = None


def allows(bounds: AutoR, schedule: Schedule, agreement: float | None) -> bool:
    """Whether an image may be classified under a schedule. r=0 is always allowed. An unknown agreement satisfies no
    `min_agreement`.
    """
    largest = max(schedule)
    if largest == 0:
        return True
    if bounds.max_r is not None and largest > bounds.max_r:
        return False
    return bounds.min_agreement is None or (agreement is not None and agreement >= bounds.min_agreement)


def highest(ladder: Sequence[Rung], bounds: AutoR) -> int:
    """The highest rung of the ladder's allowed beginning."""
    refused = (place for place, rung in enumerate(ladder) if not allows(bounds, rung.schedule, rung.agreement))
    return next(refused, len(ladder)) - 1


def turn(ladder: Sequence[Rung], load: Load, stance: Stance, now: float) -> Stance:
    """The next position of the dial.

    Args:
        ladder: The choices, slowest first; the first is r=0.
        load: The waiting images and the arrival rate.
        stance: The present position.
        now: Seconds of any clock.
    """
    needed = next((place for place, rung in enumerate(ladder) if keeps_up(rung, load)), len(ladder) - 1)
    if needed >= stance.rung:
        return Stance(needed)
    spared = next(
        (place for place, rung in enumerate(ladder) if keeps_up(rung, load, CALM_BUSY, CALM_SLACK)), len(ladder) - 1
    )
    if spared >= stance.rung:
        return Stance(stance.rung)
    calm_since = now if stance.calm_since is None else stance.calm_since
    return Stance(spared) if now - calm_since >= HOLD_S else Stance(stance.rung, calm_since)


def keeps_up(rung: Rung, load: Load, busy: float = BUSY, slack: float = SLACK) -> bool:
    """Whether arrivals take at most `busy` of the capacity, and waiting jobs at most `slack` of their time."""
    B = load.max_batch_size
    if load.arrivals_per_s * rung.batch_s(B) > busy * B:
        return False
    done_s = 0.0
    for begin in range(0, len(load.left_s), B):
        waiting = load.left_s[begin : begin + B]
        done_s += rung.batch_s(len(waiting))
        if done_s > slack * waiting[0]:
            return False
    return True
