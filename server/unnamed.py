"""Files without a name, in memory: what processes share that no full disk and no cleaner of folders can take away.

multiprocessing's own shared memory is made in /dev/shm, which may be full, read-only, or swept when a user logs out.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable
from multiprocessing.reduction import DupFd
from typing import Any, Literal


class UnnamedFile:
    """Bytes that a process and its children share. A child gets it as an argument of its `Process`.

    Args:
        descriptor: Of one that another process has made; None makes a new one, which is empty.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = _new() if descriptor is None else descriptor
        weakref.finalize(self, os.close, self._descriptor)

    def __reduce__(self) -> tuple[Callable[[Any], UnnamedFile], tuple[Any]]:
        return _received, (DupFd(self._descriptor),)

    def fileno(self) -> int:
        """Its descriptor in this process."""
        return self._descriptor

    def read(self) -> bytes:
        """All that it holds."""
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def write(self, content: bytes) -> None:
        """Overwrites its beginning, in one call."""
        os.pwrite(self._descriptor, content, 0)

    def clear(self) -> None:
        """Empties it. Nobody may have it mapped who still writes."""
        os.ftruncate(self._descriptor, 0)


Format = Literal["b", "i", "Q"]


class SharedNumbers:
    """So many integers that processes share. A child gets them as an argument.

    Args:
        format: Of `array`: "i" for a C int, "Q" for 64 bits without a sign, "b" for a byte.
        numbers: The first values.
    """

    def __init__(self, format: Format, numbers: Iterable[int]) -> None:
        file, content = UnnamedFile(), array(format, numbers).tobytes()
        file.write(content)
        self._open(file, format)

    def _open(self, file: UnnamedFile, format: Format) -> None:
        self._file, self._format = file, format
        self._numbers = memoryview(mmap.mmap(file.fileno(), 0)).cast(format)

    def __reduce__(self) -> tuple[Callable[[UnnamedFile, Format], SharedNumbers], tuple[UnnamedFile, Format]]:
        return _opened, (self._file, self._format)

    def __getitem__(self, index: int) -> int:
        return self._numbers[index]

    def __setitem__(self, index: int, number: int) -> None:
        self._numbers[index] = number

    def all(self) -> list[int]:
        """All at once."""
        return self._numbers.tolist()


def _opened(file: UnnamedFile, format: Format) -> SharedNumbers:
    numbers = SharedNumbers.__new__(SharedNumbers)
    numbers._open(file, format)
    return numbers


def _new() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tome-server")
    descriptor, path = tempfile.mkstemp()  # where the system has no such files, one whose name is removed at once
    os.unlink(path)
    return descriptor


def _received(passed: Any) -> UnnamedFile:
    return UnnamedFile(passed.detach())
