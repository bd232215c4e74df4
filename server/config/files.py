"""The files of a configuration: read as a whole without waiting, and replaced as a whole."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from pathlib import Path

from server.errors import InvalidError

MOST_BYTES = 1 << 20
"""The longest file that is read; Kubernetes' own limit for a ConfigMap."""


def read_file(path: Path) -> tuple[os.stat_result, bytes]:
    """The status and the content of a regular file.

    Raises:
        InvalidError: It is a folder, a pipe, which would be waited for, or another thing; or it is too long.
        OSError: It cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidError("it is no regular file")
        content = b""
        while len(content) <= MOST_BYTES and (more := os.read(descriptor, MOST_BYTES)):
            content += more
    finally:
        os.close(descriptor)
    if len(content) > MOST_BYTES:
        raise InvalidError(f"it is longer than {MOST_BYTES} bytes")
    return status, content


def replace_file(path: Path, text: str) -> None:
    """Writes a file as a whole: a start after a crash sees the old one or the new one, whoever else writes it.

    Its time is later than that of the one it replaces, by a nanosecond at least: a file system counts ticks of
    milliseconds, and may give the inode of the last but one.

    Raises:
        OSError: It cannot be written; the old one is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.new")
    try:
        with unfinished.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        replaced_ns = path.stat().st_mtime_ns if path.exists() else 0
        now_ns = max(time.time_ns(), replaced_ns + 1)
        os.utime(unfinished, ns=(now_ns, now_ns))
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Brings a new name to the disk. Not every file system can, and the new file is in force in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
