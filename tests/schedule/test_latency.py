"""Latencies: those that follow the line are predicted, and a stall does not spoil them."""

from __future__ import annotations

import pytest

from benchmarks.schedule_parts.latency import Latency, measure
from server.dial import Schedule
from tests.server.conftest import model_info


def fake_seconds(schedule: Schedule) -> float:
    """A device on which a token costs 1 ms, a pair of them 10 us, a token in the MLP 2 ms, and merging 5 ms."""
    counts = model_info(num_tokens=65, max_r=32, num_blocks=6).token_counts(schedule)
    merging = sum(before > after for before, after in zip(counts, counts[1:], strict=False))
    return 0.02 + sum(1e-3 * n + 1e-5 * n * n for n in counts[:-1]) + sum(2e-3 * n for n in counts[1:]) + 5e-3 * merging


def test_latencies_that_follow_the_line_are_predicted() -> None:
    latency = Latency(fake_seconds, model_info(num_tokens=65, max_r=32, num_blocks=6))
    assert latency.error < 1e-6
    for schedule in [(0,) * 6, (0, 30, 0, 0, 10, 0), (3, 1, 4, 1, 5, 9)]:
        assert latency(schedule) == pytest.approx(fake_seconds(schedule), rel=1e-6)


def test_one_slow_run_does_not_spoil_a_latency() -> None:
    calls: list[Schedule] = []

    def seconds(schedule: Schedule) -> float:
        calls.append(schedule)
        return 100.0 if len(calls) in (3, 5) else sum(schedule) / 10  # a stall, and the warm-up is slow too

    assert measure(seconds, [(1, 2), (4, 0)]) == {(1, 2): 0.3, (4, 0): 0.4}
    assert calls[:4] == [(1, 2), (4, 0)] * 2  # in turns
