"""A live configuration that somebody else decides and this process is told: `user_config` of Ray Serve, a file."""

from __future__ import annotations

from collections.abc import Mapping

from server.config.shared import SharedConfig
from server.dial import RSetting
from server.errors import ConflictError
from server.types import Configuration


class PushedConfig(SharedConfig):
    """Holds what it was told last. The version is this server's own count."""

    async def change(self, changes: Mapping[str, RSetting], expected_version: int | None = None) -> Configuration:
        raise ConflictError(f"the configuration is that of {self._source}; change it there")

    async def follow(self) -> None:
        """It is told."""

    def take_over(self, models: Mapping[str, RSetting]) -> None:
        """Has the models that are named so, and the others as they were started.

        Raises:
            ServerError: A model cannot merge like that; nothing changes.
        """
        if models != self._shared.models:
            self._adopt(Configuration(self._shared.version + 1, dict(models)))
        else:
            self._say_taken()

    def refuse(self, error: Exception) -> None:
        """Says that what came is not taken over."""
        self._say_refused(error)
