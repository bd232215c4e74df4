"""What commands share that write a file and talk meanwhile."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from server.errors import SettingsError


def tell(message: str) -> None:
    """Says something apart from the answer."""
    print(message, file=sys.stderr, flush=True)


def check_place(flag: str, output: Path) -> None:
    """Refuses an output file that cannot be written because of its path.

    Args:
        flag: That names it.
        output: Where a file is to be written.

    Raises:
        SettingsError: It lies in no folder, or is a folder.
    """
    # os.path, because the methods of Path raise an error where a name is too long.
    if not os.path.isdir(output.absolute().parent):
        raise SettingsError(f"{flag} is {output}: there is no folder {output.parent}")
    if os.path.isdir(output):
        raise SettingsError(f"{flag} is {output}, which is a folder; it must be a file")


def spare_others(output: Path, read: Callable[[Path], object], other: str) -> None:
    """Refuses to overwrite what is not of the kind that is written.

    Args:
        output: Where a file is to be written.
        read: Raises OSError or ValueError for what is of another kind.
        other: What the message says of that.

    Raises:
        SettingsError: Something of another kind is there.
    """
    # os.path, for the methods of Path raise an error where a name is too long.
    if not os.path.exists(output):
        return
    try:
        if output.is_file():  # a pipe is not opened
            read(output)
            return
    except (OSError, ValueError):
        pass
    raise SettingsError(f"-o is {output}, which {other}; it is not overwritten")
