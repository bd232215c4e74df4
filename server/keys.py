"""Checks the service's keys, and reads key files. No message here shows a key."""

from __future__ import annotations

from pathlib import Path

KEYS = ("api_key", "admin_key", "metrics_key")
"""The settings that hold a key. Each has a setting that names a file, such as `api_key_file`."""

_LONGEST = 4096


def checked_key(key: object) -> str:
    """Checks that every client can send a key in a header.

    Raises:
        ValueError: It is empty, or has characters that a header cannot carry.
    """
    if key is None or key == "":
        raise ValueError("it is empty, which would open the service; give a key, or leave the setting out")
    if not isinstance(key, str):
        raise ValueError("it is not text; put the key in quotes")
    if len(key) > _LONGEST or not all("!" <= character <= "~" for character in key):
        raise ValueError(
            f"it must be 1 to {_LONGEST} visible ASCII characters, without spaces or line breaks: a header carries it"
        )
    return key


def read_key(path: object) -> str:
    """Reads a key from a file that holds only the key and at most one line break at its end.

    Raises:
        ValueError: The file cannot be read, or holds no valid key.
    """
    if not path or not isinstance(path, str | Path):
        raise ValueError("it is empty; name a file, or leave the setting out")
    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            content = file.read(_LONGEST + 2)
    except (OSError, ValueError, RuntimeError) as error:  # not UTF-8, not a possible path, or no such home folder
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise ValueError(f"{str(path)!r} cannot be read: {reason}") from None  # pydantic takes only UTF-8
    try:
        return checked_key(content.removesuffix("\n"))
    except ValueError as error:
        raise ValueError(f"the key in {str(path)!r}: {error}") from None
