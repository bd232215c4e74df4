"""Intervals: the published ones, and paired differences that hold the truth as often as they say."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.intervals import paired_difference, wilson


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (95, 100, 0.8882, 0.9785)]
)
def test_wilson_gives_published_intervals(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_a_paired_difference_holds_the_truth_as_often_as_it_says() -> None:
    random_numbers, held, tries = random.Random(0), 0, 400
    for _ in range(tries):
        ours = [random_numbers.random() < 0.9 for _ in range(200)]
        theirs = [our if random_numbers.random() < 0.8 else random_numbers.random() < 0.8 for our in ours]
        difference, low, high = paired_difference(ours, theirs)
        assert low <= difference <= high
        held += low <= 0.02 <= high  # 0.2 * (0.9 - 0.8)
    assert 0.92 <= held / tries <= 0.98


def test_a_paired_difference_counts_the_photos_on_which_one_alone_holds() -> None:
    ours = [True] * 60 + [False] * 40
    theirs = [True] * 50 + [False] * 10 + [True] * 4 + [False] * 36
    difference, low, high = paired_difference(ours, theirs)
    assert difference == pytest.approx(0.06)  # 10 won, 4 lost
    centre, half_width = 6 / 102, 1.96 * ((15 - 36 / 102) ** 0.5) / 102
    assert (low, high) == pytest.approx((centre - half_width, centre + half_width), rel=1e-4)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_a_paired_difference_lies_in_its_interval_and_turns_round(photos: list[tuple[bool, bool]]) -> None:
    ours, theirs = zip(*photos, strict=True)
    difference, low, high = paired_difference(ours, theirs)
    assert difference == pytest.approx((sum(ours) - sum(theirs)) / len(ours))
    assert low < high
    assert paired_difference(theirs, ours) == pytest.approx((-difference, -high, -low))


def test_photos_that_agree_anyway_make_a_paired_difference_sure() -> None:
    same, low, high = paired_difference([True] * 500, [True] * 500)
    assert same == 0 and -0.01 < low < 0 < high < 0.01
    difference, low, high = paired_difference([True] * 300, [True] * 150 + [False] * 150)
    assert difference == 0.5 and 0.42 < low < 0.5 < high < 0.58
