"""The protocol of all stores of the live configuration, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from server.config.local import LocalConfig
from server.config.shared import Check
from server.config.watched import WatchedFile
from server.dial import RSetting
from server.errors import SettingsError
from server.settings import Settings
from server.types import Configuration
from server.unnamed import UnnamedFile


class ConfigStore(Protocol):
    """Keeps the deployment `r` of every model."""

    @property
    def configuration(self) -> Configuration:
        """The configuration at this moment."""
        ...

    def setting(self, name: str, start: RSetting) -> RSetting:
        """The `r` of a model whose start setting is `start`."""
        ...

    def add(self, name: str, start: RSetting) -> None:
        """Adds a model with its start setting."""
        ...

    def remove(self, name: str) -> RSetting:
        """Removes a model and returns its start setting. Its live change returns when the model does."""
        ...

    async def change(self, changes: Mapping[str, RSetting], expected_version: int | None = None) -> Configuration:
        """Changes some models, all or none. The caller has checked that they can merge so.

        Raises:
            ConflictError: Another change came before `expected_version`, or the configuration is not changed here.
            EngineError: The change cannot be kept.
            UnavailableError: The store does not answer.
        """
        ...

    async def follow(self) -> None:
        """Adopts the changes of others until it is cancelled; returns at once if there are no others."""
        ...


def open_store(
    settings: Settings, check: Check, otherwise: Path | None = None, memory: UnnamedFile | None = None
) -> ConfigStore:
    """The store that the settings ask for: a file of this machine, a file that somebody else writes, or Redis.

    Args:
        settings: The server's settings.
        check: Checks the `r` of this server's models.
        otherwise: The file that the engines share if the settings name no folder for one.
        memory: Keeps the last good configuration over a restart of the engine.

    Raises:
        SettingsError: The shared configuration cannot be read, or a model cannot merge by its `r`, and no good one was
            kept.
    """
    start = {spec.name: settings.spec(spec.name).r or 0 for spec in settings.model}
    shared, file = settings.shared_config, settings.state_file() or otherwise
    if shared is None:
        return LocalConfig(start, file, check, memory)
    cache = file.with_name(f"shared-{settings.port}.json") if file else None
    # a Redis URL that lacks a slash is not a file
    if "://" not in shared and not shared.startswith(("redis:", "rediss:")):
        return WatchedFile(start, shared, cache, check, memory)
    try:
        from server.config.in_redis import RedisConfig
    except ImportError as error:
        raise SettingsError("shared configuration in Redis: pip install 'tome-server[redis]'") from error
    return RedisConfig(start, shared, cache, check, memory)
