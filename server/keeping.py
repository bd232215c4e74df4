"""What a command makes of a model is kept beside its weights, else in the state folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from server.errors import SettingsError


def state_folder(state_dir: Path | None, kind: str) -> Path | None:
    """The folder of one kind of files in the state folder.

    Returns:
        None where nothing is kept, or the state folder lies in a home folder that this user does not have.
    """
    try:
        return state_dir.expanduser() / kind if state_dir else None
    except RuntimeError:
        return None


def keep(write: Callable[[Path], None], name: str, own: Path | None, kept: Path | None) -> tuple[Path, str | None]:
    """Writes a file to the first place that can be written.

    Args:
        write: Writes it.
        name: Of the model.
        own: The place beside the weights, or None.
        kept: The place in the state folder, or None.

    Returns:
        The file, and why it is not beside the weights where it should be.

    Raises:
        SettingsError: There is no place that can be written.
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
