"""The dial under loads, in virtual time: the batcher and the policy together."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from server.batching.policy import Rung
from server.calibration.simulator import Outcome, simulate
from server.dial import AutoR, Schedule

STEPS = [
    Rung((0,) * 12, 0.004, 1 / 66, 1.0),
    Rung((4,) * 12, 0.005, 1 / 80, 0.973),
    Rung((8,) * 12, 0.005, 1 / 92, 0.948),
    Rung((13,) * 12, 0.005, 1 / 112, 0.909),
    Rung((16,) * 12, 0.005, 1 / 128, 0.868),
]
SLOWEST, FASTEST = STEPS[0].schedule, STEPS[-1].schedule
CAPACITY = 32 / (STEPS[0].overhead_s + 32 * STEPS[0].image_s)


def poisson(per_s: float, seconds: float) -> Iterator[float]:
    numbers, now = random.Random(0), 0.0
    while (now := now + numbers.expovariate(per_s)) < seconds:
        yield now


def square_wave(low: float, high: float, period_s: float, seconds: float) -> Iterator[float]:
    numbers, now = random.Random(0), 0.0
    while now < seconds:
        now += numbers.expovariate(high if now // period_s % 2 else low)
        yield now


def under(load: float, setting: Schedule | AutoR, seconds: float = 30) -> Outcome:
    return simulate(STEPS, poisson(load * CAPACITY, seconds), 1.0, setting)


def test_half_the_load_gets_full_accuracy() -> None:
    outcome = under(0.5, AutoR())
    assert (outcome.goodput, outcome.agreement, outcome.turns) == (1, 1, 0)


def test_accuracy_is_given_up_before_requests_are() -> None:
    unmerged, auto = under(1.5, SLOWEST), under(1.5, AutoR())
    assert unmerged.goodput < 0.7 and auto.goodput > 0.99
    assert auto.agreement is not None and auto.agreement > 0.868  # no further than it must


@pytest.mark.parametrize("load", [0.5, 0.9, 1.1, 1.5, 2, 3])
def test_auto_is_about_as_good_as_the_better_of_both(load: float) -> None:
    best = max(under(load, fixed).goodput for fixed in (SLOWEST, FASTEST))
    assert under(load, AutoR()).goodput > best - 0.02


@pytest.mark.parametrize("load", [1.2, 2, 4])
def test_under_any_load_the_device_computes_nothing_in_vain(load: float) -> None:
    assert under(load, SLOWEST).goodput > 0.95 / load


def test_a_square_wave_turns_the_dial_a_few_times_a_wave() -> None:
    waves = 6
    outcome = simulate(STEPS, square_wave(0.4 * CAPACITY, 1.5 * CAPACITY, 5, 10 * waves), 1.0, AutoR())
    assert outcome.goodput > 0.99
    assert 2 * waves <= outcome.turns <= 6 * waves
    steady = simulate(STEPS, square_wave(1.2 * CAPACITY, 1.2 * CAPACITY, 5, 60), 1.0, AutoR())
    assert steady.turns < 60 / 4


def test_bounds_hold_whatever_the_load() -> None:
    bounded = under(3, AutoR(min_agreement=0.94))
    assert bounded.agreement is not None and bounded.agreement >= 0.94 and bounded.mean_r <= 8
    assert under(3, AutoR(max_r=0)).mean_r == 0


def test_it_always_says_the_same_in_less_time_than_it_simulates() -> None:
    first, second = (under(1.2, AutoR(), seconds=60) for _ in range(2))
    assert first == second
