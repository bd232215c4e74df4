"""The policy of `r=auto`: how far the dial must turn under the load of this moment. Pure functions.

A ladder holds the choices, slowest and most accurate first. The dial goes up as soon as the load asks for it, and comes
down when a lower rung has been enough, with something to spare, for a while: so it does not flap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.dial import AutoR, Schedule

BUSY = 0.95
"""The share of a rung's capacity that arrivals may take."""

SLACK = 0.4
"""The share of its remaining time by which every waiting job must be done."""

CALM_BUSY, CALM_SLACK = 0.9, 0.3
"""A lower rung must do with these shares before the dial comes down."""

HOLD_S = 1.0
"""How long it must do so."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One choice.

    Attributes:
        schedule: `r` of each block.
        overhead_s: Seconds of a batch, whatever its size.
        image_s: Seconds for each image of it; 0 where nobody timed it.
        agreement: Share of images that keep the answer of r=0, or None where nobody measured it.
    """

    schedule: Schedule
    overhead_s: float = 0.0
    image_s: float = 0.0
    agreement: float | None = None

    def batch_s(self, images: int) -> float:
        """Seconds of a batch."""
        return self.overhead_s + self.image_s * images


@dataclass(frozen=True, slots=True)
class Load:
    """What waits and what comes.

    Attributes:
        left_s: Seconds that each waiting image has left, shortest first.
        arrivals_per_s: Images that came in each of the last seconds.
        max_batch_size: Most images in a batch.
    """

    left_s: Sequence[float]
    arrivals_per_s: float
    max_batch_size: int


@dataclass(frozen=True, slots=True)
class Stance:
    """Where the dial stands.

    Attributes:
        rung: Place in the ladder.
        calm_since: Since when a lower rung would do, or None while it would not.
    """

    rung: int = 0
    calm_since: float | None = None


def allows(bounds: AutoR, schedule: Schedule, agreement: float | None) -> bool:
    """Whether an image may be classified so: at r=0 always; where the agreement is unknown, by `max_r` alone."""
    largest = max(schedule)
    if largest == 0:
        return True
    if bounds.max_r is not None and largest > bounds.max_r:
        return False
    return bounds.min_agreement is None or (agreement is not None and agreement >= bounds.min_agreement)


def highest(ladder: Sequence[Rung], bounds: AutoR) -> int:
    """The highest rung up to which all are allowed."""
    refused = (place for place, rung in enumerate(ladder) if not allows(bounds, rung.schedule, rung.agreement))
    return next(refused, len(ladder)) - 1


def turn(ladder: Sequence[Rung], load: Load, stance: Stance, now: float) -> Stance:
    """Where the dial stands next.

    Args:
        ladder: The choices, slowest first; the first is r=0.
        load: What waits and what comes.
        stance: Where it stood.
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
    """Whether what comes takes no more than a share of the capacity, and what waits no more than one of its time."""
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
