"""Estimates of how long batches take and how many jobs arrive."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching.speed import MOST_LEARNED, Rate, Speed


@given(st.floats(0, 1), st.floats(1e-4, 1), st.lists(st.integers(1, 64), min_size=2, max_size=50))
def test_it_finds_the_line_that_batches_lie_on(a: float, b: float, sizes: list[int]) -> None:
    speed = Speed[str]()
    for n in sizes:
        speed.observe("key", n, a + b * n)
    for n in sizes:
        assert speed("key", n) == pytest.approx(a + b * n, rel=1e-4)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 10)), min_size=1, max_size=50))
def test_no_estimate_is_negative_and_none_shrinks_with_size(batches: list[tuple[int, float]]) -> None:
    speed = Speed[str]()
    for n, seconds in batches:
        speed.observe("key", n, seconds)
    estimates = [speed("key", n) for n in range(1, 65)]
    assert estimates[0] >= 0 and estimates == sorted(estimates)


def test_it_follows_a_device_that_slows_down() -> None:
    speed = Speed[str]()
    for slower in (1, 3):
        for n in (1, 8, 32) * 100:
            speed.observe("key", n, slower * (0.01 + 0.002 * n))
    assert speed("key", 16) == pytest.approx(3 * 0.042, rel=0.01)


def test_a_known_line_is_scaled_by_what_runs_and_others_with_it() -> None:
    speed = Speed[str]()
    speed.expect("fast", 0.01, 0.001)
    speed.expect("slow", 0.01, 0.002)
    assert speed("slow", 10) == pytest.approx(0.03)
    for _ in range(100):
        speed.observe("slow", 1, 2 * 0.012)  # of one size alone, yet large batches are known to gain
    assert speed("slow", 10) == pytest.approx(0.06, rel=0.01)
    assert speed("fast", 10) == pytest.approx(0.04, rel=0.01)
    assert speed.line("fast") == pytest.approx((0.02, 0.002), rel=0.01)


def test_one_stall_says_little() -> None:
    speed = Speed[str]()
    speed.expect("key", 0.01, 0.001)
    speed.observe("key", 1, 60.0)
    assert speed("key", 1) < 2 * 0.011


def test_of_an_unknown_key_nothing_is_expected() -> None:
    speed = Speed[str]()
    assert speed.line("key") is None and speed("key", 5) == 0


@given(st.floats(1, 1000), st.floats(0.1, 10))
def test_a_steady_rate_is_found(per_s: float, window_s: float) -> None:
    rate, now = Rate(window_s), 0.0
    assert rate(5.0) == 0
    while now < 8 * window_s:
        now += 1 / per_s
        rate.add(now)
    assert rate(now) == pytest.approx(per_s, rel=0.01, abs=2 / window_s)
    assert rate(now + window_s) == pytest.approx(rate(now) / math.e)


def test_keys_that_clients_make_up_are_forgotten_and_known_lines_are_not() -> None:
    speed = Speed[str | int]()
    speed.expect("known", 0.01, 0.001)
    speed.observe("known", 1, 0.022)
    before = speed.line("known")
    for key in range(10 * MOST_LEARNED):
        speed.observe("steady", 1, 0.5)
        speed.observe(key, 1, 1.0)
    assert speed.line(0) is None and speed.line(10 * MOST_LEARNED - 1) is not None
    assert speed("steady", 1) == pytest.approx(0.5)  # it is in use
    assert speed.line("known") == before
    assert len(speed._sums) == MOST_LEARNED and len(speed._factors) == len(speed._known) == 1


def test_a_line_that_becomes_known_takes_the_place_of_what_was_learned() -> None:
    speed = Speed[str]()
    speed.observe("key", 1, 1.0)
    speed.expect("key", 0.01, 0.001)
    assert speed.line("key") == (0.01, 0.001) and not speed._sums


def test_what_is_doubted_is_as_fast_as_it_was_measured_or_unknown() -> None:
    speed = Speed[str]()
    speed.expect("known", 0.0, 1.0)
    for key in ("known", "learned"):
        for _ in range(50):
            speed.observe(key, 1, 3.0)
    assert speed("known", 1) > 2.5 and speed("learned", 1) > 2.5
    for key in ("known", "learned"):
        speed.doubt(key)
    assert speed("known", 1) == 1.0 and speed.line("learned") is None
    for _ in range(50):
        speed.observe("known", 1, 0.5)
    speed.doubt("known")
    assert speed("known", 1) < 0.6  # faster than it was measured is no reason for a doubt
