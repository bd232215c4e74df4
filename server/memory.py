"""The memory that this process may use, and how it returns free memory to the system."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from server.cgroups import cgroups

_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")  # the first two are cgroup version 2's
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGE = 4 << 20


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, limited by each of its cgroups.

    Args:
        root: The folder of `proc` and `sys`.
    """
    return min([_machine(root), *_limits(root)])


def give_large_blocks_back() -> None:
    """Makes the C library return each block of 4 MiB or more to the system as soon as it is free.

    By default glibc keeps free blocks of up to 32 MiB, in one arena for each decoder thread. Large images then leave
    gigabytes behind. Smaller blocks are still kept, because photos of a usual size would pay for page faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, _LARGE)


def _machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    except (OSError, ValueError, IndexError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits(root: Path) -> Iterator[int]:
    """The memory limit of each cgroup of this process. Without a limit, version 1 yields a huge number."""
    for folder in cgroups("memory", root):
        for name in _LIMITS:
            try:
                yield int((folder / name).read_text())
            except (OSError, ValueError):  # no such file, as in the topmost cgroup, or "max"
                continue
