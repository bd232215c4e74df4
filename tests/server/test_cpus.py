"""How many CPUs may be used, by a made-up /proc and /sys; and that torch goes by it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from server.cpus import available_cpus
from server.device import torch_backend
from server.device.torch_backend import set_threads

V2 = "0::/"
V1 = "12:cpuset:/\n4:cpu,cpuacct:/\n1:name=systemd:/"


@pytest.fixture(autouse=True)
def _six_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)


def made(root: Path, cgroup: str | None, files: dict[str, str]) -> Path:
    """A root whose process is in these cgroups, which say so."""
    if cgroup is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def v1(folder: str, quota: int, period: int = 100000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("cgroup", "files", "wanted"),
    [
        (None, {}, 6),
        (V2, {}, 6),
        (V2, {"cpu.max": "max 100000\n"}, 6),
        (V2, {"cpu.max": "150000 100000\n"}, 2),
        (V2, {"cpu.max": "10000 100000\n"}, 1),
        (V2, {"cpu.max": "900000 100000\n"}, 6),
        (V2, {"cpu.max": ""}, 6),
        (V2, {"cpu.max": "100000 0\n"}, 6),
        (None, {"cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2),
        ("0::/a/b", {"cpu.max": "400000 100000\n"}, 4),  # the host's path; what is mounted here is the container's
        ("0::/../other", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/a", {"b/cpu.max": "100000 100000\n"}, 6),  # of a neighbour
        (V1, v1("cpu,cpuacct", 250000), 3),
        (V1, v1("cpu", 250000), 3),
        (V1, v1("cpu", -1), 6),
        (V1, v1("cpu", 25000, 50000), 1),
        (V1, v1("cpuset", 100000), 6),
        ("4:cpu,cpuacct:/docker/1f", v1("cpu,cpuacct", 200000), 2),
        ("4:cpu:/a/b\n0::/", v1("cpu/a", 200000) | v1("cpu/a/b", -1), 2),
    ],
)
def test_no_more_than_the_tightest_cgroup_allows(
    cgroup: str | None, files: dict[str, str], wanted: int, tmp_path: Path
) -> None:
    assert available_cpus(made(tmp_path, cgroup, files)) == wanted


def test_no_more_than_the_process_may_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5})
    assert available_cpus(made(tmp_path, V2, {"cpu.max": "400000 100000"})) == 2


@pytest.mark.parametrize(
    ("asked", "available", "own", "wanted"),
    [(0, 2, 8, 2), (0, 8, 4, 4), (0, 4, 4, 4), (3, 2, 8, 3)],
)
def test_torch_takes_no_more_threads_than_the_container_may_use_unless_told(
    asked: int, available: int, own: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = [own]
    monkeypatch.setattr(torch_backend, "available_cpus", lambda: available)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    set_threads(asked)
    assert threads[-1] == wanted
