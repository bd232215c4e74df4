"""The translations of OpenVINO on disk, and their removal, so that the disk does not fill up.

Several servers may share the folder. A server whose translation was removed by another makes it again. The Docker image
ships those of the bundled model.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable
from pathlib import Path

from server.model_config import BUNDLED

SHIPPED = BUNDLED / "openvino"
"""The folder of the translations that an image ships: a folder for each model, as in a state folder. Never written."""

DISK_SHARE = 0.1
"""The share of free disk space and translations together that translations may take."""

MOST_BYTES = 8 << 30
"""The most bytes of all translations: those of twelve ViT-L, or of the bundled model two hundred times."""

_DAY_S = 86_400.0
OUTDATED_S = 30 * _DAY_S
"""Folders of models, and operators, are removed if they were not used for this time. A server marks its own as used
when it starts."""

_FOLDER, _OPERATOR, _UNFINISHED = re.compile("[0-9a-f]{24}"), re.compile(r"merge_tokens-\w+\.so"), re.compile("tmp.*")


class Translations:
    """The translations of one model, by name: each a graph and its weights.

    The latest use is the time of the graph's file. The graph is written last and removed first. So if it is there, the
    weights are too, unless a process was killed or another one removes them at this moment.

    Args:
        folder: Their folder; it is made if it is missing.

    Attributes:
        folder: As given.
        kept: Graphs that are never removed to make room.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shipped = {graph.stem: graph for graph in (SHIPPED / folder.name).glob("*.xml")}
        self.kept: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)
        touch(folder)
        for each in _entries(folder, _UNFINISHED):
            if _unused_s(each) > _DAY_S:  # left by a process that was killed
                _remove(each)

    def graph(self, name: str) -> Path:
        """The file of its graph."""
        return self._shipped.get(name, self._own(name))

    def keep(self, name: str) -> None:
        """Protects it from removal when space is short."""
        self.kept.add(self._own(name))

    def use(self, name: str) -> bool:
        """Whether it is there. Marks it as used now, if it is not shipped."""
        touch(self.folder)
        return name in self._shipped or touch(self._own(name))

    def remove(self, name: str) -> None:
        """Removes all of it; a shipped one stays, and is not used again."""
        if self._shipped.pop(name, None) is None:
            _remove_graph(self._own(name))

    def _own(self, name: str) -> Path:
        return self.folder / f"{name}.xml"


def make_room(cache_dir: Path, kept: Collection[Path] = ()) -> None:
    """Removes outdated folders; then, beyond the bounds, the translations of all models that were used longest ago.

    Args:
        cache_dir: The folder that holds a folder for each model.
        kept: Graphs that are not removed.
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
    """Marks a file or folder as used now; returns whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # it belongs to another user, but can be read
        return path.exists()
    return True


def _parts(graph: Path) -> tuple[Path, ...]:
    """All files of a translation, the graph first. An older version also kept compiled graphs."""
    return graph, graph.with_suffix(".compiled"), graph.with_suffix(".bin")


def _bytes_of(path: Path) -> int:
    """The size of a file or a folder; 0 if it is gone."""
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
    """Seconds since its last use; infinite if it is gone."""
    try:
        return time.time() - path.stat().st_mtime  # noqa: TID251 - a file's own clock
    except OSError:
        return float("inf")


def _remove(path: Path) -> None:
    """Removes a file or a folder; does nothing if it is gone or cannot be removed."""
    with contextlib.suppress(OSError):
        path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)
