"""Reader processes, from the side that calls them; `server.offline.reader` runs in them."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from server.errors import EngineError, ServerError
from server.images.decoder import Refused
from server.images.decoder_process import environment
from server.images.image import Image, JpegFile
from server.images.preprocessing import Preprocessing
from server.offline.reader import SEPARATOR, Following, Inbox, Read, Setup, receive_file, send
from server.offline.reading import parts

FILES_OF_A_PROCESS = 16
"""Files that a process reads in one go: several processes read a batch together, with few messages."""

_PROGRAM = "from server.offline.reader import main; main()"
_answers: msgspec.msgpack.Decoder[Read | Refused] = msgspec.msgpack.Decoder(Read | Refused)


class ReaderProcesses:
    """Reads files in processes, for a device that decodes JPEG. They start to load at once.

    Args:
        preprocessing: The model's preprocessing.
        max_pixels: Largest width x height.
        count: Number of processes.

    Raises:
        EngineError: They cannot be started.
    """

    def __init__(self, preprocessing: Preprocessing, max_pixels: int, count: int) -> None:
        self._processes: list[_Process] = []
        self._receiving = ThreadPoolExecutor(1, thread_name_prefix="receive")
        self._inbox = Inbox()
        try:
            for _ in range(count):
                self._processes.append(_Process(Setup(preprocessing, max_pixels, count)))
        except OSError as error:
            self.close()
            raise EngineError(f"a process that reads files cannot be started: {error.strerror or error}") from error
        self._turns = itertools.cycle(self._processes)

    def read(self, files: Sequence[str]) -> list[Future[list[Image | str]]]:
        """Starts to read a batch; returns its parts, in order. One thread receives them in the order of the
        requests.
        """
        read = []
        for part, process in zip(parts(files, FILES_OF_A_PROCESS), self._turns, strict=False):
            process.ask(part)
            read.append(self._receiving.submit(self._receive, process))
        return read

    def _receive(self, process: _Process) -> list[Image | str]:
        message = self._inbox.receive(process.connection)
        if message is None:
            raise process.death()
        answer = _answers.decode(message)
        if isinstance(answer, Refused):
            raise ServerError.of(answer.code, answer.message, None, answer.details)
        return [process.follow(image) if isinstance(image, Following) else image for image in answer.images]

    def close(self) -> None:
        """Ends the processes, even if they are busy."""
        for process in self._processes:
            process.kill()
        self._receiving.shutdown(cancel_futures=True)  # # a pending receive ends with its process
        for process in self._processes:
            process.wait()
            process.connection.close()


class _Process:
    """One reader process, and the connection to it."""

    def __init__(self, setup: Setup) -> None:
        self.connection, theirs = socket.socketpair()
        with contextlib.ExitStack() as unless_started, theirs:
            unless_started.callback(self.connection.close)
            # # Its own process group: Ctrl-C must not reach it while it loads.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment(),
                process_group=0,
            )
            unless_started.pop_all()
        self._send(msgspec.msgpack.encode(setup))

    def ask(self, files: Sequence[str]) -> None:
        self._send(os.fsencode(SEPARATOR.join(files)))

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # # `receive` raises the reason
            send(self.connection, message)

    def follow(self, image: Following) -> JpegFile:
        """The file that follows a message."""
        content = receive_file(self.connection, image.size)
        if content is None:
            raise self.death()
        return JpegFile(content, image.width, image.height)

    def death(self) -> EngineError:
        """The error for a process that has ended unexpectedly."""
        return EngineError(f"a process that reads files has ended with status {self.wait()}")

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        """Waits for its end; returns its status."""
        return self._process.wait()
