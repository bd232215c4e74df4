"""Keeps files that a command makes for a model: beside its weights, else in the state folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from server.errors import SettingsError


def state_folder(state_dir: Path | None, kind: str) -> Path | None:
    """The folder for one kind of files in the state folder.

    Returns:
        None if nothing is kept, or if this user does not have the home folder of the path.
    """
    try:
        return state_dir.expanduser() / kind if state_dir else None
    except RuntimeError:
        return None


def keep(write: Callable[[Path], None], name: str, own: Path | None, kept: Path | None) -> tuple[Path, str | None]:
    """Writes a file to the first place that is writable.

    Args:
        write: Writes the file.
        name: Name of the model.
        own: The place beside the weights, or None.
        kept: The place in the state folder, or None.

    Returns:
        The file, and why it is not beside the weights if it should be.

    Raises:
        SettingsError: No place is writable.
    """
    refusal = None
    if own is not None:
        try:
            write(own)
            return own, None
        except OSError as error:
            refusal = f"{own} cannot be written ({error.strerror})"
    if kept is None:
        reason = refusal or f"{name} has no folder of its own"
        raise SettingsError(f"{reason}, and there is no state folder; use -o FILE")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write(kept)
    except OSError as error:
        raise SettingsError(f"{kept} cannot be written ({error.strerror}); use -o FILE") from None
    return kept, refusal
