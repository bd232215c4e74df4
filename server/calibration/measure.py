"""Measures the rows of a curve: the answers of each schedule on photos, and the times of its batches.

Everything runs through the runner, as in the server. The schedules take turns batch by batch, so that other load of the
machine affects all of them alike.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from server.calibration.agreement import WANTED, answers, judge
from server.curve import AgreementOf, CurveRow
from server.device.models import LoadedModel
from server.device.prepared import stacked
from server.device.runner import Runner
from server.dial import Schedule, r_of, text_of
from tome_core.cost import flops
from tome_core.families.dimensions import dimensions
from tome_core.families.family import UnsupportedModelError

RUNS = 5
"""Timings of a batch of each size, besides the photos in their full batches."""


def measure(
    loaded: LoadedModel,
    runner: Runner,
    schedules: Sequence[Schedule],
    photos: Sequence[bytes],
    labels: Sequence[int | None],
    max_batch_size: int,
    of: AgreementOf = "top1",
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> list[CurveRow]:
    """Measures schedules.

    Args:
        loaded: The model.
        runner: The device that holds it.
        schedules: `r` of each block; the first is r=0.
        photos: Pixels of each photo.
        labels: The class of each photo, if it is known.
        max_batch_size: Images of a full batch.
        of: The kind of agreement.
        progress: Called with the share that is done and the name of the current step.
    """
    assert max(schedules[0]) == 0, "agreement is with r=0"
    for number, schedule in enumerate(schedules, start=1):
        progress(0.0, f"warming up r={text_of(r_of(schedule))} ({number} of {len(schedules)})")
        runner.warm_up(loaded.info.batch_key(schedule))
    sized = [list(itertools.islice(itertools.cycle(photos), size)) for size in batch_sizes(max_batch_size)]
    whole = [photos[at : at + max_batch_size] for at in range(0, len(photos), max_batch_size)]
    work = (1 + RUNS) * sum(map(len, sized)) + len(photos)
    done = 0

    def take_turns(batch: Sequence[bytes]) -> dict[Schedule, tuple[Tensor, float]]:
        """The answers to the images under each schedule, and the seconds of each."""
        nonlocal done
        seen = {schedule: _answers(loaded, runner, of, schedule, batch) for schedule in schedules}
        done += len(batch)
        progress(done / work, f"{done:,} of {work:,} images at each r")
        return seen

    parts: dict[Schedule, list[Tensor]] = {schedule: [] for schedule in schedules}
    seconds: dict[Schedule, dict[int, list[float]]] = {s: {len(batch): [] for batch in sized} for s in schedules}
    for batch in sized:
        take_turns(batch)  # warm-up
    for part in whole:
        for schedule, (answers_of_part, took_s) in take_turns(part).items():
            parts[schedule].append(answers_of_part)
            if len(part) == max_batch_size:
                seconds[schedule][max_batch_size].append(took_s)
    for batch in sized * RUNS:
        for schedule, (_, took_s) in take_turns(batch).items():
            seconds[schedule][len(batch)].append(took_s)
    medians = {s: {n: statistics.median(times) for n, times in sizes.items()} for s, sizes in seconds.items()}
    answered = {schedule: torch.cat(parts[schedule]) for schedule in schedules}
    return [
        _row(loaded, of, schedule, medians[schedule], answered[schedule], answered[schedules[0]], labels)
        for schedule in schedules
    ]


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4 and so on, and the largest."""
    powers = (2**power for power in itertools.count())
    return [*itertools.takewhile(lambda size: size < largest, powers), largest]


def fit(seconds: Mapping[int, float]) -> tuple[float, float]:
    """a and b of the line a + b n through the seconds of batches of n, by relative least squares; a is never negative.

    If batches of all sizes take the same time, b is a tenth of the time of an image in the largest batch.
    """
    ones, sizes = [1 / t for t in seconds.values()], [n / t for n, t in seconds.items()]
    aa, ab, bb = _dot(ones, ones), _dot(ones, sizes), _dot(sizes, sizes)
    if len(seconds) > 1:
        largest = max(seconds)
        b = (aa * sum(sizes) - ab * sum(ones)) / (aa * bb - ab * ab)
        b = max(b, 0.1 * seconds[largest] / largest)
        a = (sum(ones) - b * ab) / aa
        if a >= 0:
            return a, b
    return 0.0, sum(sizes) / bb


def _dot(x: Sequence[float], y: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def _answers(
    loaded: LoadedModel, runner: Runner, of: AgreementOf, schedule: Schedule, photos: Sequence[bytes]
) -> tuple[Tensor, float]:
    """The compared answer for each photo, and the seconds for all."""
    key = loaded.info.batch_key(schedule)
    start = time.perf_counter()
    found = runner.launch(key, stacked(photos, key.input_size, runner.device), WANTED[of]).result()
    return answers(of, found), time.perf_counter() - start


def _row(
    loaded: LoadedModel,
    of: AgreementOf,
    schedule: Schedule,
    seconds: Mapping[int, float],
    answered: Tensor,
    unmerged: Tensor,
    labels: Sequence[int | None],
) -> CurveRow:
    overhead_s, image_s = fit(seconds)
    judged = judge(of, answered, unmerged)
    guesses = answered[:, 0].tolist() if of == "top1" else []
    right = [guess == label for guess, label in zip(guesses, labels, strict=False) if label is not None]
    largest = max(seconds)
    return CurveRow(
        r=schedule,
        tokens=loaded.info.token_counts(schedule)[-1],
        gflops=_gflops(loaded, schedule),
        images_per_s=largest / seconds[largest],
        overhead_s=overhead_s,
        image_s=image_s,
        agreement=judged.agreement,
        # exact by definition, so there is no sampling interval
        agreement_interval=judged.interval if max(schedule) else (1.0, 1.0),
        top1=sum(right) / len(right) if right else None,
        neighbours=judged.neighbours,
    )


def _gflops(loaded: LoadedModel, schedule: Schedule) -> float | None:
    try:
        return flops(dimensions(loaded.merged), schedule) / 1e9
    except UnsupportedModelError:
        return None
