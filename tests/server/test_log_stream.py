"""A log whose reader is slow, stands still, or is gone."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.log_stream import _PIECE, MOST_WAITING, LogStream, _pieces

ROOT = Path(__file__).resolve().parents[2]


class Pipe:
    """A pipe with a log on one end."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.stream = LogStream(self.write_end)

    def fill(self) -> int:
        """Writes lines until some wait; gives how many it wrote."""
        lines = 0
        while not self.stream._waiting:
            self.stream.write(f"line {lines}\n")
            lines += 1
        return lines

    def read_lines(self, count: int) -> list[bytes]:
        """The next lines; waits for them."""
        data = b""
        while data.count(b"\n") < count:
            data += os.read(self.read_end, 1 << 16)
        return data.splitlines()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe that nobody reads yet."""
    pipe = Pipe()
    yield pipe
    os.close(pipe.read_end)  # whatever waits is dropped
    if pipe.stream._thread is not None:
        pipe.stream._thread.join()
    os.close(pipe.write_end)


def test_a_line_leaves_at_once(pipe: Pipe) -> None:
    pipe.stream.write("one line\n")
    assert not pipe.stream._waiting
    assert os.read(pipe.read_end, 100) == b"one line\n"


def test_a_reader_that_stands_still_blocks_nobody_and_gets_all_lines_in_order(pipe: Pipe) -> None:
    count = pipe.fill()
    for more in range(count, count + 100):
        pipe.stream.write(f"line {more}\n")
    assert pipe.read_lines(count + 100) == [f"line {index}".encode() for index in range(count + 100)]
    thread = pipe.stream._thread
    if thread is not None:
        thread.join()
    pipe.stream.write("at once again\n")
    assert not pipe.stream._waiting and os.read(pipe.read_end, 100) == b"at once again\n"


def test_what_is_too_much_is_lost_and_counted(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    count = pipe.fill()
    line = "x" * 999 + "\n"
    kept = (MOST_WAITING - pipe.stream._num_waiting) // len(line)
    for _ in range(kept + 7):
        pipe.stream.write(line)
    thread = pipe.stream._thread
    assert thread is not None
    assert len(pipe.read_lines(count + kept)) == count + kept
    thread.join()
    assert caplog.messages == ["7 lines of the log are lost: its reader was too slow"]


def test_a_reader_that_is_gone_costs_lines_alone() -> None:
    read_end, write_end = os.pipe()
    stream = LogStream(write_end)
    os.close(read_end)
    stream.write("nobody reads this\n")
    os.close(write_end)
    stream.write("nor this\n")
    assert not stream._waiting and stream._thread is None


def test_lines_of_several_threads_are_whole(pipe: Pipe) -> None:
    def write(name: int) -> None:
        for _ in range(500):
            pipe.stream.write(f"{name}" * 50 + "\n")

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    lines = pipe.read_lines(2000)
    for thread in threads:
        thread.join()
    assert len(lines) == 2000 and {len(set(line)) for line in lines} == {1}


@pytest.mark.parametrize("size", [0, 1, _PIECE - 1, _PIECE, _PIECE + 1, 3 * _PIECE + 7])
def test_pieces_are_what_a_pipe_takes_whole(size: int) -> None:
    for data in (b"x" * size, (b"a line\n" * size)[:size]):
        pieces = list(_pieces(data))
        assert b"".join(pieces) == data and all(len(piece) <= _PIECE for piece in pieces)
        if b"\n" in data:
            assert all(piece.endswith(b"\n") for piece in pieces[:-1])


CLOSED = "import os; os.close(2)\n"
LOGS = (
    "import logging; from server.lifetime import configure_logging; configure_logging('info')\n"
    "for index in range(20000): logging.getLogger().error('line %d', index)\n"
    "print('done')"
)


@pytest.mark.parametrize("program", [LOGS, "import sys; sys.stderr = sys.__stderr__ = None\n" + LOGS, CLOSED + LOGS])
def test_a_process_ends_whether_or_not_somebody_reads_its_log(program: str) -> None:
    read_end, write_end = os.pipe()
    command = [sys.executable, "-c", program]
    try:  # nobody reads what it writes there
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=write_end, text=True)
    finally:
        os.close(write_end)
        os.close(read_end)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_the_stream_is_the_log_of_a_process() -> None:
    from server.lifetime import configure_logging

    stream = configure_logging("info", "text")
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler) and handler.stream is stream
