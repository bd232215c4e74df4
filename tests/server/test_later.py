"""What is made later: in the right order, never given up for another, handed over, and tried again after a failure."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator

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
        self.later = Later(self._make, lambda key: f"key {key}", "maker", lambda: self.now)

    def _make(self, key: str) -> str:
        self.threads.add(threading.get_ident())
        self.begun.put(key)
        if outcome := self.outcomes.get():
            raise outcome
        return f"made {key}"

    def end(self, outcome: Exception | None = None) -> str:
        """Lets the one that is being made end; gives its key."""
        key = self.begun.get()
        self.outcomes.put(outcome)
        return key

    def settled(self) -> dict[str, str]:
        """What was made, once nothing is being made or waits."""
        if (thread := self.later.thread) is not None:
            thread.join()
        return self.later.take()


@pytest.fixture
def maker() -> Iterator[Maker]:
    maker = Maker()
    yield maker
    maker.later.close()
    maker.outcomes.put(None)  # a thread that a failed test has left


def test_it_is_made_on_another_thread_and_belongs_to_the_one_that_takes_it(maker: Maker) -> None:
    maker.later.ask("a")
    assert maker.later.take() == {}
    assert maker.end() == "a"
    assert maker.settled() == {"a": "made a"} and maker.later.take() == {}
    assert threading.get_ident() not in maker.threads


def test_what_is_asked_for_meanwhile_waits_and_what_is_asked_for_most_comes_first(maker: Maker) -> None:
    for key in ("a", "b", "c", "d", "c", "a"):
        maker.later.ask(key)
    assert [maker.end() for _ in range(4)] == ["a", "c", "b", "d"]
    assert list(maker.settled()) == ["a", "c", "b", "d"]


def test_what_is_asked_for_comes_before_what_is_planned_and_nothing_is_dropped(maker: Maker) -> None:
    maker.later.plan(("p", "q", "r"))
    assert maker.begun.get() == "p"
    maker.later.ask("x")
    maker.later.ask("r")  # planned, and now asked for
    maker.later.plan(("s", "q"))
    maker.outcomes.put(None)
    assert [maker.end() for _ in range(4)] == ["x", "r", "q", "s"]
    assert set(maker.settled()) == {"p", "q", "r", "s", "x"}


def test_every_key_that_was_made_is_told_once_its_value_can_be_taken(maker: Maker) -> None:
    taken: list[dict[str, str]] = []
    maker.later.then(lambda key: taken.append(maker.later.take()))
    maker.later.plan(("a", "b"))
    assert [maker.end(), maker.end()] == ["a", "b"]
    assert maker.settled() == {} and taken == [{"a": "made a"}, {"b": "made b"}]


def test_progress_counts_what_is_done_and_all_that_waits(maker: Maker) -> None:
    assert maker.later.progress() is None
    maker.later.plan(("a", "b"))
    maker.later.ask("c")
    seen = []
    for _ in range(3):
        key = maker.begun.get()
        assert (progress := maker.later.progress()) is not None and progress.key == key
        seen.append(tuple(progress))
        maker.outcomes.put(None)
    assert seen == [("a", 0, 3), ("c", 1, 3), ("b", 2, 3)]
    maker.settled()
    assert maker.later.progress() is None
    maker.later.ask("d")
    assert maker.later.progress() == ("d", 0, 1)
    maker.end()


def test_what_is_made_and_not_yet_taken_is_not_made_again(maker: Maker) -> None:
    maker.later.ask("a")
    maker.later.ask("a")
    maker.end()
    if maker.later.thread is not None:
        maker.later.thread.join()
    maker.later.ask("a")
    maker.later.plan(("a",))
    assert maker.later.thread is None and maker.settled() == {"a": "made a"}


def test_while_too_many_wait_a_new_one_is_not_queued_and_those_that_wait_stay(
    maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    maker.later.ask("first")
    for number in range(MOST_WAITING + 3):
        maker.later.ask(str(number))
    assert [record.getMessage() for record in caplog.records] == [
        f"{MOST_WAITING} wait to be made; key {MOST_WAITING} and others must be asked for again"
    ]
    maker.later.ask("1")  # it waits already, and goes ahead of those that were asked for once
    order = [maker.end() for _ in range(MOST_WAITING + 1)]
    assert order == ["first", "1", "0", *(str(number) for number in range(2, MOST_WAITING))]
    assert len(maker.settled()) == MOST_WAITING + 1


def test_a_failure_of_what_follows_is_no_failure_to_make(maker: Maker, caplog: pytest.LogCaptureFixture) -> None:
    def fails(key: str) -> None:
        raise OSError(f"nothing follows on {key}")

    maker.later.then(fails)
    maker.later.plan(["a", "b"])
    assert [maker.end(), maker.end()] == ["a", "b"]
    assert maker.settled() == {"a": "made a", "b": "made b"}
    assert "key a is made, but what follows on it has failed" in caplog.text and "nothing follows on a" in caplog.text
    assert "making key a has failed" not in caplog.text and not maker.later._failures


def test_a_failure_is_told_and_tried_again_later_and_later(maker: Maker, caplog: pytest.LogCaptureFixture) -> None:
    waits = []
    for _ in range(9):
        maker.later.ask("a")
        maker.end(OSError("No space left on device"))
        assert maker.settled() == {}
        since = maker.now
        maker.later.ask("a")
        assert maker.later.thread is None  # not at once
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
    maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    for number in range(later._MOST_FAILURES + 5):
        maker.later.ask(str(number))
        maker.end(RuntimeError())
        maker.settled()
    assert len(maker.later._failures) == later._MOST_FAILURES
    maker.later.ask("good")
    assert maker.end() == "good" and maker.settled() == {"good": "made good"}


def test_once_closed_nothing_more_is_begun_and_nobody_waits_for_what_is_being_made(maker: Maker) -> None:
    maker.later.ask("a")
    maker.later.plan(("b",))
    assert maker.begun.get() == "a"
    thread = maker.later.thread
    assert thread is not None and thread.daemon
    maker.later.close()
    maker.later.ask("c")
    maker.later.plan(("d",))
    maker.outcomes.put(None)
    thread.join()
    assert maker.begun.empty() and maker.later.take() == {"a": "made a"}


def test_what_ends_because_it_was_closed_is_no_failure(maker: Maker, caplog: pytest.LogCaptureFixture) -> None:
    maker.later.ask("a")
    assert maker.begun.get() == "a"
    maker.later.close()
    maker.outcomes.put(RuntimeError("its translation was killed"))
    maker.settled()
    assert caplog.records == []
