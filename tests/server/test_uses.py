"""Counts of uses: they fade, they are bounded, and what is used by many outlives what one client asks for."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.device.uses import HALVED_AFTER, Uses


@given(st.lists(st.integers(0, 9), max_size=200))
def test_few_uses_are_counted_as_they_are(keys: list[int]) -> None:
    uses = Uses[int]()
    assert [uses.note(key) for key in keys] == [keys[: index + 1].count(key) for index, key in enumerate(keys)]
    counts = Counter(keys)
    assert [uses.of(key) for key in range(10)] == [counts[key] for key in range(10)]
    if keys:
        assert counts[uses.least(counts)] == min(counts.values())


def test_the_past_fades_and_ever_other_keys_take_no_memory() -> None:
    uses = Uses[str]()
    for _ in range(HALVED_AFTER - 1):
        uses.note("old")
    for number in range(20 * HALVED_AFTER):
        uses.note(str(number))
        assert len(uses) <= 2 * HALVED_AFTER
    assert uses.of("old") == 0


def test_what_everybody_uses_counts_more_than_whatever_one_client_names() -> None:
    uses = Uses[str]()
    for number in range(10 * HALVED_AFTER):
        uses.note("everybody's")
        for _ in range(3):
            uses.note(str(number))
    assert uses.least(["everybody's", str(number)]) == str(number)
