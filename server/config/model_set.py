"""Which models were loaded and unloaded live: kept over a restart, and shared by the engines of a server."""

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
    """What became of a model, and how the start named it then; None where it did not.

    Attributes:
        version: The one that was loaded; None where the model was unloaded.
        start: The source that the start had for the name.
    """

    version: str | None
    start: str | None


class ModelSet:
    """What has changed over the models of the start.

    A change is kept together with what the start said of that name. It outlives a restart while that stays the same:
    whoever starts the service with another source, or another version, means that one.

    Args:
        settings: Of the server.
        memory: Outlives an engine process, and tells the engines of a server of each other's changes.
    """

    def __init__(self, settings: Settings, memory: UnnamedFile | None = None) -> None:
        self._starts = {spec.name: _told(spec) for spec in settings.model}
        self._memory = memory
        self._kept = LastGood(memory, settings.models_file(), "which models were loaded")
        with self._alone():
            if entries := self._read():
                self._write(entries)  # into memory, of which an engine looks at every second

    def entries(self) -> dict[str, str | None]:
        """The version of each model that was loaded over those of the start, and None for each that was unloaded."""
        return {name: e.version for name, e in self._read().items() if e.start == self._starts.get(name)}

    def keep(self, name: str, version: str | None) -> None:
        """Notes that a version was loaded, or None that the model was unloaded."""
        with self._alone():
            self._write(self._read() | {name: _Entry(version, self._starts.get(name))})

    def _read(self) -> dict[str, _Entry]:
        return self._kept.recall(_entries) or {}

    def _write(self, entries: Mapping[str, _Entry]) -> None:
        models = {name: {"version": entry.version, "start": entry.start} for name, entry in entries.items()}
        self._kept.keep(json.dumps({"models": models}))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps the other engines from changing what is read here and written."""
        if self._memory is None:
            yield
            return
        fcntl.lockf(self._memory, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._memory, fcntl.LOCK_UN)


def _told(spec: ModelSpec) -> str:
    """What a start says of a model that makes it another one."""
    return ",".join(filter(None, [spec.source, spec.weights and f"weights={spec.weights}", spec.version]))


def _entries(content: bytes) -> dict[str, _Entry]:
    """Raises InvalidError for what `ModelSet` has not written."""
    document = read_json(content)
    models = document.get("models") if isinstance(document, dict) else None
    if not isinstance(models, dict):
        raise InvalidError(f"it is {shown(document)}, and no object with models")
    return {name: _entry(name, said) for name, said in models.items()}


def _entry(name: str, said: object) -> _Entry:
    if isinstance(said, dict):
        version, start = said.get("version"), said.get("start")
        if all(isinstance(each, str | None) for each in (version, start)):
            return _Entry(version, start)
    raise InvalidError(f"of {shown(name)} it says {shown(said)}, and not version and start")
