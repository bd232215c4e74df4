"""Reader processes: the images of a `Reader` in the order that was asked, and an error in words when one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image as PillowImage

from server.errors import EngineError, UnavailableError
from server.images.image import Image, JpegFile, Pixels
from server.images.preprocessing import Preprocessing
from server.offline import reader_processes
from server.offline.reader_processes import FILES_OF_A_PROCESS, ReaderProcesses
from server.offline.reading import Reader
from tests.server.conftest import encode

HALF = (0.5, 0.5, 0.5)
PREPROCESSING = Preprocessing((32, 32), (32, 32), "center", "bilinear", HALF, HALF)
MAX_PIXELS = 1_000_000


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two messages and a half: JPEG files, small and large, and what else a folder may hold."""
    count = 5 * FILES_OF_A_PROCESS // 2
    files = [tmp_path / f"{index}.jpg" for index in range(count)]
    for index, file in enumerate(files):
        file.write_bytes(encode(PillowImage.new("RGB", (40 + index, 30), (index, 0, 0)), "JPEG"))
    noise = PillowImage.frombytes("RGB", (400, 400), os.urandom(3 * 400 * 400))
    files[3].write_bytes(encode(noise, "JPEG"))
    for index in (4, 6, 20):
        noise = PillowImage.frombytes("RGB", (900, 900 + index), os.urandom(3 * 900 * (900 + index)))
        files[index].write_bytes(encode(noise, "JPEG"))
    files[5].write_bytes(encode(noise, "PNG"))
    files[7].write_bytes(files[8].read_bytes()[:200])
    files[9].write_bytes(encode(PillowImage.new("L", (1001, 1000)), "PNG"))
    files[11].unlink()
    files[13].unlink()
    os.mkfifo(files[13])
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.jpg"))
    files[15] = files[15].rename(odd)
    return [*map(str, files), "", "x" * 300]


@pytest.fixture
def processes() -> Iterator[ReaderProcesses]:
    with closing(ReaderProcesses(PREPROCESSING, MAX_PIXELS, 2)) as processes:
        yield processes


def pids() -> list[int]:
    """Of the reader processes of this process, once they have read something."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in map(int, children) if b"server.offline.reader" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def read(processes: ReaderProcesses, files: list[str]) -> list[Image | str]:
    return [image for part in processes.read(files) for image in part.result()]


def test_they_give_what_a_reader_gives_in_the_order_of_the_files(processes: ReaderProcesses, files: list[str]) -> None:
    with closing(Reader(PREPROCESSING, True, MAX_PIXELS)) as reader:
        wanted = [reader.read(file) for file in files]
    assert isinstance(wanted[5], Pixels)
    lengths = [len(image.data) for image in wanted if isinstance(image, JpegFile)]
    assert sum(length > 1 << 18 for length in lengths) == 3 and sum(length > 1 << 16 for length in lengths) == 4
    assert [index for index, image in enumerate(wanted) if isinstance(image, str)] == [
        *(7, 9, 11, 13),
        *(len(files) - 2, len(files) - 1),
    ]
    begun = [processes.read(files), processes.read(files[::-1]), processes.read(files[:1])]
    got = [[image for part in parts for image in part.result()] for parts in begun]
    assert got == [wanted, wanted[::-1], wanted[:1]]


def test_all_of_them_read(processes: ReaderProcesses, files: list[str]) -> None:
    read(processes, files[:1] * 2 * FILES_OF_A_PROCESS)
    stopped, _ = pids()
    os.kill(stopped, signal.SIGSTOP)
    first, second, _ = processes.read(files[:2] * FILES_OF_A_PROCESS + files[:1])
    assert not first.done() and not second.done(), "answers come in the order of the files"
    os.kill(stopped, signal.SIGCONT)
    assert first.result() == second.result()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_they_leave_signals_to_the_command(
    number: signal.Signals, processes: ReaderProcesses, files: list[str]
) -> None:
    wanted = read(processes, files)
    for pid in pids():
        assert os.getpgid(pid) != os.getpgrp()
        os.kill(pid, number)
    assert read(processes, files) == wanted


def test_one_that_is_killed_is_an_error_in_a_sentence(processes: ReaderProcesses, files: list[str]) -> None:
    wanted = read(processes, files[: 2 * FILES_OF_A_PROCESS])
    killed, _ = pids()
    os.kill(killed, signal.SIGKILL)
    first, second, third = processes.read(files)
    with pytest.raises(EngineError, match="a process that reads files has ended with status -9"):
        first.result()
    assert second.result() == wanted[FILES_OF_A_PROCESS:]
    assert isinstance(third.exception(), EngineError)


def test_one_that_does_not_start_is_an_error_in_a_sentence(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_processes, "_PROGRAM", "raise SystemExit(3)")
    with closing(ReaderProcesses(PREPROCESSING, MAX_PIXELS, 1)) as processes:
        with pytest.raises(EngineError, match="status 3"):
            read(processes, files)


def test_one_that_ends_within_a_file_is_an_error_in_a_sentence(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import sys
from msgspec import msgpack
from server.offline import reader

def answer(connection, *asked):
    reader.send(connection, msgpack.encode(reader.Read([reader.Following(9, 1, 1)])))
    connection.sendall(b"half")
    sys.exit(5)

reader._answer = answer
reader.main()
"""
    monkeypatch.setattr(reader_processes, "_PROGRAM", program)
    with closing(ReaderProcesses(PREPROCESSING, MAX_PIXELS, 1)) as processes:
        with pytest.raises(EngineError, match="status 5"):
            read(processes, files[:1])


def test_no_program_to_start_is_an_error_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EngineError, match="cannot be started: No such file"):
        ReaderProcesses(PREPROCESSING, MAX_PIXELS, 1)


def test_an_error_that_is_not_of_a_file_crosses(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
from server.errors import UnavailableError
from server.offline import reader

def read(self, file):
    raise UnavailableError("no decoder", retry_after_s=1)

reader.Reader.read = read
reader.main()
"""
    monkeypatch.setattr(reader_processes, "_PROGRAM", program)
    with closing(ReaderProcesses(PREPROCESSING, MAX_PIXELS, 1)) as processes:
        with pytest.raises(UnavailableError, match="no decoder"):
            read(processes, files)


def test_closing_ends_them_whatever_they_do(files: list[str]) -> None:
    processes = ReaderProcesses(PREPROCESSING, MAX_PIXELS, 2)
    read(processes, files)
    started = pids()
    os.kill(started[0], signal.SIGSTOP)
    under_way = processes.read(files)
    processes.close()
    assert len(started) == 2 and not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert all(part.done() for part in under_way)


def test_they_end_with_the_process_that_asks(files: list[str]) -> None:
    program = f"""
import sys
from server.images.preprocessing import Preprocessing
from server.offline.reader_processes import ReaderProcesses
processes = ReaderProcesses({PREPROCESSING!r}, {MAX_PIXELS}, 2)
for part in processes.read([sys.argv[1]] * {2 * FILES_OF_A_PROCESS}):
    part.result()
print("read", flush=True)
sys.stdin.read()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program, files[0]], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == b"read\n"
        process.kill()
        assert process.communicate()[1] == b"", "standard error closes when the readers have ended too"
