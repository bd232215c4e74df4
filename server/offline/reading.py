"""Files to images, in the thread that asks: read, and decoded unless the device does that."""

from __future__ import annotations

import asyncio
import os
import stat
import threading

from server.errors import TooLargeError, UndecodableError, UnsupportedError
from server.images.cost import Cost
from server.images.decoders import Decoders
from server.images.image import Image
from server.images.pillow import as_it_came
from server.types import ModelInfo

OF_A_FILE = (UndecodableError, UnsupportedError, TooLargeError)


class Reader:
    """Reads files as the service reads uploads: what takes more memory than a photo is decoded in a process apart.

    Args:
        info: The model that the images are for.
        max_pixels: Largest width x height.
    """

    def __init__(self, info: ModelInfo, max_pixels: int) -> None:
        self._info, self._max_pixels = info, max_pixels
        self._decoders = Decoders(max_pixels)
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
        info = self._info
        if info.decodes_jpeg and (file := as_it_came(encoded, info.preprocessing, self._max_pixels)):
            return file
        image = self._decoders.read_here(encoded, info.preprocessing, info.decodes_jpeg)
        if isinstance(image, Cost):
            apart = self._decoders.read_apart(encoded, info.preprocessing, image)
            return asyncio.run_coroutine_threadsafe(apart, self._loop).result()
        return image

    def close(self) -> None:
        """Ends the processes, and with them what they decode."""
        self._loop.call_soon_threadsafe(self._decoders.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


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
