"""The cgroups that this process is in, of both versions: where its limits of CPU time and memory are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cgroups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The folders of the cgroups that limit this process, each followed by those that it lies in.

    Inside a container the path is mostly "/". Where it is the host's, which is not mounted here, "/" is its ancestor.

    Args:
        controller: What is limited, as version 1 names it: "cpu" or "memory".
        root: Where `proc` and `sys` lie.
    """
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        place = PurePosixPath("/") if ".." in path.split("/") else PurePosixPath(path)  # ".." is outside of what we see
        for name in {controllers, controller} if controllers else {""}:
            for each in (place, *place.parents):
                yield mounted / name / each.relative_to("/")
