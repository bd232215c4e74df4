"""Keeps libtiff from writing to standard error.

For a broken fax it writes a line for each row, so one small file could fill a log. Pillow reports the error to the
client, but cannot silence the library. So the error handler is removed through libtiff's own function.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_library = re.compile(r"\s(/\S*/libtiff\S*)$", re.MULTILINE)


def silence() -> bool:
    """Takes the error handler from the libtiff that Pillow has loaded.

    Returns:
        Whether there is one; without it broken files write into the log.
    """
    try:
        found = _library.search(Path("/proc/self/maps").read_text())
        if found is None:
            return False
        set_handler = ctypes.CDLL(found[1]).TIFFSetErrorHandler
    except (OSError, AttributeError):  # no Linux; built into Pillow
        return False
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    set_handler(None)
    return True
