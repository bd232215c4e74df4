"""A log that counts what repeats."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.repeats import _MOST_COUNTED, WINDOW_S, CountingHandler

ROOT = Path(__file__).resolve().parents[2]


class Log:
    """A logger of its own on a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stream = io.StringIO()
        self.handler = CountingHandler(self.stream, lambda: self.now)
        self.logger = logging.Logger("test")
        self.logger.addHandler(self.handler)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


def test_a_line_is_written_once_and_its_repetitions_are_counted() -> None:
    log = Log()
    for _ in range(10_000):
        log.logger.warning("a client was hung up on: %s", "bad")
    log.logger.warning("a client was hung up on: %s", "worse")
    assert log.lines == ["a client was hung up on: bad", "a client was hung up on: worse"]
    log.now = WINDOW_S
    log.logger.warning("a client was hung up on: %s", "bad")
    assert log.lines[2:] == [
        "a client was hung up on: bad (9999 times more within 60 s)",
        "a client was hung up on: bad",
    ]


def test_counts_are_written_at_the_end_of_a_process() -> None:
    program = (
        "import logging; from server.lifetime import configure_logging; configure_logging('info')\n"
        "for _ in range(2): logging.error('again')"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert [line.partition(": ")[2] for line in ended.stderr.splitlines()] == [
        "again",
        "again (once more within 60 s)",
    ]


def fail(kind: type[Exception]) -> None:
    raise kind("a message of its own")


def fail_elsewhere(kind: type[Exception]) -> None:
    raise kind("a message of its own")


@pytest.mark.parametrize(
    "kind, place, tracebacks", [(ValueError, fail, 1), (KeyError, fail, 2), (ValueError, fail_elsewhere, 2)]
)
def test_tracebacks_are_the_same_that_end_at_the_same_place(
    kind: type[Exception], place: Callable[[type[Exception]], None], tracebacks: int
) -> None:
    log = Log()
    for index, (raised, there) in enumerate([(ValueError, fail), (kind, place)]):
        try:
            there(raised)
        except Exception:
            log.logger.exception("request %d failed", index)
    assert log.stream.getvalue().count("Traceback") == tracebacks


def test_lines_that_are_all_different_are_all_written_and_do_not_fill_memory() -> None:
    log = Log()
    for index in range(3 * _MOST_COUNTED):
        log.logger.info("line %d", index)
    assert len(log.lines) == 3 * _MOST_COUNTED
    assert len(log.handler._lines) <= _MOST_COUNTED
