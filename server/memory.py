"""How much memory this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")  # the first two are cgroup version 2's


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, and no more than each of its cgroups allows.

    Args:
        root: Where `proc` and `sys` lie.
    """
    return min([_machine(root), *_limits(root)])


def _machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    except (OSError, ValueError, IndexError, StopIteration):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits(root: Path) -> Iterator[int]:
    """The limit of each cgroup over this process. Version 1 writes a huge number where there is none."""
    for folder in _cgroups(root):
        for name in _LIMITS:
            try:
                yield int((folder / name).read_text())
            except (OSError, ValueError):  # no such file, as in the topmost cgroup, or "max"
                continue


def _cgroups(root: Path) -> Iterator[Path]:
    """The folders of the memory cgroups that this process is in, of both versions, each with all that it lies in.

    Inside a container the path is mostly "/". Where it is the host's, which is not mounted here, "/" is its ancestor.
    """
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        place = PurePosixPath("/") if ".." in path.split("/") else PurePosixPath(path)  # ".." is outside of what we see
        for name in {controllers, "memory"} if controllers else {""}:
            for each in (place, *place.parents):
                yield mounted / name / each.relative_to("/")
