"""Protocols of the engine: what loads models while others serve, and what remembers loads and unloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.batching.policy import Rung
from server.curve import Curve
from server.dial import RSetting
from server.types import ModelInfo, OnDevice


@dataclass(frozen=True)
class Found:
    """A model on disk.

    Attributes:
        name: The model.
        version: Its version.
        revision: Changes exactly when its files change.
        r: Its deployment `r` in the settings.
    """

    name: str
    version: str
    revision: str
    r: RSetting


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to serve.

    Attributes:
        info: The description that clients get.
        r: Its deployment `r` in the settings.
        steps: The ladder of `auto`.
        curve: Its curve, if there is one.
    """

    info: ModelInfo
    r: RSetting
    steps: Sequence[Rung]
    curve: Curve | None = None


class Loader(Protocol):
    """Loads models. The engine's device has a model from the return of `load` until it is freed."""

    def find(self, name: str, version: str | None) -> Found:
        """Finds a model on disk. Called on a thread of its own, as is `load`.

        Raises:
            NotFoundError: No model of that name may be loaded.
            SettingsError: It has no such version, or cannot be read.
        """
        ...

    def load(self, found: Found, r: RSetting, on_device: OnDevice) -> Loaded:
        """Loads a model and warms it for its deployment `r`. Raises ServerError or SettingsError if it cannot."""
        ...

    def free(self, info: ModelInfo) -> None:
        """Frees a model's memory. Called on the computing thread, when nothing computes it any more."""
        ...

    def available(self) -> Mapping[str, Sequence[str]]:
        """The versions of every model that may be loaded."""
        ...


class Kept(Protocol):
    """Remembers the loads and unloads since the start, for a restart and for other engines."""

    def entries(self) -> Mapping[str, str | None]:
        """The version of each model that was loaded; None for each that was unloaded."""
        ...

    def keep(self, name: str, version: str | None) -> None:
        """Records that a version was loaded, or with None that the model was unloaded."""
        ...
