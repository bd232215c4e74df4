"""What a command makes of a model is kept beside its weights, else in the state folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from server.settings import SettingsError


def keep(
    write: Callable[[Path], None], name: str, own: Path | None, kept: Path | None, no_state: str
) -> tuple[Path, str | None]:
    """Writes a file to the first place that can be written.

    Args:
        write: Writes it.
        name: Of the model.
        own: The place beside the weights, or None.
        kept: The place in the state folder, or None.
        no_state: Why there is none, for the message.

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
        raise SettingsError(f"{refusal or f'{name} has no folder of its own'}, and {no_state}; use -o FILE")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write(kept)
    except OSError as error:
        raise SettingsError(f"{kept} cannot be written ({error.strerror}); use -o FILE") from None
    return kept, refusal
