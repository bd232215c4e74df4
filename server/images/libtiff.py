"""Keeps libtiff from writing to standard error.

It writes a line for each row of a broken fax, so one small file could fill a log. Pillow reports the error to the
client, but cannot silence the library. So libtiff's own function removes the error handler.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_library = re.compile(r"\s(/\S*/libtiff\S*)$", re.MULTILINE)


def silence() -> bool:
    """Removes the error handler of the libtiff that Pillow has loaded.

    Returns:
        Whether that library was found; without it, broken files write to the log.
    """
    try:
        found = _library.search(Path("/proc/self/maps").read_text())
        if found is None:
            return False
        set_handler = ctypes.CDLL(found[1]).TIFFSetErrorHandler
    except (OSError, AttributeError):  # not Linux; built into Pillow
        return False
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    set_handler(None)
    return True
