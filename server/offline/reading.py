"""Files to images in this process: read, and decoded unless the device decodes."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from server.errors import TooLargeError, UndecodableError, UnsupportedError
from server.images.cost import Cost
from server.images.decoders import Decoders
from server.images.image import Image
from server.images.pillow import as_it_came
from server.images.preprocessing import Preprocessing

OF_A_FILE = (UndecodableError, UnsupportedError, TooLargeError)

FILES_OF_A_THREAD = 4
"""Files that a thread reads in one go: a task for each file would cost as much as reading a small file."""


class Reads(Protocol):
    """Threads or processes that read files."""

    def read(self, files: Sequence[str]) -> list[Future[list[Image | str]]]:
        """Starts to read a batch; returns its parts, in order, with each file's image or error."""
        ...

    def close(self) -> None:
        """Ends the readers and their unfinished work."""
        ...


class Reader:
    """Reads files as the service reads uploads: images that take more memory than a photo are decoded in another
    process.

    Args:
        preprocessing: The model's preprocessing.
        decodes_jpeg: Whether the device decodes JPEG files.
        max_pixels: Largest width x height.
        processes: Number of processes that share the memory for decoding.
    """

    def __init__(self, preprocessing: Preprocessing, decodes_jpeg: bool, max_pixels: int, processes: int = 1) -> None:
        self._preprocessing, self._decodes_jpeg, self._max_pixels = preprocessing, decodes_jpeg, max_pixels
        self._decoders = Decoders(max_pixels, processes)
        self._loop = asyncio.new_event_loop()  # only for images that are decoded in another process
        self._thread = threading.Thread(target=self._loop.run_forever, name="decode apart", daemon=True)
        self._thread.start()

    def read(self, file: str) -> Image | str:
        """The image, or the file's error.

        Raises:
            UnavailableError: It needs another process to decode, and none can be started.
        """
        try:
            encoded = _content(file)
            return "it is not a file" if encoded is None else self._image(encoded)
        except OF_A_FILE as error:
            return error.message
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:  # not a valid path
            return str(error)
        except MemoryError:
            return "it does not fit into memory"

    def _image(self, encoded: bytes) -> Image:
        if self._decodes_jpeg and (file := as_it_came(encoded, self._preprocessing, self._max_pixels)):
            return file
        image = self._decoders.read_here(encoded, self._preprocessing, self._decodes_jpeg)
        if isinstance(image, Cost):
            apart = self._decoders.read_apart(encoded, self._preprocessing, image)
            return asyncio.run_coroutine_threadsafe(apart, self._loop).result()
        return image

    def close(self) -> None:
        """Ends the processes and their work."""
        self._loop.call_soon_threadsafe(self._decoders.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class ReaderThreads:
    """Reads files in threads.

    Args:
        reader: Reads one file.
        count: Number of threads.
    """

    def __init__(self, reader: Reader, count: int) -> None:
        self._reader = reader
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="read")

    def read(self, files: Sequence[str]) -> list[Future[list[Image | str]]]:
        """See `Reads`."""
        return [self._threads.submit(self._read, part) for part in parts(files, FILES_OF_A_THREAD)]

    def _read(self, files: Sequence[str]) -> list[Image | str]:
        return [self._reader.read(file) for file in files]

    def close(self) -> None:
        """See `Reads`."""
        self._threads.shutdown(cancel_futures=True)
        self._reader.close()


def parts(files: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Splits files into parts of `size`; the last one may be smaller."""
    return (files[start : start + size] for start in range(0, len(files), size))


def _content(file: str) -> bytes | None:
    """The bytes of a file; None for a folder, a device or a pipe, which may never give a byte."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with open(descriptor, "rb", buffering=0, closefd=False) as opened:
            return opened.readall()
    finally:
        os.close(descriptor)
