"""How many CPUs this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: those it may run on, and no more than its cgroups' share of time.

    Args:
        root: Where `proc` and `sys` lie.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *(math.ceil(share) for share in _shares(root))]))


def _shares(root: Path) -> Iterator[float]:
    """CPUs' worth of time that each cgroup over this process allows; nothing where there is none or no limit."""
    for folder in _cgroups(root):
        try:
            if (of_version_2 := folder / "cpu.max").exists():
                quota, period = of_version_2.read_text().split()
            else:
                quota, period = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
            if quota != "max" and int(quota) > 0:  # -1 is no limit
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such file, as in the topmost cgroup, or not for us
            continue


def _cgroups(root: Path) -> Iterator[Path]:
    """The folders of the cgroups that this process is in, of both versions, each with all that it lies in.

    Inside a container the path is mostly "/". Where it is the host's, which is not mounted here, "/" is its ancestor.
    """
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        place = PurePosixPath("/") if ".." in path.split("/") else PurePosixPath(path)  # ".." is outside of what we see
        for name in {controllers, "cpu"} if controllers else {""}:
            for each in (place, *place.parents):
                yield mounted / name / each.relative_to("/")
