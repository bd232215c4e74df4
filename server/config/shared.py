"""A configuration that servers share: the last good one goes on serving, whatever becomes of its source."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from server.config.local import replace_file
from server.config.stored import read_configuration
from server.dial import RSetting
from server.errors import ServerError
from server.metrics import CONFIG_REFUSED, CONFIG_SOURCE_UP, CONFIG_VERSION
from server.types import Configuration

logger = logging.getLogger(__name__)

Check = Callable[[Mapping[str, RSetting]], None]
"""Raises InvalidError where a model cannot merge like that, NotFoundError where there is no such model."""


class SharedConfig:
    """The last good shared configuration. What it says of a model holds whatever this server was started with.

    Args:
        start: Each model's `r` from the settings, for models that the shared one does not name.
        source: Where it comes from, for the log.
        cache: JSON file that keeps the last good one for a start without the source; None for none.
        check: Whether the models of this server can merge like that.
    """

    def __init__(self, start: Mapping[str, RSetting], source: str, cache: Path | None, check: Check) -> None:
        self._start, self._source, self._cache, self._check = dict(start), source, cache, check
        self._shared = self._read_cache() or Configuration(1, {})
        self._problem: str | None = None
        self._refusal: str | None = None
        CONFIG_SOURCE_UP.set(1)
        CONFIG_VERSION.set(self._shared.version)

    @property
    def configuration(self) -> Configuration:
        models = {name: self._shared.models.get(name, r) for name, r in self._start.items()}
        return Configuration(self._shared.version, models)

    def _adopt(self, shared: Configuration) -> None:
        """Takes over another one.

        Raises:
            ServerError: A model of this server cannot merge like that; nothing changes.
        """
        self._check(shared.models)
        self._shared = shared
        self._say_taken()
        CONFIG_VERSION.set(shared.version)
        logger.info("configuration %d of %s is in force", shared.version, self._source)
        if self._cache is not None:
            try:
                replace_file(self._cache, json.dumps(shared.to_json()))
            except OSError as error:
                logger.warning("it cannot be kept in %s for the next start: %s", self._cache, error.strerror)

    def _say_taken(self) -> None:
        """Notes that what the source says is what holds."""
        self._refusal = None
        CONFIG_REFUSED.set(0)

    def _say_refused(self, error: Exception) -> None:
        """Says it once for each cause; where nobody has foreseen it, with the traceback."""
        cause, unforeseen = (error.message, None) if isinstance(error, ServerError) else (repr(error), error)
        if cause != self._refusal:
            logger.error("what %s says is refused: %s", self._source, cause, exc_info=unforeseen)
        self._refusal = cause
        CONFIG_REFUSED.set(1)

    def _say_reached(self, problem: str | None = None) -> None:
        """Notes whether the source can be read, and says so when that changes."""
        CONFIG_SOURCE_UP.set(problem is None)
        if problem is None and self._problem is not None:
            logger.info("%s can be read again", self._source)
        if problem is not None and self._problem is None:
            version = self._shared.version
            logger.warning("%s cannot be read (%s); configuration %d goes on", self._source, problem, version)
        self._problem = problem

    def _read_cache(self) -> Configuration | None:
        if self._cache is None:
            return None
        try:
            cached = read_configuration(self._cache.read_bytes())
            self._check(cached.models)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ServerError) as error:
            logger.warning("what %s keeps of %s is not used: %s", self._cache, self._source, error)
            return None
        return cached
