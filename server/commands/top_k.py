"""How many classes a command names."""

from __future__ import annotations

from server.settings import SettingsError
from server.types import ModelInfo


def checked_top_k(top_k: int | None, info: ModelInfo, default: int) -> int:
    """What `--top-k` says, else the default or all classes where there are fewer.

    Raises:
        SettingsError: It is out of range, or the model has no classes.
    """
    if not info.labels:
        raise SettingsError(
            f"{info.name} has no classifier, so it names no classes; 'tome-server run --embed' has vectors"
        )
    if top_k is None:
        return min(default, len(info.labels))
    if not 1 <= top_k <= len(info.labels):
        raise SettingsError(f"--top-k is {top_k}; it must lie between 1 and {len(info.labels)}")
    return top_k
