"""A live configuration that is pushed to this process: by `user_config` of Ray Serve, or from a file."""

from __future__ import annotations

from collections.abc import Mapping

from server.config.shared import SharedConfig
from server.dial import RSetting
from server.errors import ConflictError
from server.types import Configuration


class PushedConfig(SharedConfig):
    """Holds the last configuration that it received. The version is this server's own count."""

    async def change(self, changes: Mapping[str, RSetting], expected_version: int | None = None) -> Configuration:
        raise ConflictError(f"the configuration comes from {self._source}; change it there")

    async def follow(self) -> None:
        """Nothing to follow: changes are pushed."""

    def take_over(self, models: Mapping[str, RSetting]) -> None:
        """Adopts the `r` of the named models; other models return to their start settings.

        Raises:
            ServerError: A model cannot merge by its `r`; nothing changes.
        """
        if models != self._shared.models:
            self._adopt(Configuration(self._shared.version + 1, dict(models)))
        else:
            self._say_taken()

    def refuse(self, error: Exception) -> None:
        """Logs that a configuration was refused."""
        self._say_refused(error)
