"""The cgroups of this process, of versions 1 and 2: they hold its limits of CPU time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cgroups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The folders of the cgroups that limit this process, each followed by its ancestors.

    Inside a container the path is mostly "/". If it is the host's path, which is not mounted here, "/" is its ancestor.

    Args:
        controller: The limited resource, as version 1 names it: "cpu" or "memory".
        root: The folder of `proc` and `sys`.
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
        place = PurePosixPath("/") if ".." in path.split("/") else PurePosixPath(path)  # ".." lies outside of our view
        for name in {controllers, controller} if controllers else {""}:
            for each in (place, *place.parents):
                yield mounted / name / each.relative_to("/")
