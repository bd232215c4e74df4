"""What every keeper of the live configuration can do, and the choice among them."""

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
        """What holds at this moment."""
        ...

    def setting(self, name: str, start: RSetting) -> RSetting:
        """The `r` that a model has which is started with this one."""
        ...

    def add(self, name: str, start: RSetting) -> None:
        """Keeps the `r` of one more model, which is started with this one."""
        ...

    def remove(self, name: str) -> RSetting:
        """Says no more of a model; what was changed is there when it comes back. Gives what it was started with."""
        ...

    async def change(self, changes: Mapping[str, RSetting], expected_version: int | None = None) -> Configuration:
        """Changes some models, all or none; the caller has checked what they can merge.

        Raises:
            ConflictError: `expected_version` is given and another change came first, or it is not changed here.
            EngineError: The change cannot be kept.
            UnavailableError: Whoever keeps it does not answer.
        """
        ...

    async def follow(self) -> None:
        """Takes over what others change, until it is cancelled; returns at once where nobody else can."""
        ...


def open_store(
    settings: Settings, check: Check, otherwise: Path | None = None, memory: UnnamedFile | None = None
) -> ConfigStore:
    """The keeper that the settings ask for: this machine's, a file that somebody else writes, or Redis.

    Args:
        settings: Those of the server.
        check: Whether its models can merge like that.
        otherwise: The file by which its engines agree where the settings name no folder for one.
        memory: What keeps the last good configuration over a restart of the engine.

    Raises:
        SettingsError: What servers share cannot be read, or holds an `r` that a model cannot merge, and nothing good
            was kept of it.
    """
    start = {spec.name: settings.spec(spec.name).r or 0 for spec in settings.model}
    shared, file = settings.shared_config, settings.state_file() or otherwise
    if shared is None:
        return LocalConfig(start, file, check, memory)
    cache = file.with_name(f"shared-{settings.port}.json") if file else None
    if "://" not in shared and not shared.startswith(("redis:", "rediss:")):  # a slash less is no file
        return WatchedFile(start, shared, cache, check, memory)
    try:
        from server.config.in_redis import RedisConfig
    except ImportError as error:
        raise SettingsError("shared configuration in Redis: pip install 'tome-server[redis]'") from error
    return RedisConfig(start, shared, cache, check, memory)
