"""The decoders of an HTTP process: threads for photos, processes for all that is expensive or may be."""

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
    """The decoders of one HTTP process. Their memory and time are bounded, whatever clients send.

    A photo never waits for a large image. Large images take turns in the order in which they came.

    Args:
        max_pixels: Largest width x height.
        http_processes: That share the container's memory.
    """

    def __init__(self, max_pixels: int, http_processes: int = 1) -> None:
        threads = available_cpus()
        self.budget = Budget.of(available_bytes(), http_processes, threads)
        self._max_pixels = max_pixels
        # An executor, since its threads stay as few when callers leave; more of them would only hold more memory.
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._apart = Apart(self.budget.apart, min(threads, _MOST_PROCESSES), max_pixels)

    async def read(self, encoded: bytes, preprocessing: Preprocessing, decodes_jpeg: bool) -> Image:
        """What the engine is to get of an image file, as of `server.images.pillow.read`.

        Raises:
            UndecodableError, UnsupportedError: As `read`.
            TooLargeError: As `read`; or decoding takes more memory or time than there is for it.
            UnavailableError: It is to be decoded apart, and no process can be started.
        """
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(self._threads, self.read_here, encoded, preprocessing, decodes_jpeg)
        if isinstance(image, Cost):
            return await self.read_apart(encoded, preprocessing, image)
        return image

    async def read_apart(self, encoded: bytes, preprocessing: Preprocessing, cost: Cost) -> Pixels:
        """The image, decoded in a process of its own; raises what `read` raises."""
        return Pixels(await self._apart.decode(encoded, preprocessing, cost))

    def read_here(self, encoded: bytes, preprocessing: Preprocessing, decodes_jpeg: bool) -> Image | Cost:
        """The image, decoded in this thread; or the cost of decoding it, if that is too much for a thread."""
        cost = cost_of(encoded, preprocessing, self._max_pixels)
        if cost.is_plain and cost.memory <= self.budget.of_a_thread:
            return read(encoded, preprocessing, self._max_pixels, decodes_jpeg)
        return cost

    def close(self) -> None:
        """Ends the processes, and with them what they decode."""
        self._apart.close()
