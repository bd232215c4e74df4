"""The live configuration of one server: changed through its own API, and kept over a restart in a file."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from server.config.files import read_file, replace_file
from server.config.last_good import LastGood
from server.config.stored import read_versioned
from server.dial import RSetting, setting_from_json, setting_to_json
from server.errors import ConflictError, EngineError, InvalidError, ServerError, UnavailableError, shown
from server.metrics import CONFIG_STALE, CONFIG_VERSION
from server.types import Configuration
from server.unnamed import UnnamedFile

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 5.0
"""A change holds the lock for milliseconds. The supervisor kills a stopped holder, which frees the lock."""
_RETRY_S = 0.002

Change = tuple[RSetting, RSetting]
"""A live `r`, and the start setting that it replaced."""


class LocalConfig:
    """The deployment `r` of every model.

    A live change is kept with the start setting that it replaced. It outlives a restart while that setting stays the
    same; a start with another setting drops it.

    The engines of a server share a file, and so their configuration: a change applies to the next job of each. The file
    is only ever replaced as a whole. A look at its inode and times shows whether it was replaced (microseconds), and
    nothing is lost with the process that changed it. Changes take turns by a lock file, which the kernel frees when its
    holder dies.

    A damaged or removed file never stops the service. The last good configuration stays in force, also over a restart:
    a copy is kept beside the file. The damaged file stays in place, so that it can be repaired; the next change moves
    it to `.1.refused`, or the next free number.

    Args:
        start: Each model's `r` from the settings.
        path: JSON file that keeps live changes; None keeps them in memory.
        check: Raises InvalidError if the models cannot merge by the file.
        memory: Keeps the last good configuration over a restart of the engine.
    """

    def __init__(
        self,
        start: Mapping[str, RSetting],
        path: Path | None = None,
        check: Callable[[Mapping[str, RSetting]], None] = lambda models: None,
        memory: UnnamedFile | None = None,
    ) -> None:
        self._start, self._path, self._check = dict(start), path, check
        self._last_good = LastGood(memory, path.with_suffix(".good.json") if path else None)
        self._stamp: _Stamp | None = None
        self._refused: tuple[_Stamp, ServerError] | None = None
        self._problem: str | None = None
        self._take_over(1, {})
        CONFIG_STALE.set(0)
        recalled = self._last_good.recall(self._read)
        if recalled is not None:
            self._take_over(*recalled)
        if path is not None:
            self._catch_up(path)
        for name, (r, replaced) in self._changes.items():
            if name in self._start and replaced == self._start[name]:
                logger.info("%s: r=%s, set live earlier, stays in force", name, r)
        if path is not None and self._without_outdated() != self._changes:
            self._forget_outdated(path)

    @property
    def configuration(self) -> Configuration:
        if self._path is not None:
            self._catch_up(self._path)
        return self._configuration

    def setting(self, name: str, start: RSetting) -> RSetting:
        if self._path is not None:
            self._catch_up(self._path)
        r, replaced = self._changes.get(name, (start, start))
        return r if replaced == start else start

    def add(self, name: str, start: RSetting) -> None:
        self._start[name] = start
        self._take_over(self._configuration.version, self._changes)

    def remove(self, name: str) -> RSetting:
        start = self._start.pop(name)
        self._take_over(self._configuration.version, self._changes)
        return start

    async def change(self, changes: Mapping[str, RSetting], expected_version: int | None = None) -> Configuration:
        """See `ConfigStore`. Writes to disk before memory."""
        if self._path is None:
            self._take_over(*self._changed(changes, expected_version))
            self._keep()
            return self._configuration
        try:
            with _lock_file(self._path) as lock:
                await _until_locked(lock)
                self._catch_up(self._path)
                self._write(self._path, *self._changed(changes, expected_version))
                self._catch_up(self._path)
        except TimeoutError:
            raise UnavailableError("another engine is changing the configuration", retry_after_s=1) from None
        except OSError as error:
            raise EngineError(
                f"the change cannot be kept in {self._path}: {error.strerror}; nothing changed"
            ) from error
        return self._configuration

    async def follow(self) -> None:
        """Needs no task: each read sees the changes of other engines."""

    def _changed(self, changes: Mapping[str, RSetting], expected_version: int | None) -> tuple[int, dict[str, Change]]:
        """The next version, and all its changes."""
        refuse_stale(expected_version, self._configuration.version)
        ours = {name: (r, self._start[name]) for name, r in changes.items()}
        return self._configuration.version + 1, self._without_outdated() | ours

    def _without_outdated(self) -> dict[str, Change]:
        """The changes in force, and those of models that are not served this time."""
        return {n: change for n, change in self._changes.items() if self._start.get(n, change[1]) == change[1]}

    def _forget_outdated(self, path: Path) -> None:
        """Removes live changes that were made over other start settings. When several engines start, one of them does
        it.

        If the file cannot be written, each engine leaves them out for itself.
        """
        try:
            with _lock_file(path) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._catch_up(path)
                kept = self._without_outdated()
                for name in self._changes.keys() - kept.keys():
                    r, replaced = self._changes[name]
                    now = self._start[name]
                    logger.info("%s: r=%s was set live over r=%s; started with r=%s now", name, r, replaced, now)
                if kept != self._changes and self._problem is None:
                    self._write(path, self._configuration.version + 1, kept)
            self._catch_up(path)
        except OSError as error:
            logger.warning("state file %s cannot be written: %s", path, error.strerror)
        if self._without_outdated() != self._changes:
            self._take_over(self._configuration.version + 1, self._without_outdated())

    def _catch_up(self, path: Path) -> None:
        """Reads the file if it has changed. The last good configuration stays if the file is bad."""
        try:
            self._look(path)
            problem = None
        except (FileNotFoundError, NotADirectoryError):  # nothing has been changed yet, or somebody removed it
            problem = "it is missing" if self._stamp is not None or self._changes else None
        except (OSError, ServerError) as error:
            problem = str(error)
        if problem == self._problem:
            return  # logged once, although the file is looked at for every job
        if problem is not None:
            logger.error(
                "state file %s is not used: %s; configuration %d stays in force, and the next change replaces the file",
                path,
                problem,
                self._configuration.version,
            )
        self._problem = problem
        CONFIG_STALE.set(problem is not None)

    def _look(self, path: Path) -> None:
        """Adopts the content of the file if it was replaced.

        Raises:
            InvalidError: It is no configuration, or a wrong one for these models.
            OSError: It cannot be read.
        """
        stamp = _stamp(os.stat(path))
        if stamp == self._stamp:
            return
        if self._refused is not None and stamp == self._refused[0]:
            raise self._refused[1]
        try:
            status, content = read_file(path)
            stamp = _stamp(status)
            version, changes = self._read(content)
        except ServerError as error:
            self._refused = stamp, error
            raise
        self._stamp, self._refused = stamp, None
        self._take_over(version, changes)
        self._keep()

    def _read(self, content: bytes) -> tuple[int, dict[str, Change]]:
        """Version and changes. Raises InvalidError if the content is no configuration, or a wrong one for these
        models.
        """
        version, said = read_versioned(content)
        changes = {name: _change(name, entry) for name, entry in said.items()}
        self._check(self._in_force(changes))
        return version, changes

    def _keep(self) -> None:
        self._last_good.keep(_line(self._configuration.version, self._changes))

    def _take_over(self, version: int, changes: dict[str, Change]) -> None:
        self._changes = changes
        self._configuration = Configuration(version, self._start | self._in_force(changes))
        CONFIG_VERSION.set(version)

    def _in_force(self, changes: Mapping[str, Change]) -> dict[str, RSetting]:
        """The changes that were made over this server's start settings."""
        return {name: r for name, (r, replaced) in changes.items() if self._start.get(name) == replaced}

    def _write(self, path: Path, version: int, changes: Mapping[str, Change]) -> None:
        if self._problem is not None and os.path.lexists(path):
            names = (path.with_suffix(f".{number}.refused") for number in itertools.count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            os.replace(path, aside)
            logger.warning("state file %s, which is not used, is now %s", path, aside)
        replace_file(path, _line(version, changes))


def _line(version: int, changes: Mapping[str, Change]) -> str:
    models = {
        name: {"r": setting_to_json(r), "start": setting_to_json(replaced)} for name, (r, replaced) in changes.items()
    }
    return json.dumps({"version": version, "models": models})


def _change(name: str, entry: object) -> Change:
    if not isinstance(entry, dict) or not entry.keys() >= {"r", "start"}:
        raise InvalidError(f"the entry of {shown(name)} is {shown(entry)}; it must have r and start")
    return setting_from_json(entry["r"]), setting_from_json(entry["start"])


_Stamp = tuple[int, int, int]


def _stamp(status: os.stat_result) -> _Stamp:
    """Differs whenever `replace_file` has replaced the file."""
    return status.st_ino, status.st_mtime_ns, status.st_size


def _lock_file(path: Path) -> IO[str]:
    """The file to lock. A lock on the state file would be replaced with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_suffix(".lock").open("a")


async def _until_locked(file: IO[str]) -> None:
    """Waits for the lock without blocking the event loop; raises TimeoutError."""
    async with asyncio.timeout(LOCK_TIMEOUT_S):
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(_RETRY_S)


def refuse_stale(expected_version: int | None, version: int) -> None:
    """Raises ConflictError if a change was made for another version."""
    if expected_version not in (None, version):
        raise ConflictError(
            f"the configuration is at version {version}, not {expected_version}; read it again", config_version=version
        )
