"""A reader process: reads files and parses their headers for a device that decodes JPEG.

It is a separate program, started as `python -c "from server.offline.reader import main; main()"`. It loads Pillow, but
neither torch nor HTTP. Threads cannot do this work: they share Python's lock with the threads that feed the GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from typing import TypeGuard

import msgspec
from msgspec import Struct

from server.errors import ServerError
from server.images.decoder import Refused
from server.images.image import Image, JpegFile, Pixels
from server.images.preprocessing import Preprocessing
from server.memory import give_large_blocks_back
from server.offline.reading import Reader

SEPARATOR = "\0"
"""Separates paths; no path contains it."""

_LENGTH = 8
_LARGE = 1 << 18
"""Bytes from which a file follows its message: msgspec would copy it while it holds Python's lock."""


class Setup(Struct, frozen=True, array_like=True):
    """The first message to a reader process.

    Attributes:
        preprocessing, max_pixels: As for `Reader`.
        processes: Number of reader processes, which share the memory for decoding.
    """

    preprocessing: Preprocessing
    max_pixels: int
    processes: int


class Following(Struct, frozen=True, array_like=True, gc=False, tag="following"):
    """A `JpegFile` whose `size` bytes follow the message."""

    size: int
    width: int
    height: int


class Read(Struct, frozen=True, array_like=True, gc=False, tag="read"):
    """The image of each file, or its error."""

    images: list[Pixels | JpegFile | Following | str]


def send(connection: socket.socket, message: bytes) -> None:
    """Writes a message after its length."""
    connection.sendall(len(message).to_bytes(_LENGTH, "big"))
    connection.sendall(message)


class Inbox:
    """Receives messages into one memory; each replaces the last."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray(1 << 16))

    def receive(self, connection: socket.socket) -> memoryview | None:
        """The next message; None if the other side is gone, even in the middle of a message."""
        if not _fill(self._memory[:_LENGTH], connection):
            return None
        size = int.from_bytes(self._memory[:_LENGTH], "big")
        if len(self._memory) < size:
            self._memory = memoryview(bytearray(size))
        message = self._memory[:size]
        return message if _fill(message, connection) else None


def receive_file(connection: socket.socket, size: int) -> bytes | None:
    """Reads `size` bytes; None if the other side is gone."""
    content = b""
    while len(content) < size:
        try:
            more = connection.recv(size - len(content), socket.MSG_WAITALL)
        except ConnectionResetError:
            return None
        if not more:
            return None
        content = content + more if content else more  # # normally all bytes at once; a signal may interrupt
    return content


def _fill(memory: memoryview, connection: socket.socket) -> bool:
    """Fills the memory, or returns False. It normally takes one system call, so Python's lock is taken once."""
    at = 0
    while at < len(memory):
        try:
            count = connection.recv_into(memory[at:], 0, socket.MSG_WAITALL)
        except ConnectionResetError:
            return False
        if count == 0:
            return False
        at += count
    return True


def main() -> None:
    """Reads the files that are requested through the socket of standard input, until that is closed."""
    # # Both signals may reach all processes of the command. The command ends this process when it is done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    give_large_blocks_back()
    with socket.socket(fileno=sys.stdin.fileno()) as connection, contextlib.suppress(BrokenPipeError):
        inbox = Inbox()
        if (packed := inbox.receive(connection)) is None:
            return
        setup = msgspec.msgpack.decode(packed, type=Setup)
        reader = Reader(setup.preprocessing, True, setup.max_pixels, setup.processes)
        while (paths := inbox.receive(connection)) is not None:
            _answer(connection, reader, os.fsdecode(bytes(paths)).split(SEPARATOR))


def _answer(connection: socket.socket, reader: Reader, files: list[str]) -> None:
    try:
        images = [reader.read(file) for file in files]
    except ServerError as error:
        send(connection, msgspec.msgpack.encode(Refused(error.code, error.message, error.details)))
        return
    told: list[Pixels | JpegFile | Following | str] = [
        Following(len(image.data), image.width, image.height) if _is_large(image) else image for image in images
    ]
    send(connection, msgspec.msgpack.encode(Read(told)))
    for image in images:
        if _is_large(image):
            connection.sendall(image.data)


def _is_large(image: Image | str) -> TypeGuard[JpegFile]:
    return isinstance(image, JpegFile) and len(image.data) >= _LARGE
