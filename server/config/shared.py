"""A configuration that servers share. The last good one stays in force if its source fails."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from server.config.last_good import LastGood
from server.config.stored import read_configuration
from server.dial import RSetting
from server.errors import ServerError
from server.metrics import CONFIG_REFUSED, CONFIG_SOURCE_UP, CONFIG_STALE, CONFIG_VERSION
from server.types import Configuration
from server.unnamed import UnnamedFile

logger = logging.getLogger(__name__)

Check = Callable[[Mapping[str, RSetting]], None]
"""Raises InvalidError if a model cannot merge by its `r`, and NotFoundError if there is no such model."""


class SharedConfig:
    """The last good shared configuration. It overrides the start settings of the models that it names.

    Args:
        start: Each model's `r` from the settings, for models that the shared configuration does not name.
        source: Name of the source, for the log.
        cache: JSON file that keeps the last good configuration for a start without the source; None for none.
        check: Checks the `r` of this server's models.
        memory: Keeps the last good configuration over a restart of the engine.
    """

    def __init__(
        self,
        start: Mapping[str, RSetting],
        source: str,
        cache: Path | None,
        check: Check,
        memory: UnnamedFile | None = None,
    ) -> None:
        self._start, self._source, self._check = dict(start), source, check
        self._last_good = LastGood(memory, cache)
        recalled = self._last_good.recall(self._read)
        self._is_recalled = recalled is not None
        self._shared = recalled or Configuration(1, {})
        self._problem: str | None = None
        self._refusal: str | None = None
        CONFIG_SOURCE_UP.set(1)
        CONFIG_VERSION.set(self._shared.version)

    @property
    def configuration(self) -> Configuration:
        models = {name: self._shared.models.get(name, r) for name, r in self._start.items()}
        return Configuration(self._shared.version, models)

    def setting(self, name: str, start: RSetting) -> RSetting:
        """See `ConfigStore`, also for the next methods."""
        return self._shared.models.get(name, start)

    def add(self, name: str, start: RSetting) -> None:
        self._start[name] = start

    def remove(self, name: str) -> RSetting:
        return self._start.pop(name)

    def _adopt(self, shared: Configuration) -> None:
        """Adopts another configuration.

        Raises:
            ServerError: A model of this server cannot merge by its `r`; nothing changes.
        """
        self._check(shared.models)
        self._shared, self._refusal = shared, None
        self._say_taken()
        CONFIG_VERSION.set(shared.version)
        logger.info("configuration %d of %s is in force", shared.version, self._source)
        self._last_good.keep(json.dumps(shared.to_json()))

    def _say_taken(self) -> None:
        """Records that the source's configuration is in force."""
        if self._refusal is not None:
            logger.info("the configuration of %s is in force again", self._source)
        self._refusal = None
        CONFIG_REFUSED.set(0)
        self._note_staleness()

    def _say_refused(self, error: Exception) -> None:
        """Logs each cause once; an unexpected error with its traceback."""
        cause, unforeseen = (error.message, None) if isinstance(error, ServerError) else (repr(error), error)
        if cause != self._refusal:
            version = self._shared.version
            logger.error(
                "the configuration of %s is refused: %s; configuration %d stays in force",
                self._source,
                cause,
                version,
                exc_info=unforeseen,
            )
        self._refusal = cause
        CONFIG_REFUSED.set(1)
        self._note_staleness()

    def _say_reached(self, problem: str | None = None) -> None:
        """Records whether the source can be read, and logs changes."""
        CONFIG_SOURCE_UP.set(problem is None)
        if problem is None and self._problem is not None:
            logger.info("%s can be read again", self._source)
        if problem is not None and self._problem is None:
            version = self._shared.version
            logger.warning("%s cannot be read (%s); configuration %d stays in force", self._source, problem, version)
        self._problem = problem
        self._note_staleness()

    def _note_staleness(self) -> None:
        CONFIG_STALE.set(self._problem is not None or self._refusal is not None)

    def _read(self, content: bytes) -> Configuration:
        """Parses a kept configuration; raises a ServerError if it is wrong for these models."""
        kept = read_configuration(content)
        self._check(kept.models)
        return kept
