"""What is made later: handed over and never put in place, queued and never forgotten, tried again and never at once."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from server.device import later
from server.device.later import LONGEST_RETRY_S, MOST_WAITING, RETRY_S, Later


class Maker:
    """Makes keys when it is told to, and says what it makes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.begun = queue.SimpleQueue[str]()
        self.outcomes = queue.SimpleQueue[Exception | None]()
        self.threads: set[int] = set()
        self.later = Later(self._make, lambda key: f"key {key}", "maker", clock=lambda: self.now)

    def _make(self, key: str) -> str:
        self.threads.add(threading.get_ident())
        self.begun.put(key)
        if outcome := self.outcomes.get(timeout=30):
            raise outcome
        return f"made {key}"

    def end(self, outcome: Exception | None = None) -> str:
        """Lets the one that is being made end; gives its key."""
        key = self.begun.get(timeout=30)
        self.outcomes.put(outcome)
        return key

    def settled(self) -> dict[str, str]:
        """What was made, once nothing is being made or waits."""
        while self.later._making is not None:
            self.later._thread.submit(lambda: None).result(timeout=30)
        return self.later.take()


@pytest.fixture
def maker() -> Maker:
    return Maker()


def test_it_is_made_on_another_thread_and_is_of_whoever_takes_it(maker: Maker) -> None:
    maker.later.ask("a")
    assert maker.later.take() == {}
    assert maker.end() == "a"
    assert maker.settled() == {"a": "made a"} and maker.later.take() == {}
    assert threading.get_ident() not in maker.threads


def test_what_is_asked_for_meanwhile_waits_and_the_latest_comes_first(maker: Maker) -> None:
    for key in ("a", "b", "c", "d", "b", "a"):
        maker.later.ask(key)
    assert [maker.end() for _ in range(4)] == ["a", "b", "d", "c"]
    assert list(maker.settled()) == ["a", "b", "d", "c"]


def test_what_is_made_and_not_yet_taken_is_not_made_again(maker: Maker) -> None:
    maker.later.ask("a")
    maker.later.ask("a")
    maker.end()
    while maker.later._making is not None:
        maker.later._thread.submit(lambda: None).result(timeout=30)
    maker.later.ask("a")
    assert maker.later._making is None and maker.settled() == {"a": "made a"}


def test_of_too_many_the_ones_asked_for_longest_ago_are_given_up_and_that_is_told_once(
    maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    maker.later.ask("first")
    for number in range(MOST_WAITING + 3):
        maker.later.ask(str(number))
    assert [record.getMessage() for record in caplog.records] == [
        f"more than {MOST_WAITING} wait to be made, so key 0 and others do no more until they are asked for again"
    ]
    maker.later.ask("1")  # again: it is the latest, and 3 makes room
    order = [maker.end() for _ in range(MOST_WAITING + 1)]
    assert order == ["first", "1", *(str(number) for number in reversed(range(4, MOST_WAITING + 3)))]
    assert len(maker.settled()) == MOST_WAITING + 1


def test_a_failure_is_told_and_tried_again_later_and_later(maker: Maker, caplog: pytest.LogCaptureFixture) -> None:
    waits = []
    for _ in range(9):
        maker.later.ask("a")
        maker.end(OSError("No space left on device"))
        assert maker.settled() == {}
        since = maker.now
        maker.later.ask("a")
        assert maker.later._making is None  # not at once
        waits.append(maker.later._failures["a"][1] - since)
        maker.now += waits[-1]
    assert waits == [min(RETRY_S * 2**number, LONGEST_RETRY_S) for number in range(9)]
    assert "making key a has failed; it is not tried again for 60 s" in caplog.text
    assert "No space left on device" in caplog.text
    maker.later.ask("a")
    maker.end()
    assert maker.settled() == {"a": "made a"}
    maker.later.ask("a")  # its failures are forgotten
    maker.end(OSError())
    assert maker.settled() == {} and maker.later._failures["a"] == (1, maker.now + RETRY_S)


def test_a_failure_holds_nothing_else_up_and_failures_are_bounded(
    maker: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    for number in range(later._MOST_FAILURES + 5):
        maker.later.ask(str(number))
        maker.end(RuntimeError())
        maker.settled()
    assert len(maker.later._failures) == later._MOST_FAILURES
    maker.later.ask("good")
    assert maker.end() == "good" and maker.settled() == {"good": "made good"}


def test_nothing_is_begun_in_a_process_that_ends(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    submit: Callable[..., Any] = maker.later._thread.submit
    maker.later.ask("a")
    maker.later.ask("b")

    def refuse(*args: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(maker.later._thread, "submit", refuse)
    maker.end()
    submit(lambda: None).result(timeout=30)
    assert maker.later.take() == {"a": "made a"} and maker.begun.empty()
