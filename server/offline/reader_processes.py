"""Reader processes, seen from the process that asks them: `server.offline.reader` is what runs in them."""

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
"""Files that a process reads in one go. Several read a batch together, and still messages are few."""

_PROGRAM = "from server.offline.reader import main; main()"
_answers: msgspec.msgpack.Decoder[Read | Refused] = msgspec.msgpack.Decoder(Read | Refused)


class ReaderProcesses:
    """Has processes read files, for a device that decodes JPEG. They begin to load at once.

    Args:
        preprocessing: Sizes that the model wants.
        max_pixels: Largest width x height.
        count: How many processes.

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
        """Begins to read a batch: parts of it, in order. One thread receives them in the order they were asked in."""
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
        """Ends the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        self._receiving.shutdown(cancel_futures=True)  # what it still waits for ends with the process
        for process in self._processes:
            process.wait()
            process.connection.close()


class _Process:
    """One reader process, and the connection to it."""

    def __init__(self, setup: Setup) -> None:
        self.connection, theirs = socket.socketpair()
        with contextlib.ExitStack() as unless_started, theirs:
            unless_started.callback(self.connection.close)
            # In a group of its own, so that Ctrl-C does not reach it while it loads.
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
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `receive` says what has happened
            send(self.connection, message)

    def follow(self, image: Following) -> JpegFile:
        """The file that follows a message."""
        content = receive_file(self.connection, image.size)
        if content is None:
            raise self.death()
        return JpegFile(content, image.width, image.height)

    def death(self) -> EngineError:
        """What is told of a process that has ended by itself."""
        return EngineError(f"a process that reads files has ended with status {self.wait()}")

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        """Its status, once it has ended."""
        return self._process.wait()
