"""`tome-server run` as a process: a stop keeps what is done, whoever asks for it, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.model_folders import noise_photos, random_vit

pytestmark = pytest.mark.slow

BATCH, PHOTOS = 4, 60

# Tells each batch, and after the third waits for a word of the test: so the signal comes in the middle.
PROGRAM = f"""
import signal, sys, time
from server.cli import main
from server.commands import progress, run

class Waits(run.Progress):
    def add(self, images, errors):
        ours = signal.getsignal(signal.SIGINT)
        super().add(images, errors)  # the test sees this line, and sends its signal
        if self.images == 3 * {BATCH} and sys.stdin.readline() == "stop\\n":
            while signal.getsignal(signal.SIGINT) is ours:  # another thread may have the signal first
                time.sleep(0.01)

if __name__ == "__main__":
    progress.BETWEEN_S = 0
    run.Progress = Waits
    sys.exit(main())
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    folder, photos = random_vit(tmp_path / "model"), noise_photos(tmp_path / "photos", PHOTOS)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    flags = ["--model", f"local-dir:{folder}", "--backend", "torch", "--threads", "1", "--state-dir", "none"]
    flags += ["--max-batch-size", str(BATCH), "--r", "4", "-o", str(tmp_path / "out.jsonl")]
    return [sys.executable, str(program), "run", str(photos), *flags]


def started(command: list[str]) -> subprocess.Popen[str]:
    """The process, after its third batch."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if f"{3 * BATCH} of {PHOTOS} images" in line:
            return process
    raise AssertionError(f"it ended with status {process.wait()}")


def ended(process: subprocess.Popen[str], word: str | None = "\n") -> tuple[int, dict[str, Any], str]:
    """Its status, the last line of its answer, and what else it told."""
    answer, told = process.communicate(word)
    assert "Traceback" not in told, told
    return process.returncode, json.loads(answer.splitlines()[-1]) if answer else {}, told


def children(parent: int, program: bytes) -> list[int]:
    """Processes that a process has started, by a word of their command lines."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [pid for pid in map(int, found) if program in Path(f"/proc/{pid}/cmdline").read_bytes()]


def whole(command: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs it to its end: the last line of its answer, and the rows."""
    done = subprocess.run(command, input="\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output = Path(command[-1])
    assert not output.with_name("out.jsonl.unfinished").exists()
    return json.loads(done.stdout.splitlines()[-1]), [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize(
    ("number", "devices", "decode"),
    [(signal.SIGINT, "cpu,cpu", "cpu"), (signal.SIGINT, "cpu,cpu", "device"), (signal.SIGTERM, "cpu", "device")],
)
def test_a_stop_keeps_what_is_done_and_the_same_command_goes_on(
    number: signal.Signals, devices: str, decode: str, command: list[str]
) -> None:
    command = [*command[:-2], "--device", devices, "--decode", decode, *command[-2:]]
    process = started(command)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # as a terminal does
    status, said, told = ended(process, "stop\n")
    assert status == 128 + number and "stopping after this batch" in told and "goes on from here" in told
    assert (said["complete"], said["images"]) == (False, 3 * BATCH)
    assert not Path(command[-1]).exists()

    said, rows = whole(command)
    assert (said["complete"], said["images"], said["earlier"]) == (True, PHOTOS - 3 * BATCH, 3 * BATCH)
    names = [row["file"] for row in rows]
    assert names == sorted(names) and len(set(names)) == PHOTOS
    assert all(row["error"] is None for row in rows)


def test_what_was_written_outlives_a_kill(command: list[str], tmp_path: Path) -> None:
    eager = tmp_path / "program.py"
    eager.write_text(
        PROGRAM.replace("progress.BETWEEN_S = 0", "progress.BETWEEN_S = unfinished.PART_S = 0").replace(
            "import progress, run", "import progress, run\nfrom server.offline import unfinished"
        )
    )
    process = started(command)
    process.kill()
    process.communicate()
    part = sorted((tmp_path / "out.jsonl.unfinished").glob("0*.jsonl"))[-1]
    part.with_name(f"{part.name}.new").write_text('{"file": "half of')
    said, rows = whole(command)
    assert said["earlier"] == 3 * BATCH and len(rows) == PHOTOS


def test_a_device_whose_process_dies_ends_the_run_and_keeps_the_rows(command: list[str], tmp_path: Path) -> None:
    command = [*command[:-2], "--device", "cpu,cpu", *command[-2:]]
    process = started(command)
    computing = children(process.pid, b"spawn_main")
    assert len(computing) == 2
    for pid in computing:
        os.kill(pid, signal.SIGKILL)
    status, said, told = ended(process)
    assert status == 1 and "the process of cpu has ended with status -9" in told
    said, rows = whole(command)
    assert said["earlier"] >= 3 * BATCH and len(rows) == PHOTOS


def test_a_process_that_reads_and_dies_ends_the_run_and_keeps_the_rows(command: list[str]) -> None:
    command = [*command[:-2], "--decode", "device", *command[-2:]]
    process = started(command)
    readers = children(process.pid, b"server.offline.reader")
    assert readers
    for pid in readers:
        os.kill(pid, signal.SIGKILL)
    status, said, told = ended(process)
    assert status == 1 and "a process that reads files has ended with status -9" in told
    said, rows = whole(command)
    assert said["earlier"] >= 3 * BATCH and len(rows) == PHOTOS
