"""A file that is replaced as a whole: a reader sees the old file or the new one."""

from __future__ import annotations

from pathlib import Path


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file, or replaces it.

    Raises:
        OSError: It cannot be written; the old file is unchanged.
    """
    unfinished = file.with_name(f"{file.name}.new")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(file)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
