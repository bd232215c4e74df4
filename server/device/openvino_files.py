"""What OpenVINO keeps on disk over a restart, and what of it goes so that the disk does not fill up.

Several servers may share it: whatever is removed here may be in use there, and is made again by whoever misses it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from server.dial import Schedule, r_of, text_of

MOST_TRANSLATIONS = 16
"""Of a model, besides those that are warmed. Each has weights of its own, 85 MB for ViT-S in float32: OpenVINO writes
the constants of a graph into one file, in its order, and beside the weights there are some of each schedule."""

DISK_SHARE = 0.1
"""What translations of a model may take besides the warmed ones, of the disk's free space and themselves together."""

MOST_FOLDERS = 16
_DAY_S = 86_400.0
OUTDATED_S = 30 * _DAY_S
"""Folders of models, and operators, that nobody has used for so long are removed; beyond `MOST_FOLDERS` those that
nobody has used for a day: a server touches its own when it starts, however many they are."""

_FOLDER, _OPERATOR, _UNFINISHED = re.compile("[0-9a-f]{24}"), re.compile(r"merge_tokens-\w+\.so"), re.compile("tmp.*")


class Translations:
    """The translated graphs of one model: for each schedule its graph, its weights, and what OpenVINO compiled of it.

    The latest use is the time of the graph's file. The graph is written last and removed first: where it is, all is,
    unless a process was killed or another one removes it at this moment.

    Args:
        folder: Where they lie; it is made, also when it is gone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)
        touch(folder)
        for each in _entries(folder, _UNFINISHED):
            if _unused_s(each) > _DAY_S:  # of a process that was killed
                _remove(each)

    def graph(self, schedule: Schedule) -> Path:
        """The file of its graph."""
        return self._folder / f"r{text_of(r_of(schedule)).replace(',', '-')}.xml"

    def compiled(self, schedule: Schedule) -> Path:
        """The folder in which OpenVINO keeps what it compiled of it: graphs without weights, a hundredth of them."""
        return self.graph(schedule).with_suffix(".compiled")

    def keep(self, schedule: Schedule) -> None:
        """Never removes it for the sake of others."""
        self._kept.add(self.graph(schedule))

    def use(self, schedule: Schedule) -> bool:
        """Whether it is there; it then is the one used last."""
        touch(self._folder)
        return touch(self.graph(schedule))

    def remove(self, schedule: Schedule) -> None:
        """Removes all of it."""
        self._remove(self.graph(schedule))

    def make_room(self) -> None:
        """Removes those that were used longest ago, beyond the number and the share of the disk that is kept."""
        graphs = [each for each in self._folder.glob("*.xml") if each not in self._kept]
        sizes = {graph: sum(map(_bytes_of, _parts(graph))) for graph in sorted(graphs, key=_unused_s)}
        most, taken = DISK_SHARE * (_free_bytes(self._folder) + sum(sizes.values())), 0
        for number, (graph, size) in enumerate(sizes.items()):
            taken += size
            if number > 0 and (number >= MOST_TRANSLATIONS or taken > most):  # the latest is about to be read
                self._remove(graph)

    def _remove(self, graph: Path) -> None:
        for each in _parts(graph):
            _remove(each)


def remove_outdated(cache_dir: Path) -> None:
    """Removes what other models, versions and weights have left, and nobody has used for long."""
    folders = sorted(_entries(cache_dir, _FOLDER), key=_unused_s)
    outdated = [each for each in folders[MOST_FOLDERS:] if _unused_s(each) > _DAY_S]
    outdated += [each for each in folders + _entries(cache_dir, _OPERATOR) if _unused_s(each) > OUTDATED_S]
    outdated += [each for each in _entries(cache_dir, _UNFINISHED) if _unused_s(each) > _DAY_S]
    for each in outdated:
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


def _parts(graph: Path) -> tuple[Path, Path, Path]:
    """All that is of a translation, the graph first."""
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
