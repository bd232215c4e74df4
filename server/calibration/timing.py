"""A ladder for `r=auto` if no curve was measured on this device: r=0 is timed at the start.

Without any curve, the rungs are evenly spaced `r` up to half of the arithmetic.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from server.batching.policy import Rung
from server.curve import Curve, Facts, Timed, today
from server.device.models import LoadedModel
from server.dial import Schedule
from tome_core.cost import flops
from tome_core.families.dimensions import dimensions
from tome_core.families.family import UnsupportedModelError
from tome_core.schedule import resolve

Run = Callable[[Schedule, int], None]
"""Computes a batch of the given size under a schedule."""

Line = tuple[float, float]
"""Seconds of a batch, and of each image in it."""

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
    """The cost of a schedule: in operations, or in tokens that leave blocks if operations cannot be counted."""
    try:
        sizes = dimensions(loaded.merged)
    except UnsupportedModelError:
        return lambda schedule: sum(loaded.info.token_counts(schedule)[1:])
    return lambda schedule: flops(sizes, schedule)


def timed(
    curve: Curve, loaded: LoadedModel, run: Run, max_batch_size: int, facts: Facts, roughly: bool = False
) -> Curve:
    """The curve of another device with speeds of this one, which `timed_steps` measures."""
    steps = timed_steps(loaded, [row.r for row in curve.rows], run, max_batch_size, roughly)
    lines = {step.schedule: (step.overhead_s, step.image_s) for step in steps}
    return curve.at(lines.__getitem__, max_batch_size, Timed(facts=facts, measured=today()))


def timed_steps(
    loaded: LoadedModel, ladder: Sequence[Schedule], run: Run, max_batch_size: int, roughly: bool = False
) -> list[Rung]:
    """Steps of a ladder: r=0 is timed on this device, the others follow their arithmetic until they have run.

    To time the others too would require to warm them all.

    Args:
        loaded: The model.
        ladder: Schedules, r=0 first and then ever faster.
        run: Computes a batch of the given size under a schedule.
        max_batch_size: Most images in a batch.
        roughly: Whether to run only one image once, because all steps are timed later in the background.
    """
    unmerged = ladder[0]
    line = (0.0, seconds_of(run, unmerged, 1, time.perf_counter)) if roughly else _line(run, unmerged, max_batch_size)
    lines = interpolated({unmerged: line}, ladder, arithmetic(loaded))
    return [Rung(each, *line) for each, line in lines.items()]


def interpolated(
    lines: Mapping[Schedule, Line], schedules: Sequence[Schedule], cost: Callable[[Schedule], float]
) -> dict[Schedule, Line]:
    """The lines of all schedules: timed ones, and others interpolated by their arithmetic.

    So a schedule is never expected to take longer than one of more arithmetic, unless that was measured. With less
    arithmetic than all timed schedules, the seconds of an image are proportional to the arithmetic.

    Args:
        lines: The timed lines, including r=0.
        schedules: All schedules.
        cost: The arithmetic of a schedule.
    """
    costs = {schedule: cost(schedule) for schedule in lines}
    found: dict[Schedule, Line] = {}
    for schedule in schedules:
        own = cost(schedule)
        if schedule in lines:
            found[schedule] = lines[schedule]
            continue
        slow = min((each for each in lines if costs[each] >= own), key=costs.__getitem__, default=schedules[0])
        fast = max((each for each in lines if costs[each] < own), key=costs.__getitem__, default=None)
        (a, b) = lines[slow]
        if fast is None:
            found[schedule] = a, b * own / costs[slow]
        else:
            share = (own - costs[fast]) / (costs[slow] - costs[fast]) if costs[slow] > costs[fast] else 1.0
            found[schedule] = share * a + (1 - share) * lines[fast][0], share * b + (1 - share) * lines[fast][1]
    return found


def in_order(
    lines: Mapping[Schedule, Line], cost: Callable[[Schedule], float], max_batch_size: int
) -> dict[Schedule, Line]:
    """The lines with averaged noise: of two schedules that merge, the one of less arithmetic never takes longer.

    Schedules whose times are out of order get the mean of their times (isotonic regression). r=0 keeps its own time,
    because the measurement decides whether merging is faster at all.

    Args:
        lines: The timed lines, including r=0.
        cost: The arithmetic of a schedule.
        max_batch_size: Most images in a batch.
    """
    merging = sorted((each for each in lines if max(each) > 0), key=cost, reverse=True)
    ones, fulls = (_falling([lines[each][0] + lines[each][1] * n for each in merging]) for n in (1, max_batch_size))
    found = dict(lines)
    for schedule, one_s, full_s in zip(merging, ones, fulls, strict=True):
        b = (full_s - one_s) / (max_batch_size - 1) if max_batch_size > 1 else one_s
        found[schedule] = max(one_s - b, 0.0), b
    return found


def _falling(seconds: Sequence[float]) -> list[float]:
    """The nearest falling sequence by least squares: rising neighbours are replaced by their mean."""
    pools: list[tuple[float, int]] = []
    for second in seconds:
        total, count = second, 1
        while pools and pools[-1][0] / pools[-1][1] < total / count:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def seconds_of(run: Run, schedule: Schedule, images: int, clock: Callable[[], float]) -> float:
    """Seconds of a batch of the given size."""
    start = clock()
    run(schedule, images)
    return clock() - start


def _line(run: Run, schedule: Schedule, max_batch_size: int) -> Line:
    """Seconds of a batch, and of each image in it."""
    large = min(LARGER_BATCH, max_batch_size)
    seconds_of(run, schedule, large, time.perf_counter)  # warm-up
    runs = [[seconds_of(run, schedule, images, time.perf_counter) for images in (1, large)] for _ in range(RUNS)]
    return line_of((1, large), [statistics.median(times) for times in zip(*runs, strict=True)])


def line_of(sizes: tuple[int, int], seconds: Sequence[float]) -> Line:
    """Seconds of a batch, and of each image in it, from the times of one image and of a larger batch."""
    large, (one_s, large_s) = sizes[1], seconds
    if large == 1:
        return 0.0, one_s
    b = max((large_s - one_s) / (large - 1), 0.1 * large_s / large)
    return max(one_s - b, 0.0), b
