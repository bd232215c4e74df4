"""The files to compute: those of a folder, a list or a command line."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from server.errors import SettingsError
from server.images.photos import photos_in


def images_of(paths: Iterable[str]) -> list[str]:
    """Files in the order of the command line; a folder stands for its image files, including subfolders.

    Raises:
        SettingsError: A path does not exist, or a folder holds no images.
    """
    files: list[str] = []
    for path in paths:
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            raise SettingsError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        files += _images_in(path) if is_folder else [path]
    return files


def files_of(source: str) -> list[str]:
    """Paths that open from the working directory, each once.

    Args:
        source: A folder, for its image files, including subfolders, sorted by path; or a text file with a path a
            line, in its order. Relative paths in a list start at the working directory. Blank lines are ignored.

    Raises:
        SettingsError: It is neither, or there are no files.
    """
    if os.path.isdir(source):
        return _images_in(source)
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


def _images_in(folder: str) -> list[str]:
    """The image files of a folder, including subfolders; raises SettingsError if there are none."""
    files = [str(file) for file in photos_in(Path(folder))]
    if not files:
        raise SettingsError(f"{folder} holds no images")
    return files
