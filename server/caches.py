"""Moves the caches of packages to the state folder, out of the user's home."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_FOLDERS = {"TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda", "MPLCONFIGDIR": "matplotlib"}


def keep_caches_in(state_dir: Path | None) -> None:
    """Sets the cache folders of Triton, CUDA and matplotlib, unless the user has set them.

    They read them from the environment, which child processes inherit, and create a folder at its first use. If no
    folder is available, the packages choose.

    Args:
        state_dir: The state folder; None uses a temporary folder, which is removed when this process ends.
    """
    if _FOLDERS.keys() <= os.environ.keys():
        return
    try:
        folder = _temporary_folder() if state_dir is None else state_dir.expanduser()
    except (OSError, RuntimeError):  # no folder for temporary files is writable, or the user has no home
        return  # not every command needs a cache; a command that needs the state folder reports the error
    for variable, name in _FOLDERS.items():
        os.environ.setdefault(variable, str(folder / name))


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tome-server-caches-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
