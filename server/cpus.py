"""The number of CPUs that this process may use, and the name of the processor."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from server.cgroups import cgroups


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: those it may run on, limited by its cgroups' CPU time.

    Args:
        root: The folder of `proc` and `sys`.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *(math.ceil(share) for share in _shares(root))]))


def _shares(root: Path) -> Iterator[float]:
    """The CPU limit of each cgroup of this process, in CPUs. Cgroups without a limit yield nothing."""
    for folder in cgroups("cpu", root):
        try:
            if (of_version_2 := folder / "cpu.max").exists():
                quota, period = of_version_2.read_text().split()
            else:
                quota, period = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
            if quota != "max" and int(quota) > 0:  # -1 means no limit
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such file, as in the topmost cgroup, or no permission
            continue


def cpu_name() -> str:
    """The processor as its maker calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
