"""What is to be computed: the photos of a folder, or the files that a list names."""

from __future__ import annotations

import os
from pathlib import Path

from server.errors import SettingsError
from server.images.photos import photos_in


def files_of(source: str) -> list[str]:
    """Paths that open from the working directory, each once.

    Args:
        source: A folder, whose image files are taken with those of the folders below it, in the order of their paths;
            or a text file with a path a line, in its order. A relative path of a list is one from the working
            directory. Blank lines count for nothing.

    Raises:
        SettingsError: It is neither, or there are no files.
    """
    if os.path.isdir(source):
        files = [str(file) for file in photos_in(Path(source))]
        if not files:
            raise SettingsError(f"{source} holds no images")
        return files
    try:
        content = Path(source).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that can be none
        raise SettingsError(f"{source}: {getattr(error, 'strerror', None) or error}") from None
    if b"\0" in content:
        raise SettingsError(f"{source} is neither a folder nor a text file with a path a line")
    lines = (line.removesuffix("\r") for line in os.fsdecode(content).split("\n"))
    files = list(dict.fromkeys(line for line in lines if line.strip()))
    if not files:
        raise SettingsError(f"{source} names no files")
    return files
