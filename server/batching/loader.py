"""What makes models ready beside those that serve, and keeps which ones came and went, as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.batching.policy import Rung
from server.curve import Curve
from server.dial import RSetting
from server.types import ModelInfo


@dataclass(frozen=True)
class Found:
    """A model as it lies on the disk.

    Attributes:
        name, version: Which one.
        revision: Of its files: while they stay as they are, so does this.
        r: Its deployment `r` as the settings have it.
    """

    name: str
    version: str
    revision: str
    r: RSetting


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to serve.

    Attributes:
        info: What is served.
        r: Its deployment `r` as the settings have it.
        steps: What `auto` chooses from.
        curve: What was measured of it, where that is known.
    """

    info: ModelInfo
    r: RSetting
    steps: Sequence[Rung]
    curve: Curve | None = None


OnDevice = Callable[[Callable[[], Any]], Any]
"""Has a piece of work done by the thread that computes, between two batches, and gives its result."""


class Loader(Protocol):
    """Makes models ready. The engine's device has a model from when `load` returns until it was freed."""

    def find(self, name: str, version: str | None) -> Found:
        """The model as it lies on the disk; called on a thread of its own, as is `load`.

        Raises:
            NotFoundError: No model of that name may be loaded.
            SettingsError: It has no such version, or cannot be read.
        """
        ...

    def load(self, found: Found, r: RSetting, on_device: OnDevice) -> Loaded:
        """Loads a model and warms it for its deployment `r`; raises ServerError or SettingsError where it cannot."""
        ...

    def free(self, info: ModelInfo) -> None:
        """Frees its memory; called on the thread that computes, when nothing computes it any more."""
        ...

    def available(self) -> Mapping[str, Sequence[str]]:
        """The versions of every model that may be loaded."""
        ...


class Kept(Protocol):
    """Keeps which models were loaded and unloaded over those of the start: for a restart, and for other engines."""

    def entries(self) -> Mapping[str, str | None]:
        """The version of each model that was loaded, and None for each that was unloaded."""
        ...

    def keep(self, name: str, version: str | None) -> None:
        """Notes that a version was loaded, or None that the model was unloaded."""
        ...
