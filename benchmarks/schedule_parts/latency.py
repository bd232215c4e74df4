"""The latency of a schedule on this device: a few schedules are measured, the others predicted from them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from server.dial import Schedule
from server.types import ModelInfo

RUNS = 5
PROBES = 28


class Latency:
    """Seconds of a batch under any schedule, by a linear model of its work.

    A block costs a certain time for each token that enters it, for each pair of them, and for each token that leaves. A
    block that merges costs a constant time more, and a time for each token that it must match. If the device's latency
    is a staircase, this is the line through it.

    Args:
        seconds: Runs a batch and returns its time.
        info: The model.
        seed: Seed for the choice of measured schedules.

    Attributes:
        error: Mean relative error of the predictions for the measured schedules.
    """

    def __init__(self, seconds: Callable[[Schedule], float], info: ModelInfo, seed: int = 0) -> None:
        self._info = info
        probes = _probes(info, random.Random(seed))
        measured = torch.tensor(list(measure(seconds, probes).values()), dtype=torch.float64)
        rows = torch.tensor([self._terms(probe) for probe in probes], dtype=torch.float64)
        # Every row is divided by its latency, because relative errors count.
        rows /= measured[:, None]
        scale = rows.abs().amax(dim=0)
        solved = torch.linalg.lstsq(rows / scale, torch.ones_like(measured)[:, None], driver="gelsd").solution[:, 0]
        self._weights: list[float] = (solved / scale).tolist()
        self.error = float((rows @ (solved / scale) - 1).abs().mean())

    def __call__(self, schedule: Schedule) -> float:
        """Seconds of a batch."""
        return sum(weight * term for weight, term in zip(self._weights, self._terms(schedule), strict=True))

    def _terms(self, schedule: Schedule) -> list[float]:
        counts = self._info.token_counts(schedule)
        entering, leaving = counts[:-1], counts[1:]
        matched = [before for before, after in zip(entering, leaving, strict=True) if before > after]
        return [1, sum(entering), sum(n * n for n in entering), sum(leaving), len(matched), sum(matched)]


S = TypeVar("S", bound=Schedule | None)


def measure(seconds: Callable[[S], float], schedules: Sequence[S]) -> dict[S, float]:
    """The median latency of each schedule. They take turns, so that other load of the machine affects all alike."""
    for schedule in schedules:
        seconds(schedule)  # warm-up
    runs = [{schedule: seconds(schedule) for schedule in schedules} for _ in range(RUNS)]
    return {schedule: statistics.median(run[schedule] for run in runs) for schedule in schedules}


def _probes(info: ModelInfo, random_numbers: random.Random) -> list[Schedule]:
    """Constant schedules, and schedules that merge in some blocks only, of every size."""
    highest = 2 * info.max_r // info.num_blocks
    constant = [(r,) * info.num_blocks for r in sorted({0, highest // 4, highest // 2, highest})]
    sparse: list[Schedule] = []
    while len(sparse) < PROBES - len(constant):
        share, r = random_numbers.random(), random_numbers.uniform(0, highest)
        merging = [random_numbers.random() < share for _ in range(info.num_blocks)]
        each = min(round(r * info.num_blocks / max(sum(merging), 1)), info.max_r)
        sparse.append(tuple(each if merges else 0 for merges in merging))
    return list(dict.fromkeys([*constant, *sparse]))
