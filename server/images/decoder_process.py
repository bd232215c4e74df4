"""The parent's side of a decoder process; `server.images.decoder` runs in it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import IO

import msgspec

from server.errors import ServerError, TooLargeError, UnavailableError, UndecodableError
from server.images.decoder import READY, Decoded, Job, Refused, receive, send
from server.settings_sources import PREFIX

logger = logging.getLogger(__name__)

_PROGRAM = "from server.images.decoder import main; main()"


class DecoderProcess:
    """One decoder process, started by its first image. `close` kills it if necessary and waits for its end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_spent = False
        self.close: Callable[[], object] = lambda: None

    @property
    def is_usable(self) -> bool:
        """Whether it can decode another image."""
        return not self._is_spent and self._process is not None and self._process.poll() is None

    def decode(self, job: Job, encoded: bytes) -> bytes:
        """Decodes an image; blocks, so call it from a thread.

        Raises:
            TooLargeError: It takes too much time or memory.
            UndecodableError: It cannot be decoded, or crashes the decoder.
            UnavailableError: No process can be started.
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
            if answer.code == TooLargeError.code:
                self._is_spent = True  # its memory may be fragmented
            raise ServerError.of(answer.code, answer.message, None, answer.details)
        return answer.data

    def kill(self) -> None:
        """Ends the process at once; may be called from any thread."""
        self._is_spent = True
        if self._process is not None:
            self._process.kill()


def environment() -> dict[str, str]:
    """The environment of a Python process that reads foreign files: the same modules, and no settings, such as keys."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return inherited | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _start() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM],  # inherits only its pipes
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One arena of memory, because each further one reserves 64 MiB of address space.
            env=environment() | {"MALLOC_ARENA_MAX": "1"},
        )
    except OSError as error:
        logger.error("no decoder process can be started: %s", error)
        raise UnavailableError("the decoder of large images cannot be started", retry_after_s=1) from error


def _epitaph(status: int, job: Job) -> ServerError:
    """The error for a client whose image ended the process."""
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
        with contextlib.suppress(OSError):  # unwritten data
            pipe.close()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout
