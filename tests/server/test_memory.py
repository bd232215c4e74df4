"""How much memory may be used, by a made-up /proc and /sys; and that large blocks go back to the system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.memory import available_bytes

GIB = 1 << 30
V2 = "0::/"
V1 = "12:cpuset:/\n4:memory:/\n1:name=systemd:/"
UNLIMITED = 9223372036854771712
MEMINFO = f"MemTotal: {8 << 20} kB\n"


def made(root: Path, cgroup: str | None, files: dict[str, int | str], meminfo: str = MEMINFO) -> Path:
    """A root on a machine of 8 GiB whose process is in these cgroups, which have these limits."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(meminfo)
    if cgroup is not None:
        (root / "proc/self/cgroup").write_text(cgroup)
    for name, limit in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "gib"),
    [
        (None, {}, 8),
        (V2, {}, 8),
        (V2, {"memory.max": "max", "memory.high": "max"}, 8),
        (V2, {"memory.max": 3 * GIB, "memory.high": "max"}, 3),
        (V2, {"memory.max": "max", "memory.high": 2 * GIB}, 2),
        (V2, {"memory.max": 3 * GIB, "memory.high": 2 * GIB}, 2),
        (V2, {"memory.max": 16 * GIB}, 8),
        (V2, {"memory.max": ""}, 8),
        (None, {"memory.max": 2 * GIB}, 2),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": 3 * GIB}, 3),
        ("0::/a/b", {"a/b/memory.max": 2 * GIB, "a/memory.max": 3 * GIB}, 2),
        ("0::/a/b", {"memory.max": 4 * GIB}, 4),  # the host's path; what is mounted here is the container's
        ("0::/../other", {"memory.max": 4 * GIB}, 4),
        ("0::/a", {"b/memory.max": GIB}, 8),  # of a neighbour
        (V1, {"memory/memory.limit_in_bytes": 3 * GIB}, 3),
        (V1, {"memory/memory.limit_in_bytes": UNLIMITED}, 8),
        (V1, {"cpuset/memory.limit_in_bytes": GIB}, 8),
        ("4:memory,misc:/", {"memory,misc/memory.limit_in_bytes": 3 * GIB}, 3),
        ("4:memory:/docker/1f", {"memory/memory.limit_in_bytes": 2 * GIB}, 2),
        (
            "4:memory:/a/b\n0::/",
            {"memory/a/memory.limit_in_bytes": 2 * GIB, "memory/a/b/memory.limit_in_bytes": UNLIMITED},
            2,
        ),
    ],
)
def test_no_more_than_the_tightest_cgroup_allows(
    cgroup: str | None, files: dict[str, int | str], gib: int, tmp_path: Path
) -> None:
    assert available_bytes(made(tmp_path, cgroup, files)) == gib * GIB


@pytest.mark.parametrize("meminfo", ["", "MemTotal:\n", "MemTotal: many kB\n"])
def test_the_machine_is_asked_where_proc_says_nothing(
    meminfo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert available_bytes(made(tmp_path, V2, {}, meminfo)) == 4 * GIB


def test_of_this_process() -> None:
    assert 0 < available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


KEEPS = """
import threading
from server.memory import give_large_blocks_back
{give}
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
from PIL import Image
def work():
    for side in (3000, 3500, 4000):
        image, keeper = Image.new("RGBA", (side, side), "red"), bytearray(100_000)
        copy = image.copy()
        kept.append(keeper)
kept = []
threads = [threading.Thread(target=work) for _ in range(4)]
before = resident()
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(resident() - before)
"""


def test_large_blocks_go_back_to_the_system() -> None:
    kept = subprocess.run(
        [sys.executable, "-c", KEEPS.format(give="give_large_blocks_back()")],
        capture_output=True,
        check=True,
        text=True,
    )
    assert int(kept.stdout) < 40 << 20
