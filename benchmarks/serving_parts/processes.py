"""What Linux says of a server's processes: who they are, CPU time, connections."""

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
    """The processes that the log of a server tells of: "engine", "engine-0", "http-0" and so on, and their ids.

    Of one that was started again it is the last.
    """
    return {name: int(pid) for name, pid in _STARTED.findall(log)}


def cpu_s(pid: int, main_thread: bool = False) -> float:
    """Seconds of CPU that a process, or its main thread alone, has used; raises OSError where it has ended.

    Of a thread the scheduler's own count is taken, in nanoseconds, where the kernel tells it.
    """
    if not main_thread:
        return cpu_of_stat((PROC / str(pid) / "stat").read_text())
    task = PROC / str(pid) / "task" / str(pid)
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:
        return cpu_of_stat((task / "stat").read_text())


def cpu_of_stat(stat: str) -> float:
    """Seconds of CPU, of the user and of the system, by a stat file. The name in it may hold spaces and brackets."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def connections(port: int, processes: Mapping[str, int]) -> dict[str, int]:
    """How many clients each process is connected with, which came to a port."""
    inodes: set[str] = set()
    for name in ("tcp", "tcp6"):
        try:
            inodes |= established(port, (PROC / "net" / name).read_text().splitlines()[1:])
        except FileNotFoundError:
            pass  # no IPv6 here
    return {name: len(inodes & _sockets(pid)) for name, pid in processes.items()}


def established(port: int, lines: Iterable[str]) -> set[str]:
    """The inodes of sockets that are connected and whose own port it is, by lines of /proc/net/tcp."""
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
