"""A decoder process: decodes image files one after the other, under the kernel's limits of memory and time.

It is a separate program, started as `python -c "from server.images.decoder import main; main()"`. It imports Pillow,
but neither torch nor HTTP. It may be killed at any moment; only the present image is lost.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import threading
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec import Struct

from server.errors import ServerError, TooLargeError
from server.images.pillow import decode
from server.images.preprocessing import Preprocessing
from server.memory import give_large_blocks_back

READY = b"ready"
"""The first bytes that the process writes. If it dies later, an image is the cause."""

_SPARE = 32 << 20  # a thread's stack, and Python's own memory
_NICENESS = 5  # photos in the other processes come first


class Job(Struct, frozen=True, array_like=True):
    """An image to decode; its file follows.

    Attributes:
        size: Bytes of the file.
        preprocessing, max_pixels: Arguments of `decode`.
        memory: Most bytes for decoding.
        cpu_s: Most seconds of processor time.
    """

    size: int
    preprocessing: Preprocessing
    max_pixels: int
    memory: int
    cpu_s: int


class Decoded(Struct, frozen=True, array_like=True, tag="decoded"):
    """Rows of RGB bytes."""

    data: bytes


class Refused(Struct, frozen=True, array_like=True, tag="refused"):
    """A `ServerError`."""

    code: str
    message: str
    details: dict[str, Any]


def send(stream: IO[bytes], message: Struct, file: bytes = b"") -> None:
    """Writes a message, after its length, and a file."""
    packed = msgspec.msgpack.encode(message)
    stream.write(len(packed).to_bytes(4, "big"))
    stream.write(packed)
    stream.write(file)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """Reads a message; None if the other side is gone, also in the middle of a message."""
    header = stream.read(4)
    size = int.from_bytes(header, "big")
    packed = stream.read(size)
    return packed if len(header) == 4 and len(packed) == size else None


def main() -> None:
    """Decodes images from standard input until the other side is gone."""
    # Both signals may be sent to all processes of the service. The HTTP process first waits for the images in flight.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    _end_with_parent(jobs.fileno())
    _yield_to_others()
    give_large_blocks_back()
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):  # libraries write about each strange file
        os.dup2(silence, stream.fileno())
    answers.write(READY)
    answers.flush()
    while packed := receive(jobs):
        job = msgspec.msgpack.decode(packed, type=Job)
        _limit(job.memory + job.size, job.cpu_s)
        send(answers, _decoded(jobs.read(job.size), job))


def _decoded(encoded: bytes, job: Job) -> Decoded | Refused:
    try:
        return Decoded(decode(encoded, job.preprocessing, job.max_pixels))
    except ServerError as error:
        return Refused(error.code, error.message, error.details)
    except MemoryError:
        pass  # the traceback holds the image's memory until this block ends
    return Refused(
        TooLargeError.code,
        f"decoding the image takes more than the {job.memory >> 20} MiB of memory for it",
        {"max_memory": job.memory},
    )


def _limit(memory: int, cpu_s: int) -> None:
    """Limits memory and processor time from now on. The kernel kills a process that exceeds its time."""
    with contextlib.suppress(OSError, ValueError):  # not Linux, or a lower limit of the user
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory + _SPARE
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + cpu_s
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _yield_to_others() -> None:
    """Lets other processes compute first; if the container's memory runs out, the kernel kills this one first."""
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _end_with_parent(pipe: int) -> None:
    """Ends the process as soon as nobody holds the other end of a pipe, also in the middle of an image."""

    def watch() -> None:
        poll = select.poll()
        poll.register(pipe, 0)
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
