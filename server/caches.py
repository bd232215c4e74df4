"""Makes packages keep their caches in the state folder, and not in the user's home."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_FOLDERS = {"TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda", "MPLCONFIGDIR": "matplotlib"}


def keep_caches_in(state_dir: Path | None) -> None:
    """Sets the cache folders of Triton, CUDA and matplotlib, unless the user has set them.

    They read them from the environment, which child processes inherit, and create a folder when they first use it.
    Where no folder can be had, the packages choose.

    Args:
        state_dir: The state folder; None uses a temporary folder, which is removed when this process ends.
    """
    if _FOLDERS.keys() <= os.environ.keys():
        return
    try:
        folder = _temporary_folder() if state_dir is None else state_dir.expanduser()
    except (OSError, RuntimeError):  # no folder for temporary files can be written; this user has no home
        return  # not every command needs a cache, and one that needs the state folder says what is wrong
    for variable, name in _FOLDERS.items():
        os.environ.setdefault(variable, str(folder / name))


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tome-server-caches-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
