"""A live configuration in a file that somebody else writes: a person, a Kubernetes ConfigMap, a deployment tool."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.config.files import read_file
from server.config.pushed import PushedConfig
from server.config.shared import Check
from server.dial import RSetting, parse_setting
from server.documents import read_yaml
from server.errors import InvalidError, ServerError, SettingsError, shown
from server.unnamed import UnnamedFile

POLL_S = 0.3
"""A look takes microseconds. It also works where notifications do not: on network mounts, and when a symlink is
swapped.
"""


class WatchedFile(PushedConfig):
    """Follows a YAML or JSON file: `models: {NAME: {r: 8}}`, with `max_r` and `min_agreement` beside `r: auto`.

    The file is read as a whole whenever its content has changed, through any symbolic links. A file that is wrong or
    cannot be read changes nothing. A start then uses the last good configuration, and fails if there is none.

    Raises:
        SettingsError: The file cannot be read, or names a model that is not served or an `r` that a model cannot merge;
            and no good configuration was kept.
    """

    def __init__(
        self,
        start: Mapping[str, RSetting],
        path: str,
        cache: Path | None,
        check: Check,
        memory: UnnamedFile | None = None,
    ) -> None:
        super().__init__(start, f"the file {path}", cache, check, memory)
        self._path = Path(path)
        self._seen: bytes | None = None
        try:
            _, self._seen = read_file(self._path)
            self.take_over(_models(self._seen))
        except (OSError, ValueError, ServerError) as error:  # ValueError: not a possible path
            if not self._is_recalled:
                raise SettingsError(f"shared configuration {path}: {error}") from error
            self._say_why(error)

    async def follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                _, content = await asyncio.to_thread(read_file, self._path)
            except Exception as error:  # the next look may succeed
                self._seen = None
                self._say_why(error)
                continue
            self._say_reached()
            if content != self._seen:
                self._seen = content
                try:
                    self.take_over(_models(content))
                except Exception as error:  # the next content may be good
                    self.refuse(error)

    def _say_why(self, error: Exception) -> None:
        """Logs why the file changes nothing: it is refused, or it cannot be read."""
        if isinstance(error, ServerError):
            self.refuse(error)
        else:
            self._say_reached(str(error) or repr(error))


def _models(content: bytes) -> dict[str, RSetting]:
    """Raises InvalidError for anything but a mapping of models to their settings."""
    document = read_yaml(content)
    models = document.get("models") if isinstance(document, dict) and document.keys() == {"models"} else None
    if not isinstance(models, dict):
        raise InvalidError("it must hold only 'models:', and below it each model's name with its r")
    return dict(_setting(name, entry) for name, entry in models.items())


def _setting(name: Any, entry: Any) -> tuple[str, RSetting]:
    if not isinstance(entry, dict) or "r" not in entry or not entry.keys() <= {"r", "max_r", "min_agreement"}:
        raise InvalidError(
            f"the entry of {shown(name)} is {shown(entry)}; it may have r, and with r: auto max_r and min_agreement"
        )
    return (name if isinstance(name, str) else shown(name)), parse_setting(
        entry["r"], entry.get("max_r"), entry.get("min_agreement")
    )
