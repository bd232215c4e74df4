"""The search, on losses that are functions of the schedule: it finds what is there and is not fooled by jitter."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.schedule_parts.search import Space, search
from server.dial import Schedule
from tome_core.schedule import token_counts

BLOCKS, TOKENS, PREFIX = 6, 65, 1


def tokens_computed(schedule: Schedule) -> float:
    """A cost: tokens that leave each block, summed."""
    return float(sum(token_counts(schedule, TOKENS, PREFIX)[1:]))


def space(budget: float) -> Space:
    return Space(tokens_computed, budget, BLOCKS, TOKENS, PREFIX)


EVEN = space(240).schedule((1.0,) * BLOCKS)
LATE = (0, 0, 10, 30, 0, 0)


def loss_from(best: Schedule, jitter: float = 0.0) -> Any:
    """A loss that grows with the distance from the best schedule's token counts, and jitters from one to the next."""
    aim = token_counts(best, TOKENS, PREFIX)

    def loss(schedule: Schedule, part: int) -> float:
        counts = token_counts(schedule, TOKENS, PREFIX)
        distance = sum((math.log(n) - math.log(m)) ** 2 for n, m in zip(counts, aim, strict=True))
        noise = random.Random(repr((schedule, part))).gauss(0, jitter)
        return math.exp(distance / 4 + noise) * (1 + part)  # some parts are harder

    return loss


def last(loss: Any, budget: float, **how: Any) -> Schedule:
    how = {"rounds": 4, "trials": 40, "parts": 4} | how
    return list(search(loss, space(budget), (1.0,) * BLOCKS, **how))[-1].schedule


@given(st.lists(st.floats(-1, 1), min_size=BLOCKS, max_size=BLOCKS), st.floats(70, 390))
def test_a_shape_stands_for_the_schedule_that_merges_least_within_the_budget(shape: list[float], budget: float) -> None:
    schedule = space(budget).schedule(tuple(shape))
    if schedule is None:
        most = space(1e9)._scaled(tuple(shape), 4096.0)
        assert tokens_computed(most) > budget
        return
    assert tokens_computed(schedule) <= budget
    assert all(r == 0 for part, r in zip(shape, schedule, strict=True) if part <= 0)
    # One token less in a block that merges is over the budget, or nearly: others may round the other way.
    for block, r in enumerate(schedule):
        if r:
            less = tuple(other - (i == block) for i, other in enumerate(schedule))
            assert tokens_computed(less) > budget - 2 * BLOCKS


def test_an_even_shape_spreads_evenly() -> None:
    assert EVEN is not None and max(EVEN) - min(EVEN) <= 1


def test_a_budget_that_needs_no_merging_gets_none() -> None:
    assert space(BLOCKS * TOKENS).schedule((1.0,) * BLOCKS) == (0,) * BLOCKS


def test_blocks_that_a_shape_does_not_name_merge_nothing() -> None:
    schedule = space(300).schedule((1.0, 1.0))
    assert schedule is not None and schedule[2:] == (0,) * 4 and sum(schedule) > 0


def test_what_is_clipped_is_not_listed() -> None:
    schedule = space(100).schedule((1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    assert schedule is None  # half of the tokens in one block do not reach it
    assert space(182).schedule((1.0, 0.0, 0.0, 0.0, 0.0, 1.0)) == (32, 0, 0, 0, 0, 16)


@pytest.mark.parametrize("best", [LATE, (30, 10, 0, 0, 0, 0), (5, 5, 12, 12, 5, 5)])
def test_the_best_schedule_of_a_budget_is_found(best: Schedule) -> None:
    budget, loss = tokens_computed(best), loss_from(best)
    found, even = last(loss, budget), space(budget).schedule((1.0,) * BLOCKS)
    assert even is not None
    assert math.log(loss(found, 0)) < 0.15 * math.log(loss(even, 0))
    assert tokens_computed(found) <= budget


def test_jitter_as_large_as_the_gain_does_not_hide_it() -> None:
    budget, smooth = tokens_computed(LATE), loss_from(LATE)
    even = space(budget).schedule((1.0,) * BLOCKS)
    assert even is not None
    gain = math.log(smooth(even, 0))
    found = last(loss_from(LATE, jitter=gain), budget)
    assert math.log(smooth(found, 0)) < 0.6 * gain


def test_where_there_is_jitter_alone_nothing_is_learnt() -> None:
    def jitter(schedule: Schedule, part: int) -> float:
        return math.exp(random.Random(repr((schedule, part))).gauss(0, 1))

    fits = [found.fit for found in search(jitter, space(240), (1.0,) * BLOCKS, rounds=3, trials=40)]
    assert max(fits) < 0.25


def test_every_trial_keeps_the_budget_and_parts_take_turns() -> None:
    asked: list[tuple[Schedule, int]] = []

    def loss(schedule: Schedule, part: int) -> float:
        asked.append((schedule, part))
        return loss_from(LATE)(schedule, part)  # type: ignore[no-any-return]

    rounds = list(search(loss, space(240), (1.0,) * BLOCKS, rounds=2, trials=12, parts=3))
    assert len(rounds) == 2 and len(asked) == 24
    assert [part for _, part in asked] == [0, 1, 2] * 8
    assert all(tokens_computed(schedule) <= 240 for schedule, _ in asked)


@settings(max_examples=5)
@given(st.integers(0, 1000))
def test_the_same_seed_finds_the_same(seed: int) -> None:
    once, again = (last(loss_from(LATE, jitter=0.1), 240, rounds=1, trials=16, seed=seed) for _ in range(2))
    assert once == again


def test_a_budget_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="meets the budget"):
        last(loss_from(LATE), 10)
