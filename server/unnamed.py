"""Unnamed files in memory. Processes share them, and no full disk or cleaned folder can remove them.

multiprocessing's own shared memory lies in /dev/shm, which may be full, read-only, or cleaned when a user logs out.
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
        descriptor: The descriptor of an existing file from another process; None makes a new, empty file.
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
        """The whole content."""
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def write(self, content: bytes) -> None:
        """Overwrites the beginning, in one call."""
        os.pwrite(self._descriptor, content, 0)

    def clear(self) -> None:
        """Empties the file. No process that still writes may have it mapped."""
        os.ftruncate(self._descriptor, 0)


Format = Literal["b", "i", "Q"]


class SharedNumbers:
    """A fixed number of integers that processes share. A child gets them as an argument.

    Args:
        format: Type code of `array`: "i" for a C int, "Q" for 64 bits unsigned, "b" for a byte.
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
        """All values."""
        return self._numbers.tolist()


def _opened(file: UnnamedFile, format: Format) -> SharedNumbers:
    numbers = SharedNumbers.__new__(SharedNumbers)
    numbers._open(file, format)
    return numbers


def _new() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tome-server")
    descriptor, path = tempfile.mkstemp()  # without memfd_create: a file whose name is removed at once
    os.unlink(path)
    return descriptor


def _received(passed: Any) -> UnnamedFile:
    return UnnamedFile(passed.detach())
