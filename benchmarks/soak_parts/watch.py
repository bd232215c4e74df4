"""Samples of a server: memory, descriptors and threads of each process, and bytes on disk."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving_parts.processes import PROC, named

OTHERS = "others"
"""The processes that the log does not name: translators, decoders, and Python's own."""

_RESIDENT = re.compile(r"^VmRSS:\s+(\d+) kB", re.MULTILINE)
_THREADS = re.compile(r"^Threads:\s+(\d+)", re.MULTILINE)
_PARENT = re.compile(r"^PPid:\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Sample:
    """Resources of a process at one time."""

    memory_mb: float
    descriptors: int
    threads: int

    def __add__(self, other: Sample) -> Sample:
        return Sample(
            self.memory_mb + other.memory_mb, self.descriptors + other.descriptors, self.threads + other.threads
        )


@dataclass
class Watched:
    """Samples since the start.

    Attributes:
        times_s: Time of each sample, in seconds since the first.
        processes: Samples of each process by name; None if it did not run.
        disk_mb: Size of the folders.
        ids: All processes that had a name. More than one means that it was restarted.
    """

    times_s: list[float] = field(default_factory=list)
    processes: dict[str, list[Sample | None]] = field(default_factory=dict)
    disk_mb: list[float] = field(default_factory=list)
    ids: dict[str, set[int]] = field(default_factory=dict)

    def add(self, at_s: float, now: dict[str, Sample], disk_mb: float) -> None:
        """Adds a sample."""
        for name in now.keys() - self.processes.keys():
            self.processes[name] = [None] * len(self.times_s)
        self.times_s.append(at_s)
        self.disk_mb.append(disk_mb)
        for name, samples in self.processes.items():
            samples.append(now.get(name))

    @property
    def restarted(self) -> list[str]:
        """Names of processes that were started more than once."""
        return sorted(name for name, ids in self.ids.items() if len(ids) > 1)


@contextmanager
def watching(log: Path, folders: Sequence[Path], every_s: float) -> Iterator[Watched]:
    """Samples a server in a thread, now and every `every_s` seconds.

    Args:
        log: The server's log, which names its processes.
        folders: The folders that it may write to.
        every_s: Seconds from one sample to the next.
    """
    watched, over, start = Watched(), threading.Event(), time.monotonic()

    def look() -> None:
        ids = named(log.read_text(errors="replace"))
        for name, pid in ids.items():
            watched.ids.setdefault(name, set()).add(pid)
        watched.add(time.monotonic() - start, samples_of(ids), sum(map(size_mb, folders)))

    def watch() -> None:
        due = start
        while not over.wait(max(due - time.monotonic(), 0)):
            look()
            due += every_s

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        over.set()
        thread.join()
        look()


def samples_of(ids: dict[str, int]) -> dict[str, Sample]:
    """A sample of each named process, of their supervisor, and of all its other descendants together."""
    supervisors = {parent for pid in ids.values() if (parent := _parent(pid))}
    names = {pid: name for name, pid in ids.items()} | {pid: "supervisor" for pid in supervisors}
    samples: dict[str, Sample] = {}
    for pid in _family(supervisors):
        sample = sample_of(pid)
        if sample is not None:
            name = names.get(pid, OTHERS)
            samples[name] = samples[name] + sample if name in samples else sample
    return samples


def sample_of(pid: int) -> Sample | None:
    """Resources of a process now; None if it has ended."""
    try:
        status = (PROC / str(pid) / "status").read_text()
        descriptors = len(os.listdir(PROC / str(pid) / "fd"))
    except OSError:
        return None
    resident, threads = _RESIDENT.search(status), _THREADS.search(status)
    if resident is None or threads is None:  # a zombie
        return None
    return Sample(int(resident[1]) / 1024, descriptors, int(threads[1]))


def size_mb(folder: Path) -> float:
    """Disk space of a folder's files, also of files that change meanwhile."""
    taken = 0
    for where, _, files in os.walk(folder):
        for file in files:
            try:
                taken += 512 * os.lstat(os.path.join(where, file)).st_blocks
            except OSError:
                continue  # removed since it was listed
    return taken / (1 << 20)


def _family(roots: set[int]) -> set[int]:
    """Processes with all their descendants."""
    children: dict[int, set[int]] = {}
    for entry in os.listdir(PROC):
        if entry.isdigit() and (parent := _parent(int(entry))):
            children.setdefault(parent, set()).add(int(entry))
    found, new = set(roots), set(roots)
    while new:
        new = set().union(*(children.get(pid, set()) for pid in new)) - found
        found |= new
    return found


def _parent(pid: int) -> int | None:
    try:
        parent = _PARENT.search((PROC / str(pid) / "status").read_text())
    except OSError:
        return None
    return int(parent[1]) if parent else None
