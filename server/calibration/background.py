"""Compiles the schedules of a model in the background while it serves, and times each in turns with r=0."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence

from server.calibration.timing import LARGER_BATCH, Line, Run, in_order, interpolated, line_of, seconds_of
from server.dial import Schedule
from server.types import ModelInfo, OnDevice, OnTimed

TURNS, MOST_TURNS, QUIET = 3, 12, 1.2
"""Batches are timed in turns, at most `MOST_TURNS`, until `TURNS` of them took at most `QUIET` times the fastest. On a
busy machine a batch can take many times as long."""

CompileLater = Callable[[Sequence[Schedule], Callable[[Schedule], None]], None]


class Ladder:
    """Compiles and times the schedules of a model's curve, one after the other.

    A schedule takes turns with r=0, so that other load of the machine affects both. Lines that were not timed yet are
    interpolated.

    Args:
        info: The model.
        schedules: r=0 first.
        compile_later: Compiles schedules; calls back after each.
        run: Computes a batch of the given size under a schedule.
        cost: Gives the arithmetic of a schedule.
        max_batch_size: Most images in a batch.
        lines: Lines that were measured on this device before.
        keep: Receives the lines once all schedules were timed.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        info: ModelInfo,
        schedules: Sequence[Schedule],
        compile_later: CompileLater,
        run: Run,
        cost: Callable[[Schedule], float],
        max_batch_size: int,
        lines: Mapping[Schedule, Line],
        keep: Callable[[Mapping[Schedule, Line]], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._info, self._compile_later = info, compile_later
        self._schedules = sorted(schedules, key=cost, reverse=True)
        self._run, self._cost, self._clock, self._keep = run, cost, clock, keep
        self._max_batch_size, self._sizes = max_batch_size, (1, min(LARGER_BATCH, max_batch_size))
        self._lines = dict(lines)
        self._left = set(schedules) - set(lines)

    def begin(self, on_device: OnDevice, timed: OnTimed) -> None:
        """Starts the work; returns at once.

        Args:
            on_device: Does a piece of work on the thread that computes, between two batches.
            timed: Receives the lines of all schedules whenever one was timed.
        """
        self._compile_later(bisected(self._schedules), lambda schedule: self._time(schedule, on_device, timed))

    def _time(self, schedule: Schedule, on_device: OnDevice, timed: OnTimed) -> None:
        """Times a schedule that has just been compiled; called on the thread that compiles."""
        if schedule not in self._left:
            return
        unmerged = self._schedules[0]
        if unmerged not in self._lines:  # for a single image only; it is timed again once it is compiled for batches
            self._lines[unmerged] = self._measured(unmerged, on_device)[0]
        line, unmerged_s = self._measured(schedule, on_device)
        if schedule != unmerged:  # scaled to the machine's speed when r=0 was timed
            pace = sum(self._lines[unmerged]) / unmerged_s
            line = pace * line[0], pace * line[1]
        self._lines[schedule] = line
        self._left.discard(schedule)
        known = in_order(self._lines, self._cost, self._max_batch_size)
        lines = interpolated(known, self._schedules, self._cost)
        timed({self._info.batch_key(each): line for each, line in lines.items()})
        if not self._left:
            self._keep(known)

    def _measured(self, schedule: Schedule, on_device: OnDevice) -> tuple[Line, float]:
        """The line of a schedule, and the seconds of one image at r=0 in the same turns: of the fastest batches."""
        batches = [(self._schedules[0], 1), *((schedule, size) for size in self._sizes)]
        turns: list[list[float]] = []
        while len(turns) < MOST_TURNS and not (turns and all(map(_is_quiet, zip(*turns, strict=True)))):
            timed = (functools.partial(seconds_of, self._run, *batch, self._clock) for batch in batches)
            turns.append([on_device(each) for each in timed])
        unmerged_s, *seconds = map(min, zip(*turns, strict=True))
        return line_of(self._sizes, seconds), unmerged_s


def _is_quiet(seconds: Sequence[float]) -> bool:
    """Whether the times of one batch agree in enough turns."""
    return sum(each <= QUIET * min(seconds) for each in seconds) >= TURNS


def bisected(schedules: Sequence[Schedule]) -> list[Schedule]:
    """The schedules except the first: the middle one, the last one, then the middle of each gap, the widest first."""
    found = [len(schedules) // 2, len(schedules) - 1]
    gaps = [(0, found[0]), (found[0], found[1])]
    while gaps:
        low, high = gaps.pop(max(range(len(gaps)), key=lambda place: gaps[place][1] - gaps[place][0]))
        if high - low > 1:
            middle = (low + high) // 2
            found.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [schedules[place] for place in dict.fromkeys(found) if place > 0]
