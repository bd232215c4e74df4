"""The keys of the service: what one may look like, and the file that one is read from. No message here shows a key."""

from __future__ import annotations

from pathlib import Path

KEYS = ("api_key", "admin_key", "metrics_key")
"""The settings that hold a key. For each of them there is one that names a file, as in `api_key_file`."""

_LONGEST = 4096


def checked_key(key: object) -> str:
    """A key that every client can send in a header.

    Raises:
        ValueError: It is empty, or holds what a header cannot carry.
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
    """The key in a file that holds nothing else but a line break at its end.

    Raises:
        ValueError: The file cannot be read, or holds no key.
    """
    if not path or not isinstance(path, str | Path):
        raise ValueError("it is empty; name a file, or leave the setting out")
    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            content = file.read(_LONGEST + 2)
    except (OSError, ValueError, RuntimeError) as error:  # of no UTF-8, of a path that can be none, of no such home
        reason = error.strerror if isinstance(error, OSError) else "it is no text file"
        raise ValueError(f"{str(path)!r} cannot be read: {reason}") from None  # pydantic takes UTF-8 only
    try:
        return checked_key(content.removesuffix("\n"))
    except ValueError as error:
        raise ValueError(f"the key in {str(path)!r}: {error}") from None
