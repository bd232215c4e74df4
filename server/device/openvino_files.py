"""What OpenVINO keeps on disk over a restart, and what of it goes so that the disk does not fill up.

Several servers may share it: whatever is removed here may be in use there, and is made again by whoever misses it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable
from pathlib import Path

DISK_SHARE = 0.1
"""What translations may take of the disk's free space and themselves together."""

MOST_BYTES = 8 << 30
"""What they may take however large the disk is: those of twelve ViT-L, or of two hundred times the bundled model."""

_DAY_S = 86_400.0
OUTDATED_S = 30 * _DAY_S
"""Folders of models, and operators, that nobody has used for so long are removed. A server touches its own when it
starts."""

_FOLDER, _OPERATOR, _UNFINISHED = re.compile("[0-9a-f]{24}"), re.compile(r"merge_tokens-\w+\.so"), re.compile("tmp.*")


class Translations:
    """The translations of one model, by name: each a graph and its weights.

    The latest use is the time of the graph's file. The graph is written last and removed first: where it is, all is,
    unless a process was killed or another one removes it at this moment.

    Args:
        folder: Where they lie; it is made, also when it is gone.

    Attributes:
        folder: As given.
        kept: Graphs that are never removed to make room.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)
        touch(folder)
        for each in _entries(folder, _UNFINISHED):
            if _unused_s(each) > _DAY_S:  # of a process that was killed
                _remove(each)

    def graph(self, name: str) -> Path:
        """The file of its graph."""
        return self.folder / f"{name}.xml"

    def keep(self, name: str) -> None:
        """Never removes it to make room."""
        self.kept.add(self.graph(name))

    def use(self, name: str) -> bool:
        """Whether it is there; it then is the one used last."""
        touch(self.folder)
        return touch(self.graph(name))

    def remove(self, name: str) -> None:
        """Removes all of it."""
        _remove_graph(self.graph(name))


def make_room(cache_dir: Path, kept: Collection[Path] = ()) -> None:
    """Removes what nobody has used for long, and of all models the translations used longest ago, beyond the bounds.

    Args:
        cache_dir: Holds a folder for each model.
        kept: Graphs that stay.
    """
    folders = _entries(cache_dir, _FOLDER)
    outdated = [each for each in folders + _entries(cache_dir, _OPERATOR) if _unused_s(each) > OUTDATED_S]
    outdated += [each for each in _entries(cache_dir, _UNFINISHED) if _unused_s(each) > _DAY_S]
    for each in outdated:
        _remove(each)
    graphs = sorted((graph for folder in folders for graph in folder.glob("*.xml")), key=_unused_s)
    sizes = {graph: sum(map(_bytes_of, _parts(graph))) for graph in graphs}
    taken = sum(size for graph, size in sizes.items() if graph in kept)
    most = min(MOST_BYTES, DISK_SHARE * (_free_bytes(cache_dir) + sum(sizes.values())))
    for graph, size in sizes.items():
        if graph not in kept:
            taken += size
            if taken > most:
                _remove_graph(graph)


def _remove_graph(graph: Path) -> None:
    for each in _parts(graph):
        _remove(each)


def _entries(folder: Path, name: re.Pattern[str]) -> list[Path]:
    entries: Iterable[Path] = ()
    with contextlib.suppress(OSError):
        entries = list(folder.iterdir())
    return [each for each in entries if name.fullmatch(each.name)]


def touch(path: Path) -> bool:
    """Notes that a file or folder is used; says whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # another's, which may be read
        return path.exists()
    return True


def _parts(graph: Path) -> tuple[Path, ...]:
    """All that is of a translation, the graph first. An older version kept compiled graphs beside it."""
    return graph, graph.with_suffix(".compiled"), graph.with_suffix(".bin")


def _bytes_of(path: Path) -> int:
    """What a file or a folder takes; nothing where it is gone."""
    try:
        return sum(map(_bytes_of, path.iterdir())) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:  # another server has removed it
        return 0


def _unused_s(path: Path) -> float:
    """Seconds since its last use; forever where it is gone."""
    try:
        return time.time() - path.stat().st_mtime  # noqa: TID251 - a file's own clock
    except OSError:
        return float("inf")


def _remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and may be removed."""
    with contextlib.suppress(OSError):
        path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)
