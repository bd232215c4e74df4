"""Search for the schedule, one for all images, that changes a model's answers least at a given cost.

One token more or fewer in a block re-pairs all tokens after it. So the loss of a single schedule is noisy, and the
noise belongs to the measured photos: it does not carry over to others. The part that carries over is smooth in the
token counts. So the search trusts no schedule's own loss: it fits a smooth surrogate to all trials, moves to the
surrogate's optimum, tries schedules around it, and fits again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.schedule_parts.surrogate import Surrogate
from server.dial import Schedule
from tome_core.schedule import clip, token_counts

Shape = tuple[float, ...]
"""Distribution of a schedule's merging over the blocks, up to a factor. Negative and missing numbers mean none."""

LARGEST_FACTOR = 4096.0
FIRST_SPREAD, SPREAD_DECAY = 0.6, 0.85  # around shapes whose mean is 1
IDLE_SHARES = (0.0, 0.15, 0.3)  # shares of blocks of a first candidate that merge nothing
ATTEMPTS = 50
REACH = 1.0  # spreads
POOL, ELITE, GENERATIONS, POOL_DECAY = 120, 12, 14, 0.85


class Space:
    """The schedules at a budget: every shape stands for the schedule of this shape that merges least within it.

    Args:
        cost: Cost of a schedule, in any unit. It should fall if the same shape merges more.
        budget: The highest cost.
        num_blocks: Blocks of the model.
        num_tokens: Tokens that enter the first block.
        num_prefix_tokens: Leading tokens that never merge.
    """

    def __init__(
        self,
        cost: Callable[[Schedule], float],
        budget: float,
        num_blocks: int,
        num_tokens: int,
        num_prefix_tokens: int,
    ) -> None:
        self.cost, self.budget = cost, budget
        self._num_blocks, self._tokens = num_blocks, (num_tokens, num_prefix_tokens)

    def schedule(self, shape: Shape) -> Schedule | None:
        """The schedule of this shape; None if no factor meets the budget."""
        low, high = 0.0, LARGEST_FACTOR
        if self.cost(self._scaled(shape, low)) <= self.budget:
            return self._scaled(shape, low)
        if self.cost(self._scaled(shape, high)) > self.budget:
            return None
        while high - low > 1e-3 * high:
            factor = (low + high) / 2
            low, high = (low, factor) if self.cost(self._scaled(shape, factor)) <= self.budget else (factor, high)
        return self._scaled(shape, high)

    def features(self, schedule: Schedule) -> list[float]:
        """Features in which the loss is smooth: the logarithm of the tokens that leave each block."""
        return [math.log(count) for count in token_counts(schedule, *self._tokens)]

    def _scaled(self, shape: Shape, factor: float) -> Schedule:
        """Rounds the running sum, so that fractions of a token are not lost."""
        sums = [0]
        total = 0.0
        for part in shape:
            total += max(part, 0.0) * factor
            sums.append(round(total))
        merged = [after - before for before, after in zip(sums, sums[1:], strict=False)]
        return clip((*merged, *[0] * (self._num_blocks - len(merged))), *self._tokens)


class Round(NamedTuple):
    """The result of a round of the search.

    Attributes:
        schedule: The surrogate's optimum so far.
        fit: Share of the variance of log loss that the surrogate predicts for new schedules. Near 0 it has learnt
            nothing, and the rest is noise.
    """

    schedule: Schedule
    fit: float


def search(
    loss: Callable[[Schedule, int], float],
    space: Space,
    start: Shape,
    *,
    rounds: int,
    trials: int,
    parts: int = 1,
    seed: int = 0,
) -> Iterator[Round]:
    """Searches a space for the schedule of least loss, round after round.

    Args:
        loss: Loss of a schedule on one part of the calibration photos, above 0. It is called once for each trial.
        space: Schedules at the budget.
        start: The first shape; it has a number for each block that may merge.
        rounds: Rounds to yield.
        trials: Schedules tried in each round.
        parts: Parts of the photos; trials use them in turn. This costs less than all photos for each trial, and tells
            as much, because the total number of photos averages out the noise.
        seed: Seed of the random numbers; the same seed gives the same rounds.

    Raises:
        ValueError: The start cannot meet the budget.
    """
    if space.schedule(start) is None:
        raise ValueError("no schedule of the starting shape meets the budget")
    random_numbers = random.Random(seed)
    centre, spread = start, FIRST_SPREAD
    tried: list[tuple[list[float], float, int]] = []
    for _ in range(rounds):
        idle_shares = IDLE_SHARES if not tried else (0.0,)
        for trial in range(trials):
            _, schedule = _candidate(space, centre, spread, idle_shares, random_numbers)
            part = trial % parts
            tried.append((space.features(schedule), math.log(loss(schedule, part)), part))
        surrogate = Surrogate(*_centred(tried, parts))
        if surrogate.fit > 0:
            centre = _optimum(surrogate, space, centre, spread, random_numbers)
        spread *= SPREAD_DECAY
        best = space.schedule(centre)
        assert best is not None, "the optimum is a mean of shapes that meet the budget, or the last centre"
        yield Round(best, surrogate.fit)


def _centred(tried: Sequence[tuple[list[float], float, int]], parts: int) -> tuple[list[list[float]], list[float]]:
    """Features, and losses minus the mean of their part, because some photos are harder than others."""
    of_part = [[loss for _, loss, each in tried if each == part] for part in range(parts)]
    means = [sum(losses) / max(len(losses), 1) for losses in of_part]
    return [features for features, _, _ in tried], [loss - means[part] for _, loss, part in tried]


def _candidate(
    space: Space, centre: Shape, spread: float, idle_shares: Sequence[float], random_numbers: random.Random
) -> tuple[Shape, Schedule]:
    """A shape near the centre that meets the budget, and its schedule; the centre if none is found."""
    for _ in range(ATTEMPTS):
        idle = random_numbers.choice(idle_shares)
        shape = tuple(
            -spread if random_numbers.random() < idle else random_numbers.gauss(part, spread) for part in centre
        )
        schedule = space.schedule(shape)
        if schedule is not None:
            return shape, schedule
    schedule = space.schedule(centre)
    assert schedule is not None, "the search moves only to centres that meet the budget"
    return centre, schedule


def _optimum(surrogate: Surrogate, space: Space, centre: Shape, spread: float, random_numbers: random.Random) -> Shape:
    """Descends the surrogate by moving to the mean of the best of a shrinking cloud (the cross-entropy method).

    It stays within the reach of the schedules to which the surrogate was fitted last.
    """
    limits = [(part - REACH * spread, part + REACH * spread) for part in centre]
    for _ in range(GENERATIONS):
        pool = [_candidate(space, centre, spread, (0.0,), random_numbers) for _ in range(POOL)]
        losses = surrogate([space.features(schedule) for _, schedule in pool])
        elite = sorted(range(POOL), key=losses.__getitem__)[:ELITE]
        mean = [sum(pool[index][0][block] for index in elite) / ELITE for block in range(len(centre))]
        scale = len(mean) / max(sum(max(part, 0.0) for part in mean), 1e-9)
        moved = tuple(min(max(scale * part, low), high) for part, (low, high) in zip(mean, limits, strict=True))
        if space.schedule(moved) is not None:
            centre = moved
        spread *= POOL_DECAY
    return centre
