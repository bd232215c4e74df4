"""Batches that fail: culprits are parted from the others, and an error of everybody costs little."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching.splitting import HOPELESS, run_split
from server.errors import EngineError, UnavailableError


class Device:
    """Doubles numbers, and raises for a batch with a bad one; notes its batches."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad
        self.batches: list[list[int]] = []

    async def __call__(self, payloads: Sequence[int]) -> list[int]:
        self.batches.append(list(payloads))
        if culprits := self.bad & set(payloads):
            raise ValueError(f"bad: {sorted(culprits)}")
        return [2 * payload for payload in payloads]


@given(size=st.integers(1, 64), bad=st.sets(st.integers(0, 63), max_size=HOPELESS - 1))
async def test_a_few_culprits_get_their_error_and_everybody_else_an_answer(size: int, bad: set[int]) -> None:
    device = Device(bad)
    outcomes = await run_split(device, range(size))
    for payload, outcome in enumerate(outcomes):
        if payload in bad:
            assert isinstance(outcome, EngineError) and f"bad: [{payload}]" in outcome.message
        else:
            assert outcome == 2 * payload


@pytest.mark.parametrize("size", [1, 2, 3, 8, 32, 33])
async def test_one_culprit_costs_two_runs_a_halving(size: int) -> None:
    for culprit in range(size):
        device = Device({culprit})
        await run_split(device, range(size))
        assert len(device.batches) <= 1 + 2 * math.ceil(math.log2(size))
        assert sum(map(len, device.batches)) <= 3 * size + math.log2(size) + 1  # rounded up in each halving


@pytest.mark.parametrize("size", [4, 32, 256])
async def test_an_error_of_everybody_costs_about_one_more_batch(size: int) -> None:
    device = Device(set(range(size)))
    outcomes = await run_split(device, range(size))
    assert all(isinstance(outcome, EngineError) for outcome in outcomes)
    assert sum(map(len, device.batches)) <= 2 * size + 2 * HOPELESS


async def test_neighbours_of_one_request_do_not_look_like_everybody() -> None:
    outcomes = await run_split(Device(set(range(12))), range(32))
    assert [isinstance(outcome, EngineError) for outcome in outcomes] == [payload < 12 for payload in range(32)]


async def test_a_dead_device_is_asked_no_more() -> None:
    calls = []

    async def run(payloads: Sequence[int]) -> list[int]:
        calls.append(list(payloads))
        if len(calls) == 1:
            raise ValueError("a bad image")
        raise UnavailableError("the device works no more")

    outcomes = await run_split(run, range(8))
    assert len(calls) == 2
    assert {type(outcome) for outcome in outcomes} == {UnavailableError}


async def test_answers_that_do_not_match_are_no_answers() -> None:
    async def run(payloads: Sequence[int]) -> list[int]:
        return list(payloads)[1:]

    assert all(isinstance(outcome, EngineError) for outcome in await run_split(run, range(4)))
