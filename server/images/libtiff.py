"""libtiff, told to keep to itself what it thinks of a file.

It writes to the process's standard error: of a broken fax a line for each row, so that one small file fills a log.
Pillow raises an error that the client gets, and has no way to silence the library; so it is asked for by its own name.
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
