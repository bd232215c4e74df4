"""Files to images, in this process: read, and decoded unless the device does that."""

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
"""Files that a thread reads in one go: a task a file costs as much as reading a small one."""


class Reads(Protocol):
    """Threads or processes that read files."""

    def read(self, files: Sequence[str]) -> list[Future[list[Image | str]]]:
        """Begins to read a batch: parts of it, in order. Of each file the image, or what is wrong with it."""
        ...

    def close(self) -> None:
        """Ends them, and what they have begun."""
        ...


class Reader:
    """Reads files as the service reads uploads: what takes more memory than a photo is decoded in a process apart.

    Args:
        preprocessing: Of the model that the images are for.
        decodes_jpeg: Whether the device decodes JPEG files.
        max_pixels: Largest width x height.
        processes: That share the memory for decoding.
    """

    def __init__(self, preprocessing: Preprocessing, decodes_jpeg: bool, max_pixels: int, processes: int = 1) -> None:
        self._preprocessing, self._decodes_jpeg, self._max_pixels = preprocessing, decodes_jpeg, max_pixels
        self._decoders = Decoders(max_pixels, processes)
        self._loop = asyncio.new_event_loop()  # only decoding apart needs it
        self._thread = threading.Thread(target=self._loop.run_forever, name="decode apart", daemon=True)
        self._thread.start()

    def read(self, file: str) -> Image | str:
        """The image, or what is wrong with the file.

        Raises:
            UnavailableError: It is to be decoded apart, and no process can be started.
        """
        try:
            encoded = _content(file)
            return "it is not a file" if encoded is None else self._image(encoded)
        except OF_A_FILE as error:
            return error.message
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:  # a path that can be none
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
        """Ends the processes, and with them what they decode."""
        self._loop.call_soon_threadsafe(self._decoders.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class ReaderThreads:
    """Has threads read files.

    Args:
        reader: What each of them does.
        count: How many threads.
    """

    def __init__(self, reader: Reader, count: int) -> None:
        self._reader = reader
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="read")

    def read(self, files: Sequence[str]) -> list[Future[list[Image | str]]]:
        """As `Reads` says."""
        return [self._threads.submit(self._read, part) for part in parts(files, FILES_OF_A_THREAD)]

    def _read(self, files: Sequence[str]) -> list[Image | str]:
        return [self._reader.read(file) for file in files]

    def close(self) -> None:
        """As `Reads` says."""
        self._threads.shutdown(cancel_futures=True)
        self._reader.close()


def parts(files: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Files in parts of so many, and the rest."""
    return (files[start : start + size] for start in range(0, len(files), size))


def _content(file: str) -> bytes | None:
    """The bytes of a file; None of a folder, a device or a pipe, which nobody may ever write to."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with open(descriptor, "rb", buffering=0, closefd=False) as opened:
            return opened.readall()
    finally:
        os.close(descriptor)
