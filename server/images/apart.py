"""Decoder processes, started on demand. Images take turns by the memory that they need."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from server.errors import TooLargeError, UndecodableError
from server.images.cost import Cost
from server.images.decoder import Job
from server.images.decoder_process import DecoderProcess
from server.images.preprocessing import Preprocessing
from server.images.turns import Turns

MOST_CPU_S = 10
"""Processor time for one image; 50 megapixels of lossless WebP take 2 s."""

_IDLE_S = 60.0


class Apart:
    """Decodes images in separate processes, each limited to its memory and `MOST_CPU_S`.

    Args:
        memory: Bytes for all images in progress.
        processes: Most processes.
        max_pixels: Largest width x height.
    """

    def __init__(self, memory: int, processes: int, max_pixels: int) -> None:
        self._memory, self._max_pixels = memory, max_pixels
        self._turns = Turns(memory, processes)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="apart")
        self._idle: list[DecoderProcess] = []
        self._busy: set[DecoderProcess] = set()
        self._ends_idle: asyncio.TimerHandle | None = None

    async def decode(self, encoded: bytes, preprocessing: Preprocessing, cost: Cost) -> bytes:
        """Decodes an image to rows of RGB bytes, like `decode`, when its turn comes. Cancelling stops it.

        Raises:
            TooLargeError: It takes more memory or time than is available.
            UndecodableError, UnsupportedError: See `decode`.
            UnavailableError: No process can be started.
        """
        if cost.least_memory > self._memory:
            raise TooLargeError(
                f"decoding the image takes {cost.least_memory >> 20} MiB of memory or more; "
                f"this server has {self._memory >> 20} MiB for it",
                max_memory=self._memory,
            )
        memory = min(cost.memory or self._memory, self._memory)
        async with self._turns.turn(memory):
            job = Job(len(encoded), preprocessing, self._max_pixels, memory, MOST_CPU_S)
            decoder = self._decoder()
            self._busy.add(decoder)
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, decoder.decode, job, encoded)
            except asyncio.CancelledError:
                decoder.kill()
                raise
            except UndecodableError as error:
                if memory < cost.memory:  # libraries report a lack of memory in other words
                    raise TooLargeError(
                        f"with {memory >> 20} MiB of memory, the most available, {error.message}",
                        max_memory=memory,
                    ) from error
                raise
            finally:
                self._busy.remove(decoder)
                self._keep(decoder)

    def _decoder(self) -> DecoderProcess:
        while self._idle:
            decoder = self._idle.pop()
            if decoder.is_usable:
                return decoder
            decoder.close()
        return DecoderProcess()

    def _keep(self, decoder: DecoderProcess) -> None:
        """Keeps a process for the next image, for a while."""
        if not decoder.is_usable:
            self._threads.submit(decoder.close)
            return
        self._idle.append(decoder)
        if self._ends_idle is not None:
            self._ends_idle.cancel()
        self._ends_idle = asyncio.get_running_loop().call_later(_IDLE_S, self._end_idle)

    def _end_idle(self) -> None:
        while self._idle:
            self._threads.submit(self._idle.pop().close)

    def close(self) -> None:
        """Ends all processes at once."""
        for decoder in self._busy:
            decoder.kill()
        if self._ends_idle is not None:
            self._ends_idle.cancel()
        self._end_idle()
