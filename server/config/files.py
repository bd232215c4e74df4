"""The files of a configuration: read without blocking, and replaced as a whole."""

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
        InvalidError: It is too long, or no regular file (a read of a pipe would block).
        OSError: It cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidError("it is not a regular file")
        content = b""
        while len(content) <= MOST_BYTES and (more := os.read(descriptor, MOST_BYTES)):
            content += more
    finally:
        os.close(descriptor)
    if len(content) > MOST_BYTES:
        raise InvalidError(f"it is longer than {MOST_BYTES} bytes")
    return status, content


def replace_file(path: Path, text: str) -> None:
    """Writes a file as a whole. A start after a crash sees the old file or the new one, also with several writers.

    Its modification time is at least a nanosecond later than that of the file that it replaces. File systems count in
    ticks of milliseconds and may reuse an inode, so that the two files could look the same otherwise.

    Raises:
        OSError: It cannot be written; the old file is unchanged.
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
    """Writes a new name to disk. Some file systems cannot, but the new file is in force in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
