"""A server's processes on Linux: their ids, CPU time and connections."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
ESTABLISHED = "01"
PROC = Path("/proc")
_STARTED = re.compile(r"\b((?:engine|http)(?:-\d+)?) is process (\d+)")


def named(log: str) -> dict[str, int]:
    """The processes in a server's log, "engine", "engine-0", "http-0" and so on, and their ids.

    For one that was restarted it is the last id.
    """
    return {name: int(pid) for name, pid in _STARTED.findall(log)}


def cpu_s(pid: int, main_thread: bool = False) -> float:
    """Seconds of CPU that a process, or only its main thread, has used; raises OSError if it has ended.

    A thread's time is the scheduler's own, in nanoseconds, if the kernel provides it.
    """
    if not main_thread:
        return cpu_of_stat((PROC / str(pid) / "stat").read_text())
    task = PROC / str(pid) / "task" / str(pid)
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:
        return cpu_of_stat((task / "stat").read_text())


def cpu_of_stat(stat: str) -> float:
    """Seconds of CPU, user and system, from a stat file. The name in it may contain spaces and brackets."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def connections(port: int, processes: Mapping[str, int]) -> dict[str, int]:
    """Number of clients that each process is connected with through a port."""
    inodes: set[str] = set()
    for name in ("tcp", "tcp6"):
        try:
            inodes |= established(port, (PROC / "net" / name).read_text().splitlines()[1:])
        except FileNotFoundError:
            pass  # no IPv6 here
    return {name: len(inodes & _sockets(pid)) for name, pid in processes.items()}


def established(port: int, lines: Iterable[str]) -> set[str]:
    """The inodes of connected sockets with this local port, from lines of /proc/net/tcp."""
    fields = (line.split() for line in lines)
    return {each[9] for each in fields if each[3] == ESTABLISHED and int(each[1].rpartition(":")[2], 16) == port}


def _sockets(pid: int) -> set[str]:
    found: set[str] = set()
    for descriptor in (PROC / str(pid) / "fd").iterdir():
        try:
            kind, _, inode = os.readlink(descriptor).partition(":[")
        except OSError:
            continue  # closed meanwhile
        if kind == "socket":
            found.add(inode.rstrip("]"))
    return found
