"""Estimates of how long batches take and how many jobs arrive."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching.speed import FADE_S, MOST_LEARNED, Rate, Speed


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
    assert len(speed._learned) == MOST_LEARNED and len(speed._factors) == len(speed._known) == 1


def test_a_line_that_becomes_known_takes_the_place_of_what_was_learned() -> None:
    speed = Speed[str]()
    speed.observe("key", 1, 1.0)
    speed.expect("key", 0.01, 0.001)
    assert speed.line("key") == (0.01, 0.001) and not speed._learned


def test_one_short_batch_replaces_what_is_doubted() -> None:
    speed = Speed[str](lambda: 0.0)
    speed.expect("known", 0.0, 1.0)
    for key in ("known", "learned"):
        for _ in range(50):
            speed.observe(key, 1, 30.0)
        speed.observe(key, 1, 1.0)
        assert speed(key, 1) > 25  # it may be an outlier
        speed.observe(key, 1, 30.0)
        speed.doubt(key)
        speed.observe(key, 1, 1.0)
        assert speed(key, 1) == pytest.approx(1.0)


@pytest.mark.parametrize("is_known", [True, False])
@given(st.floats(1e-3, 1.0), st.floats(8.0, 1e4) | st.floats(0.01, 0.35), st.data())
def test_one_outlier_hardly_moves_an_estimate_and_two_that_agree_replace_it(
    is_known: bool, usual_s: float, times: float, data: st.DataObject
) -> None:
    speed = Speed[str](lambda: 0.0)
    if is_known:
        speed.expect("key", 0.0, usual_s)
    for _ in range(20):
        speed.observe("key", 1, usual_s)
    speed.observe("key", 1, times * usual_s)
    assert 0.85 <= speed("key", 1) / usual_s <= 1.35
    for _ in range(data.draw(st.integers(1, 3))):
        speed.observe("key", 1, usual_s)
    speed.observe("key", 1, times * usual_s)
    assert 0.75 <= speed("key", 1) / usual_s <= 1.8  # the batches between say that the first was an outlier
    speed.observe("key", 1, times * usual_s)
    assert speed("key", 1) == pytest.approx(times * usual_s)


def test_a_first_batch_that_was_an_outlier_is_forgotten_after_two_others() -> None:
    speed = Speed[str]()
    for n, seconds in ((1, 3.0), (1, 0.06), (1, 0.06)):
        speed.observe("key", n, seconds)
    assert speed("key", 1) == pytest.approx(0.06)


def test_the_factor_of_a_key_fades_to_that_of_all_while_none_of_its_batches_runs() -> None:
    now = 0.0
    speed = Speed[str](lambda: now)
    for key in ("rare", "common"):
        speed.expect(key, 0.0, 1.0)
    for _ in range(20):
        speed.observe("rare", 1, 10.0)
    assert speed("rare", 1) == pytest.approx(10.0)
    for _ in range(50):
        speed.observe("common", 1, 1.0)
    assert speed("rare", 1) == pytest.approx(10.0) and speed("common", 1) == pytest.approx(1.0)
    now = FADE_S
    assert speed("rare", 1) == pytest.approx(1 + 9 / math.e)
    now = 10 * FADE_S
    assert speed("rare", 1) == pytest.approx(1.0, rel=0.01)


def test_sizes_that_were_not_seen_disprove_nothing() -> None:
    speed = Speed[str]()
    for _ in range(3):
        speed.observe("key", 1, 1.0)
        speed.observe("key", 32, 1.1)  # far less than 32 times a batch of one
    assert speed("key", 1) == pytest.approx(1.0) and speed("key", 32) == pytest.approx(1.1)
