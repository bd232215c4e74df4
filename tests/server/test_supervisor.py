"""Which process is taken for one that hangs. That it is then replaced, tests/e2e/test_faults.py shows."""

from __future__ import annotations

from typing import Any

import pytest

from server.supervisor import _SILENCE_S, Child


class Process:
    """Notes whether it was killed."""

    pid = 1

    def __init__(self) -> None:
        self.killed = 0

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def child() -> Child:
    child = Child("engine", print)
    process: Any = Process()
    child.process = process
    return child


def beat(child: Child) -> None:
    child._pulse._count[0] += 1


def killed(child: Child) -> int:
    process: Any = child.process
    assert isinstance(process, Process)
    return process.killed


def test_who_has_beaten_and_stands_still_is_killed_once(child: Child) -> None:
    beat(child)
    child.watch(0.2)
    for _ in range(int(_SILENCE_S / 0.5)):
        child.watch(0.5)
    assert killed(child) == 0
    child.watch(0.5)
    assert killed(child) == 1
    child.watch(0.5)  # it takes a moment to die
    assert killed(child) == 1


def test_who_beats_now_and_then_lives(child: Child) -> None:
    for _ in range(10):
        beat(child)
        for _ in range(int(_SILENCE_S)):
            child.watch(1.0)
    assert killed(child) == 0


def test_who_has_never_beaten_is_loading_and_lives(child: Child) -> None:
    for _ in range(1000):
        child.watch(1.0)
    assert killed(child) == 0


def test_a_pause_of_the_whole_service_counts_against_nobody(child: Child) -> None:
    beat(child)
    child.watch(0.2)
    for _ in range(5):
        child.watch(3600.0)
    beat(child)
    child.watch(0.2)
    assert killed(child) == 0
