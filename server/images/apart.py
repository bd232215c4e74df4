"""Decoding apart: decoder processes, started when they are needed, that take turns by the memory that images need."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import msgspec

from server.errors import ServerError, TooLargeError, UnavailableError, UndecodableError
from server.images.cost import Cost
from server.images.decoder import READY, Decoded, Job, Refused, receive, send
from server.images.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

MOST_CPU_S = 10
"""Processor time for one image; 50 megapixels of lossless WebP take 2 s."""

_IDLE_S = 60.0
_PROGRAM = "from server.images.decoder import main; main()"


class Turns:
    """Memory and places that are shared, first come, first served. For one event loop.

    Args:
        memory: Bytes for all.
        places: The most at once.
    """

    def __init__(self, memory: int, places: int) -> None:
        self._memory, self._places = memory, places
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def turn(self, memory: int) -> AsyncIterator[None]:
        """Holds a place, and so much memory, of which there is as much in all."""
        await self._take(memory)
        try:
            yield
        finally:
            self._give_back(memory)

    async def _take(self, memory: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((memory, turn))
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting = deque(waiting for waiting in self._waiting if waiting[1] is not turn)
                self._next()  # it may have stood before smaller ones
            else:
                self._give_back(memory)  # it had come in the same moment
            raise

    def _give_back(self, memory: int) -> None:
        self._memory += memory
        self._places += 1
        self._next()

    def _next(self) -> None:
        while self._waiting and self._places and self._waiting[0][0] <= self._memory:
            memory, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._memory -= memory
                self._places -= 1
                turn.set_result(None)


class DecoderProcess:
    """One decoder process, started by the first image. `close` kills it if need be, and waits for its end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_spent = False
        self.close: Callable[[], object] = lambda: None

    @property
    def is_usable(self) -> bool:
        """Whether it can be asked again."""
        return not self._is_spent and self._process is not None and self._process.poll() is None

    def decode(self, job: Job, encoded: bytes) -> bytes:
        """Decodes an image; blocks, and is called from a thread.

        Raises:
            TooLargeError: It takes too much time or memory.
            UndecodableError: It cannot be decoded, or crashes the decoder.
            UnavailableError: There is no process to be had.
        """
        if self._process is None:
            self._process = _start()
            self.close = weakref.finalize(self, _end, self._process)
            if self._is_spent:
                self.kill()
            if _pipes(self._process)[1].read(len(READY)) != READY:
                logger.error("a decoder process ends at its start, with status %s", self._process.wait())
                raise UnavailableError("the decoder of large images does not start", retry_after_s=1)
        stdin, stdout = _pipes(self._process)
        try:
            send(stdin, job, encoded)
            packed = receive(stdout)
        except OSError:  # it has died
            packed = None
        if packed is None:
            raise _epitaph(self._process.wait(), job)
        answer = msgspec.msgpack.decode(packed, type=Decoded | Refused)
        if isinstance(answer, Refused):
            self._is_spent = answer.code == TooLargeError.code  # what it took may lie about in pieces
            raise ServerError.of(answer.code, answer.message, None, answer.details)
        return answer.data

    def kill(self) -> None:
        """Ends the process, whatever it does; may be called from any thread."""
        self._is_spent = True
        if self._process is not None:
            self._process.kill()


class Apart:
    """Decodes images in processes of their own, each within its memory and `MOST_CPU_S`.

    Args:
        memory: Bytes for all that are decoded at once.
        processes: The most of them.
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
        """Rows of RGB bytes, as of `decode`, once it is this image's turn. A caller who leaves stops it.

        Raises:
            TooLargeError: It takes more memory or time than there is for it.
            UndecodableError, UnsupportedError: As `decode`.
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
                if memory < cost.memory:  # libraries have other words for a lack of memory
                    raise TooLargeError(
                        f"with {memory >> 20} MiB of memory, all that there is for it, {error.message}",
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


def _start() -> subprocess.Popen[bytes]:
    # The same modules as here, and one arena of memory: each further one reserves 64 MiB of its address space.
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "MALLOC_ARENA_MAX": "1"}
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | paths,
        )
    except OSError as error:
        logger.error("no decoder process can be started: %s", error)
        raise UnavailableError("the decoder of large images cannot be started", retry_after_s=1) from error


def _epitaph(status: int, job: Job) -> ServerError:
    """What a client is told of a process's death by its image."""
    if status == -signal.SIGXCPU:
        return TooLargeError(
            f"decoding the image takes more than {job.cpu_s} s of processor time", max_decode_s=job.cpu_s
        )
    if status == -signal.SIGKILL:
        return TooLargeError("decoding the image takes more memory than there is")
    logger.warning("a decoder process crashed with status %d", status)
    return UndecodableError(f"the image cannot be decoded: the decoder crashed on it (status {status})")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in _pipes(process):
        with contextlib.suppress(OSError):  # what could not be written any more
            pipe.close()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout
