"""A ladder for `r=auto` where no curve was measured on this device: r=0 is timed at the start.

Without any curve the rungs are evenly spaced `r` up to half of the arithmetic.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from server.batching.policy import Rung
from server.curve import Curve, Facts, Timed, today
from server.device.models import LoadedModel
from server.dial import Schedule
from tome_core.cost import flops
from tome_core.families.dimensions import dimensions
from tome_core.families.family import UnsupportedModelError
from tome_core.schedule import resolve

RUNGS = 6
LARGER_BATCH = 8  # large enough to tell what an image costs, small enough not to delay the start
RUNS = 3


def schedules(loaded: LoadedModel) -> list[Schedule]:
    """From r=0 to the `r` that halves the arithmetic, `RUNGS` of them or fewer."""
    cost, num_blocks = arithmetic(loaded), loaded.merged.num_blocks
    half = cost(resolve(0, num_blocks)) / 2
    fast = (r for r in range(loaded.info.max_r) if cost(resolve(r, num_blocks)) <= half)
    highest = next(fast, loaded.info.max_r)
    return [resolve(r, num_blocks) for r in dict.fromkeys(round(i * highest / (RUNGS - 1)) for i in range(RUNGS))]


def arithmetic(loaded: LoadedModel) -> Callable[[Schedule], float]:
    """What a schedule costs: in operations, or in tokens that leave blocks where operations cannot be counted."""
    try:
        sizes = dimensions(loaded.merged)
    except UnsupportedModelError:
        return lambda schedule: sum(loaded.info.token_counts(schedule)[1:])
    return lambda schedule: flops(sizes, schedule)


def timed(
    curve: Curve, loaded: LoadedModel, run: Callable[[Schedule, int], None], max_batch_size: int, facts: Facts
) -> Curve:
    """A curve of another device at the speeds of this one, as `timed_steps` measures them with these facts."""
    steps = timed_steps(loaded, [row.r for row in curve.rows], run, max_batch_size)
    lines = {step.schedule: (step.overhead_s, step.image_s) for step in steps}
    return curve.at(lines.__getitem__, max_batch_size, Timed(facts=facts, measured=today()))


def timed_steps(
    loaded: LoadedModel, ladder: Sequence[Schedule], run: Callable[[Schedule, int], None], max_batch_size: int
) -> list[Rung]:
    """Steps of a ladder: r=0 is timed on this device, the others follow their arithmetic until they have run.

    Timing them too would mean to warm them all, and nobody may ever ask for them.

    Args:
        loaded: The model.
        ladder: Schedules, r=0 first and then ever faster.
        run: Computes a batch of so many images under a schedule.
        max_batch_size: Most images in a batch.
    """
    cost = arithmetic(loaded)
    a, b = _line(run, ladder[0], max_batch_size)
    shares = (cost(schedule) / cost(ladder[0]) for schedule in ladder)
    return [Rung(schedule, a, b * share) for schedule, share in zip(ladder, shares, strict=True)]


def _line(run: Callable[[Schedule, int], None], schedule: Schedule, max_batch_size: int) -> tuple[float, float]:
    """Seconds of a batch, and of each image in it."""

    def seconds(images: int) -> float:
        start = time.perf_counter()
        run(schedule, images)
        return time.perf_counter() - start

    large = min(LARGER_BATCH, max_batch_size)
    seconds(large)  # warm-up
    runs = [(seconds(1), seconds(large)) for _ in range(RUNS)]
    one_s, large_s = (statistics.median(times) for times in zip(*runs, strict=True))
    if large == 1:
        return 0.0, one_s
    b = max((large_s - one_s) / (large - 1), 0.1 * large_s / large)
    return max(one_s - b, 0.0), b
