"""Messages and checks of output files, shared by commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from server.errors import SettingsError


def tell(message: str) -> None:
    """Prints a message on standard error, apart from the answer."""
    print(message, file=sys.stderr, flush=True)


def check_place(flag: str, output: Path) -> None:
    """Refuses an output file that cannot be written because of its path.

    Args:
        flag: The flag of the file.
        output: The file to write.

    Raises:
        SettingsError: Its folder does not exist, or it is a folder itself.
    """
    # os.path, because the methods of Path raise an error where a name is too long.
    if not os.path.isdir(output.absolute().parent):
        raise SettingsError(f"{flag} is {output}: there is no folder {output.parent}")
    if os.path.isdir(output):
        raise SettingsError(f"{flag} is {output}, which is a folder; it must be a file")


def spare_others(output: Path, read: Callable[[Path], object], other: str) -> None:
    """Refuses to overwrite a file of another kind.

    Args:
        output: The file to write.
        read: Raises OSError or ValueError for a file of another kind.
        other: Names the fault of such a file, for the message.

    Raises:
        SettingsError: A file of another kind is there.
    """
    # os.path, because the methods of Path raise an error where a name is too long.
    if not os.path.exists(output):
        return
    try:
        if output.is_file():  # a pipe is not opened
            read(output)
            return
    except (OSError, ValueError):
        pass
    raise SettingsError(f"-o is {output}, which {other}; it is not overwritten")
