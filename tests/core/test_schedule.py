"""Schedules: what a caller says becomes one r per block, and token counts follow from that alone."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tome_core.schedule import Ramp, Rounding, clip, max_r, mean_r, resolve, token_counts

rs = st.integers(0, 64)
inflects = st.floats(-1, 1)
depths = st.integers(1, 48)


@given(rs, depths)
def test_a_number_means_the_same_in_every_block(r: int, depth: int) -> None:
    assert resolve(r, depth) == (r,) * depth


@given(st.lists(rs, max_size=24), st.integers(0, 24))
def test_a_short_list_ends_in_zeros(values: list[int], missing: int) -> None:
    assert resolve(values, len(values) + missing) == tuple(values + [0] * missing)
    assert resolve(tuple(values), len(values) + missing) == tuple(values + [0] * missing)


def test_a_list_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="lists 13 blocks; this model has 12"):
        resolve([1] * 13, 12)


@pytest.mark.parametrize("r", [-1, [8, -1]])
def test_a_negative_r_is_refused(r: Any) -> None:
    with pytest.raises(ValueError, match="r is -1"):
        resolve(r, 12)


@pytest.mark.parametrize("r", [True, "8", b"8", 8.0, None, [True], ["8"], [8.0], {8}])
def test_what_is_no_integer_is_refused(r: Any) -> None:
    with pytest.raises(TypeError, match="must be an integer"):
        resolve(r, 12)


@pytest.mark.parametrize("arguments", [(-1,), (8, 1.5), (8, -1.5), (8, float("nan")), (8, -1.0, "nearest")])
def test_a_ramp_outside_its_range_is_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        Ramp(*arguments)


@pytest.mark.parametrize("r", [True, "8", 8.0])
def test_a_ramp_of_no_integer_is_refused(r: Any) -> None:
    with pytest.raises(TypeError, match="must be an integer"):
        Ramp(r)


@given(rs, inflects, depths)
def test_an_exact_ramp_keeps_the_total(r: int, inflect: float, depth: int) -> None:
    assert sum(resolve(Ramp(r, inflect), depth)) == r * depth


@given(rs, inflects, depths)
def test_an_exact_ramp_never_turns_back(r: int, inflect: float, depth: int) -> None:
    counts = resolve(Ramp(r, inflect), depth)
    assert list(counts) == sorted(counts, reverse=inflect < 0)


@given(rs, inflects, st.integers(2, 48))
def test_an_exact_ramp_stays_within_one_token_of_its_line(r: int, inflect: float, depth: int) -> None:
    for i, count in enumerate(resolve(Ramp(r, inflect), depth)):
        line = r * (1 + Fraction(inflect) * (Fraction(2 * i, depth - 1) - 1))
        assert abs(count - line) < 1


@given(rs, st.integers(2, 48))
def test_full_ramps_run_between_twice_r_and_zero_and_mirror_each_other(r: int, depth: int) -> None:
    falling, rising = resolve(Ramp(r, -1), depth), resolve(Ramp(r, 1), depth)
    assert (falling[0], falling[-1]) == (2 * r, 0)
    assert (rising[0], rising[-1]) == (0, 2 * r)
    assert resolve(Ramp(r, 0), depth) == (r,) * depth


@given(rs, inflects, st.sampled_from(["exact", "published"]))
def test_a_single_block_merges_r(r: int, inflect: float, rounding: Rounding) -> None:
    assert resolve(Ramp(r, inflect, rounding), 1) == (r,)


@pytest.mark.parametrize(("r", "depth", "published", "exact"), [(13, 12, 151, 156), (8, 24, 181, 192)])
def test_the_published_ramp_truncates_and_merges_fewer(r: int, depth: int, published: int, exact: int) -> None:
    assert sum(resolve(Ramp(r, -1, "published"), depth)) == published
    assert sum(resolve(Ramp(r, -1, "exact"), depth)) == exact


@pytest.mark.parametrize(
    ("r", "inflect", "depth", "counts"),
    [
        (15, 1.0, 12, (0, 2, 5, 8, 10, 13, 16, 19, 21, 24, 27, 29)),  # 30 / 11 * 11 is 29.999..., and truncates
        (10, 0.1, 3, (9, 10, 11)),  # 10 * (1.0 - 0.1) is 9.0
    ],
)
def test_the_published_ramp_truncates_floats(r: int, inflect: float, depth: int, counts: tuple[int, ...]) -> None:
    assert resolve(Ramp(r, inflect, "published"), depth) == counts


@pytest.mark.parametrize(
    ("tokens", "prefix", "expected"),
    [(197, 1, 98), (198, 2, 98), (196, 0, 98), (2, 1, 0), (3, 1, 1), (1, 1, 0), (3, 5, 0)],
)
def test_a_block_can_merge_half_of_the_tokens_that_are_no_prefix(tokens: int, prefix: int, expected: int) -> None:
    assert max_r(tokens, prefix) == expected


@given(st.lists(rs, max_size=24), st.integers(0, 10), st.integers(0, 300))
def test_each_block_takes_its_r_or_half_of_the_patches(schedule: list[int], prefix: int, patches: int) -> None:
    counts = token_counts(schedule, prefix + patches, prefix)
    assert counts[0] == prefix + patches
    for r, (before, after) in zip(schedule, pairwise(counts), strict=True):
        assert after == max(before - r, prefix + -(-(before - prefix) // 2))


@given(st.lists(rs, max_size=24), st.integers(0, 10), st.integers(0, 300))
def test_a_clipped_schedule_is_what_the_counts_lose_and_clips_to_itself(
    schedule: list[int], prefix: int, patches: int
) -> None:
    clipped = clip(schedule, prefix + patches, prefix)
    counts = token_counts(schedule, prefix + patches, prefix)
    assert clipped == tuple(before - after for before, after in pairwise(counts))
    assert clip(clipped, prefix + patches, prefix) == clipped


@given(rs, depths)
def test_the_mean_of_a_number_is_that_number(r: int, depth: int) -> None:
    assert mean_r(resolve(r, depth)) == r


@given(rs, inflects, depths)
def test_the_mean_of_an_exact_ramp_is_its_r(r: int, inflect: float, depth: int) -> None:
    assert mean_r(resolve(Ramp(r, inflect), depth)) == r


@given(st.lists(rs, min_size=1, max_size=48))
def test_the_mean_is_the_nearest_number_and_the_upper_one_halfway(schedule: list[int]) -> None:
    mean = Fraction(sum(schedule), len(schedule))
    assert -Fraction(1, 2) < mean_r(schedule) - mean <= Fraction(1, 2)
    assert min(schedule) <= mean_r(schedule) <= max(schedule)


@given(st.lists(rs, min_size=1, max_size=24), st.randoms(use_true_random=False))
def test_the_mean_knows_no_order(schedule: list[int], random: Random) -> None:
    mixed = random.sample(schedule, len(schedule))
    assert mean_r(mixed) == mean_r(tuple(schedule)) == mean_r(schedule * 2)


def test_blocks_that_a_short_list_leaves_out_count_as_zeros() -> None:
    assert [mean_r(resolve([9], depth)) for depth in (1, 2, 3, 12, 24)] == [9, 5, 3, 1, 0]
