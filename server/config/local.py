"""The live configuration of one server: changed through its own API, and kept over a restart when it has a file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.dial import RSetting, setting_from_json, setting_to_json
from server.errors import ConflictError, EngineError, InvalidError
from server.metrics import CONFIG_VERSION
from server.settings import SettingsError
from server.types import Configuration

logger = logging.getLogger(__name__)


class LocalConfig:
    """The deployment `r` of every model.

    A live change is kept together with the start setting that it replaced. It outlives a restart while that start
    setting stays the same; whoever starts the service with another one means that one.

    Args:
        start: Each model's `r` from the settings.
        path: JSON file that keeps live changes; None keeps them in memory.

    Raises:
        SettingsError: The file is there and cannot be read, or not written.
    """

    def __init__(self, start: Mapping[str, RSetting], path: Path | None = None) -> None:
        self._start = dict(start)
        self._path = path
        self._others: dict[str, dict[str, Any]] = {}  # changes of models that are not served this time
        self._version, self._live = self._read()
        CONFIG_VERSION.set(self._version)

    @property
    def configuration(self) -> Configuration:
        return Configuration(self._version, self._start | self._live)

    async def change(self, changes: Mapping[str, RSetting], expected_version: int | None = None) -> Configuration:
        """On disk before in memory."""
        refuse_stale(expected_version, self._version)
        live = self._live | dict(changes)
        try:
            self._write(self._version + 1, live)
        except OSError as error:
            raise EngineError(
                f"the change cannot be kept in {self._path}: {error.strerror}; nothing changed"
            ) from error
        self._version, self._live = self._version + 1, live
        CONFIG_VERSION.set(self._version)
        return self.configuration

    async def follow(self) -> None:
        """Nobody else changes it."""

    def _read(self) -> tuple[int, dict[str, RSetting]]:
        if self._path is None or not self._path.exists():
            return 1, {}
        try:
            content = json.loads(self._path.read_text())
            entries = {
                name: (setting_from_json(entry["r"]), setting_from_json(entry["start"]))
                for name, entry in content["models"].items()
            }
            version = int(content["version"])
        except (OSError, ValueError, OverflowError, LookupError, TypeError, AttributeError, InvalidError) as error:
            raise SettingsError(f"state file {self._path} cannot be read ({error}); mend or remove it") from error
        live = {}
        for name, (r, start) in entries.items():
            if name not in self._start:
                self._others[name] = {"r": setting_to_json(r), "start": setting_to_json(start)}
            elif start == self._start[name]:
                live[name] = r
                logger.info("%s: r=%s, set live earlier, stays in force", name, r)
            else:
                logger.info("%s: r=%s was set live over r=%s; started with r=%s now", name, r, start, self._start[name])
        if len(live) + len(self._others) < len(entries):
            version += 1
            try:
                self._write(version, live)
            except OSError as error:
                raise SettingsError(f"state file {self._path} cannot be written: {error.strerror}") from error
        return version, live

    def _write(self, version: int, live: Mapping[str, RSetting]) -> None:
        if self._path is None:
            return
        ours = {
            name: {"r": setting_to_json(r), "start": setting_to_json(self._start[name])} for name, r in live.items()
        }
        models = self._others | ours
        replace_file(self._path, json.dumps({"version": version, "models": models}))


def refuse_stale(expected_version: int | None, version: int) -> None:
    """Raises ConflictError when a change was meant for another version."""
    if expected_version not in (None, version):
        raise ConflictError(
            f"the configuration is at version {version}, not {expected_version}; read it again", config_version=version
        )


def replace_file(path: Path, text: str) -> None:
    """Writes a file as a whole: a start after a crash sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
