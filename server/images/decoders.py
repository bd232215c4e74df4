"""The decoders of an HTTP process: threads for photos, processes for everything that is or may be expensive."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from server.cpus import available_cpus
from server.images.apart import Apart
from server.images.cost import Budget, Cost, cost_of
from server.images.image import Image, Pixels
from server.images.pillow import read
from server.images.preprocessing import Preprocessing
from server.memory import available_bytes

_MOST_PROCESSES = 4


class Decoders:
    """The decoders of one HTTP process, with bounded memory and time for any input.

    A photo never waits for a large image. Large images take turns in order of arrival.

    Args:
        max_pixels: Largest width x height.
        http_processes: Number of HTTP processes that share the container's memory.
    """

    def __init__(self, max_pixels: int, http_processes: int = 1) -> None:
        threads = available_cpus()
        self.budget = Budget.of(available_bytes(), http_processes, threads)
        self._max_pixels = max_pixels
        # An executor keeps its number of threads when callers leave; more threads would hold more memory.
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._apart = Apart(self.budget.apart, min(threads, _MOST_PROCESSES), max_pixels)

    async def read(self, encoded: bytes, preprocessing: Preprocessing, decodes_jpeg: bool) -> Image:
        """The engine's input for an image file, as by `server.images.pillow.read`.

        Raises:
            UndecodableError, UnsupportedError: See `read`.
            TooLargeError: See `read`; or decoding takes more memory or time than is available.
            UnavailableError: It needs a separate process, and none can be started.
        """
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(self._threads, self.read_here, encoded, preprocessing, decodes_jpeg)
        if isinstance(image, Cost):
            return await self.read_apart(encoded, preprocessing, image)
        return image

    async def read_apart(self, encoded: bytes, preprocessing: Preprocessing, cost: Cost) -> Pixels:
        """Decodes the image in a separate process; raises the errors of `read`."""
        return Pixels(await self._apart.decode(encoded, preprocessing, cost))

    def read_here(self, encoded: bytes, preprocessing: Preprocessing, decodes_jpeg: bool) -> Image | Cost:
        """Decodes the image in this thread; returns its cost instead if that is too much for a thread."""
        cost = cost_of(encoded, preprocessing, self._max_pixels)
        if cost.is_plain and cost.memory <= self.budget.of_a_thread:
            return read(encoded, preprocessing, self._max_pixels, decodes_jpeg)
        return cost

    def close(self) -> None:
        """Ends the processes, and their work."""
        self._apart.close()
