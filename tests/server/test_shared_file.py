"""The configuration that a server's engines share by a file: a change through any holds for all, none is lost."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import local
from server.config.files import replace_file
from server.config.local import LocalConfig
from server.dial import RSetting
from server.errors import ConflictError, UnavailableError
from server.types import Configuration
from tests.server.conftest import until

ROOT = Path(__file__).resolve().parents[2]
START: dict[str, RSetting] = {"tiny": 0, "large": (4, 2)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "config.json"


STEP = st.tuples(
    st.sampled_from(["change", "change", "read", "restart", "crash"]),
    st.integers(0, 2),  # the engine
    st.sampled_from(["tiny", "large"]),
    st.integers(0, 2),  # the new r: one digit, so that files have one length
    st.sampled_from([None, 0, -1]),  # the version that is expected, from the present one
)


@given(st.lists(STEP, max_size=30))
def test_engines_that_share_a_file_are_one(steps: list[tuple[str, int, str, int, int | None]]) -> None:
    """Whatever three engines do in whatever order, each knows what all have done."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        engines = [LocalConfig(START, file) for _ in range(3)]
        now = Configuration(1, START)
        for what, index, name, r, expected in steps:
            if what == "restart":
                engines[index] = LocalConfig(START, file)
            elif what == "crash":  # in the middle of a write
                file.with_suffix(f".{index}.new").write_text('{"version": 9, "mod')
            elif what == "change":
                version = None if expected is None else now.version + expected
                change = engines[index].change({name: r}, version)
                if expected == -1:
                    with pytest.raises(ConflictError):
                        asyncio.run(change)
                else:
                    now = Configuration(now.version + 1, {**now.models, name: r})
                    assert asyncio.run(change) == now
            assert engines[index].configuration == now
        assert [engine.configuration for engine in engines] == [now] * 3


def test_a_file_is_seen_to_change_within_one_tick_of_the_clock(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_800_000_000_000_000_000)
    times = []
    for number in range(5):
        replace_file(file, str(number))
        times.append(file.stat().st_mtime_ns)
    assert times == sorted(set(times))


def run_two(program: str, file: Path) -> Iterator[None]:
    """Runs a program twice at the same time, as `python -c PROGRAM FILE 1` and `2`; yields while they run."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(file), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        for number in (1, 2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    while any(process.poll() is None for process in processes):
        yield
    for process in processes:
        process.communicate()
        assert process.returncode == 0


CHANGER = """
import asyncio, sys
from pathlib import Path
from server.config.local import LocalConfig

async def main():
    store = LocalConfig({"tiny": 0}, Path(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(40):
        await store.change({"tiny": int(sys.argv[2])})

asyncio.run(main())
"""


def test_no_change_of_several_processes_is_lost(file: Path) -> None:
    reader = LocalConfig({"tiny": 0}, file)
    versions = [reader.configuration.version for _ in run_two(CHANGER, file)]
    assert reader.configuration.version == 1 + 2 * 40
    assert versions == sorted(versions)


REPLACER = """
import sys
from pathlib import Path
from server.config.files import replace_file

print("ready", flush=True)
sys.stdin.readline()
for _ in range(100):
    replace_file(Path(sys.argv[1]), sys.argv[2] * 10_000)
"""


def test_processes_that_replace_a_file_without_a_lock_each_leave_a_whole_one(file: Path) -> None:
    replace_file(file, "0" * 10_000)
    assert {file.read_text() for _ in run_two(REPLACER, file)} <= {number * 10_000 for number in "012"}
    assert list(file.parent.iterdir()) == [file]


HOLDER = """
import fcntl, sys, time
lock = open(sys.argv[1], "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(1000)
"""


async def test_a_process_that_dies_with_the_lock_holds_nobody_up(file: Path) -> None:
    store, other = LocalConfig(START, file), LocalConfig(START, file)
    before = await store.change({"tiny": 1})
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file.with_suffix(".lock"))], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    changing = asyncio.create_task(store.change({"tiny": 2}))
    for _ in range(20):
        await asyncio.sleep(0)  # the loop turns, and what holds can be read
        assert other.configuration == before
    assert not changing.done()
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    assert (await changing).models["tiny"] == other.configuration.models["tiny"] == 2


async def test_a_lock_that_does_not_come_free_is_unavailable_and_changes_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LOCK_TIMEOUT_S", 0.01)
    store = LocalConfig(START, file)
    before = await store.change({"tiny": 1})
    with file.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="another engine"):
            await store.change({"tiny": 2})
    assert store.configuration == before
    assert (await store.change({"tiny": 2})).version == before.version + 1


@pytest.mark.parametrize("changed_meanwhile", [False, True])
async def test_of_engines_that_start_at_once_one_forgets_what_is_outdated(
    changed_meanwhile: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the first of them serves, and is told another r, before the last has its turn."""
    await LocalConfig(START, file).change({"tiny": 8, "large": 1})
    start, waiting = START | {"tiny": 5}, list[object]()

    def flock(lock: IO[str], operation: int) -> None:
        waiting.append(lock)
        fcntl.flock(lock, operation)

    with monkeypatch.context() as patch, file.with_suffix(".lock").open("a") as lock:
        patch.setattr(local, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB))
        fcntl.flock(lock, fcntl.LOCK_EX)
        starting = [asyncio.create_task(asyncio.to_thread(LocalConfig, start, file)) for _ in range(4)]
        await until(lambda: len(waiting) == 4)  # all have seen it
        if changed_meanwhile:
            large = {"r": 1, "start": [4, 2]}
            replace_file(file, json.dumps({"version": 4, "models": {"tiny": {"r": 7, "start": 5}, "large": large}}))
        fcntl.flock(lock, fcntl.LOCK_UN)
        engines = await asyncio.gather(*starting)
    known = (
        Configuration(4, {"tiny": 7, "large": 1}) if changed_meanwhile else Configuration(3, {"tiny": 5, "large": 1})
    )
    assert [engine.configuration for engine in engines] == [known] * 4
    known = await engines[0].change({"tiny": 6})
    assert LocalConfig(start, file).configuration == engines[3].configuration == known
