"""`r` as people write it: what is read, what is refused, and how a schedule is named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.dial import (
    AutoR,
    PlainR,
    label_of,
    parse_r,
    parse_setting,
    r_of,
    schedule_of,
    setting_from_json,
    setting_to_json,
    text_of,
)
from server.errors import InvalidError

BLOCKS, MAX_R = 4, 8
NUMBERS = st.integers(0, 10**6)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (8, 8),
        (0, 0),
        ("8", 8),
        (" 8 ", 8),
        ([16, 14], (16, 14)),
        ((16, 14), (16, 14)),
        ([8], (8,)),
        ("[16,14]", (16, 14)),
        (" [16, 14] ", (16, 14)),
        ("16,14", (16, 14)),
        ("16, 14, 0", (16, 14, 0)),
    ],
)
def test_every_spelling_of_r_is_read(said: object, meant: PlainR) -> None:
    assert parse_r(said) == meant


@pytest.mark.parametrize(
    "said",
    [
        *["", " ", "8 9", *", 8, ,8 eight 8.0 8.5 -1 1e3 0x10 [] [8 8] [[8]] null true".split()],
        *["[8, null]", "[8, -1]", "[8, 1.5]", '["8"]', "NaN", "Infinity", "{}", "auto", "９,", "9" * 5000],
        *[None, True, False, 8.0, -1, [], (), [True], [-1], [8, None], ["8"], [[8]], {}, {"r": 8}, b"8", float("nan")],
    ],
)
def test_anything_else_is_refused_with_what_was_said(said: object) -> None:
    with pytest.raises(InvalidError, match="must be an integer from 0, a list") as refusal:
        parse_r(said)
    assert repr(said)[:10] in refusal.value.message  # what is long may be cut


@given(NUMBERS)
def test_a_number_reads_back(r: int) -> None:
    assert parse_r(r) == parse_r(str(r)) == parse_r(json.dumps(r)) == r


@given(st.lists(NUMBERS, min_size=2))
def test_a_list_reads_back_from_json_and_from_commas(numbers: list[int]) -> None:
    assert parse_r(numbers) == parse_r(json.dumps(numbers)) == parse_r(",".join(map(str, numbers))) == tuple(numbers)


@given(st.text('0123456789[]{}, -+.eExn"\u0661\ud800', max_size=8))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        r = parse_r(text)
    except InvalidError:
        return
    assert parse_r(json.dumps(r)) == r


@pytest.mark.parametrize(
    ("r", "schedule"),
    [(0, (0, 0, 0, 0)), (8, (8, 8, 8, 8)), ((8, 7), (8, 7, 0, 0)), ((1, 2, 3, 4), (1, 2, 3, 4)), ((5,), (5, 0, 0, 0))],
)
def test_a_number_counts_for_every_block_and_a_short_list_ends_in_zeros(r: PlainR, schedule: tuple[int, ...]) -> None:
    assert schedule_of(r, BLOCKS, MAX_R) == schedule


@pytest.mark.parametrize("r", [9, 10**30, (9,), (0, 0, 0, 9)])
def test_an_r_above_the_range_is_refused_with_the_range(r: PlainR) -> None:
    with pytest.raises(InvalidError, match="between 0 and 8"):
        schedule_of(r, BLOCKS, MAX_R)


def test_a_list_longer_than_the_model_is_refused_with_its_blocks() -> None:
    with pytest.raises(InvalidError, match="lists 5 blocks; this model has 4"):
        schedule_of((1, 1, 1, 1, 1), BLOCKS, MAX_R)


@pytest.mark.parametrize(
    ("inflect", "schedule"), [(-1, (8, 5, 3, 0)), (1, (0, 3, 5, 8)), (0, (4, 4, 4, 4)), (-0.5, (6, 5, 3, 2))]
)
def test_a_ramp_keeps_the_sum(inflect: float, schedule: tuple[int, ...]) -> None:
    assert schedule_of(4, BLOCKS, MAX_R, inflect) == schedule


def test_the_steep_end_of_a_ramp_is_clipped_to_the_range() -> None:
    assert schedule_of(8, BLOCKS, MAX_R, -1) == (MAX_R, MAX_R, 5, 0)


@pytest.mark.parametrize("inflect", [0.0, -1.0])
def test_a_ramp_of_an_r_above_the_range_is_refused(inflect: float) -> None:
    with pytest.raises(InvalidError, match="between 0 and 8"):
        schedule_of(9, BLOCKS, MAX_R, inflect)


@pytest.mark.parametrize("inflect", [-1.01, 2, float("inf"), float("nan")])
def test_a_ramp_out_of_range_is_refused_with_the_range(inflect: float) -> None:
    with pytest.raises(InvalidError, match="between -1 and 1"):
        schedule_of(4, BLOCKS, MAX_R, inflect)


def test_a_ramp_over_a_list_is_refused() -> None:
    with pytest.raises(InvalidError, match="beside a single r"):
        schedule_of((4, 4), BLOCKS, MAX_R, 0.5)


@given(st.integers(0, MAX_R) | st.lists(st.integers(0, MAX_R), min_size=1, max_size=BLOCKS).map(tuple))
def test_the_shortest_way_to_say_a_schedule_means_the_same(r: PlainR) -> None:
    schedule = schedule_of(r, BLOCKS, MAX_R)
    assert schedule_of(r_of(schedule), BLOCKS, MAX_R) == schedule


@given(st.lists(st.integers(0, MAX_R), min_size=BLOCKS, max_size=BLOCKS).map(tuple))
def test_a_metric_label_comes_from_a_closed_set(schedule: tuple[int, ...]) -> None:
    label = label_of(schedule)
    assert label in {str(r) for r in range(MAX_R + 1)} | {"schedule"}
    assert (label == "schedule") == (len(set(schedule)) > 1)
    assert label == "schedule" or schedule == (int(label),) * BLOCKS


@pytest.mark.parametrize("bounds", [AutoR(), AutoR(8), AutoR(None, 0.95), AutoR(0, 1)])
def test_auto_reads_back(bounds: AutoR) -> None:
    assert parse_setting("auto", bounds.max_r, bounds.min_agreement) == bounds
    assert setting_from_json(json.loads(json.dumps(setting_to_json(bounds)))) == bounds
    assert text_of(bounds) == "auto"


@pytest.mark.parametrize("r", [0, 8, (8, 7, 6)])
def test_a_fixed_setting_reads_back(r: PlainR) -> None:
    assert setting_from_json(json.loads(json.dumps(setting_to_json(r)))) == r


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (("auto", -1), "max_r is -1"),
        (("auto", 1.5), "max_r is 1.5"),
        (("auto", True), "max_r is True"),
        (("auto", None, 1.1), "min_agreement is 1.1"),
        (("auto", None, "0.9"), "min_agreement is '0.9'"),
        (("auto", None, float("nan")), "min_agreement is nan"),
        ((8, 3), "go with r=auto, not with r=8"),
        ((8, None, 0.9), "go with r=auto"),
    ],
)
def test_wrong_bounds_are_refused(said: tuple[object, ...], message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        parse_setting(*said)
