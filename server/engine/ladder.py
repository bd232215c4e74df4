"""The ladder of `r=auto`: the rows of a curve, or, without one, evenly spaced `r` up to half of the arithmetic.

What no curve of this device tells is timed at the ladder's ends.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from server.calibration.curve import Curve
from server.dial import Schedule
from server.engine.auto import Step
from server.models import LoadedModel
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
    """What a schedule costs: in operations, or in tokens that leave blocks where a model's operations are not counted."""
    try:
        sizes = dimensions(loaded.merged)
    except UnsupportedModelError:
        return lambda schedule: sum(loaded.info.token_counts(schedule)[1:])
    return lambda schedule: flops(sizes, schedule)


def steps_of(curve: Curve) -> list[Step]:
    """Steps of a curve that knows its speeds: r=0, then each row that is faster than all that agree as well or better."""
    batch = curve.max_batch_size
    steps, fastest_s = [], math.inf
    for row in sorted(curve.rows, key=lambda row: (max(row.r) > 0, -row.agreement)):
        assert row.line is not None, "the caller times what was not measured"
        batch_s = row.line[0] + row.line[1] * batch
        if batch_s < fastest_s:
            steps.append(Step(row.r, *row.line, row.agreement))
            fastest_s = batch_s
    return steps


def timed(
    curve: Curve, loaded: LoadedModel, run: Callable[[Schedule, int], None], max_batch_size: int
) -> Curve:
    """A curve of another device with speeds of this one: agreement depends on the weights, not on the device."""
    cost = arithmetic(loaded)
    ladder = sorted((row.r for row in curve.rows), key=lambda r: (max(r) > 0, -cost(r)))
    lines = {step.schedule: (step.overhead_s, step.image_s) for step in timed_steps(loaded, ladder, run, max_batch_size)}
    return curve.at(lines.__getitem__, max_batch_size)


def timed_steps(
    loaded: LoadedModel, ladder: Sequence[Schedule], run: Callable[[Schedule, int], None], max_batch_size: int
) -> list[Step]:
    """Steps of a ladder: its ends are timed on this device, what lies between follows its arithmetic.

    Args:
        loaded: The model.
        ladder: Schedules, r=0 first and then ever faster.
        run: Computes a batch of so many images under a schedule.
        max_batch_size: Most images in a batch.
    """
    ends = ladder[0], ladder[-1]
    costs = [arithmetic(loaded)(schedule) for schedule in ladder]
    (slow_a, slow_b), (fast_a, fast_b) = (_line(run, schedule, max_batch_size) for schedule in ends)
    steps = []
    for schedule, cost in zip(ladder, costs, strict=True):
        share = (costs[0] - cost) / (costs[0] - costs[-1]) if len(ladder) > 1 else 0.0
        a, b = slow_a + share * (fast_a - slow_a), slow_b + share * (fast_b - slow_b)
        steps.append(Step(schedule, a, b, 1.0 if max(schedule) == 0 else None))
    return steps


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
