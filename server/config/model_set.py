"""The models that were loaded and unloaded live: kept over a restart, and shared by the engines of a server."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from server.config.last_good import LastGood
from server.documents import read_json
from server.errors import InvalidError, shown
from server.model_spec import ModelSpec
from server.settings import Settings
from server.unnamed import UnnamedFile


@dataclass(frozen=True)
class _Entry:
    """A load or unload of a model, and the model's source at the start.

    Attributes:
        version: The loaded version; None if the model was unloaded.
        start: The model's source in the settings; None if the settings do not name it.
    """

    version: str | None
    start: str | None


class ModelSet:
    """The loads and unloads since the start.

    A change is kept with the settings' source of that name. It outlives a restart while that stays the same; a start
    with another source or version drops it.

    Args:
        settings: The server's settings.
        memory: Outlives an engine process, and shares changes among the engines of a server.
    """

    def __init__(self, settings: Settings, memory: UnnamedFile | None = None) -> None:
        self._starts = {spec.name: _described(spec) for spec in settings.model}
        self._memory = memory
        self._kept = LastGood(memory, settings.models_file(), "which models were loaded")
        with self._alone():
            if entries := self._read():
                self._write(entries)  # into memory, which the engines read every second

    def entries(self) -> dict[str, str | None]:
        """The version of each model that was loaded since the start; None for each that was unloaded."""
        return {name: e.version for name, e in self._read().items() if e.start == self._starts.get(name)}

    def keep(self, name: str, version: str | None) -> None:
        """Records that a version was loaded, or with None that the model was unloaded."""
        with self._alone():
            self._write(self._read() | {name: _Entry(version, self._starts.get(name))})

    def _read(self) -> dict[str, _Entry]:
        return self._kept.recall(_entries) or {}

    def _write(self, entries: Mapping[str, _Entry]) -> None:
        models = {name: {"version": entry.version, "start": entry.start} for name, entry in entries.items()}
        self._kept.keep(json.dumps({"models": models}))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other engines from changing the entries between a read and a write."""
        if self._memory is None:
            yield
            return
        fcntl.lockf(self._memory, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._memory, fcntl.LOCK_UN)


def _described(spec: ModelSpec) -> str:
    """The part of a model's settings that identifies it."""
    return ",".join(filter(None, [spec.source, spec.weights and f"weights={spec.weights}", spec.version]))


def _entries(content: bytes) -> dict[str, _Entry]:
    """Raises InvalidError for content that `ModelSet` has not written."""
    document = read_json(content)
    models = document.get("models") if isinstance(document, dict) else None
    if not isinstance(models, dict):
        raise InvalidError(f"it is {shown(document)}; it must be an object with models")
    return {name: _entry(name, said) for name, said in models.items()}


def _entry(name: str, said: object) -> _Entry:
    if isinstance(said, dict):
        version, start = said.get("version"), said.get("start")
        if all(isinstance(each, str | None) for each in (version, start)):
            return _Entry(version, start)
    raise InvalidError(f"the entry of {shown(name)} is {shown(said)}; it must have version and start")
