"""Several devices: a process for each; batches go to them in turn."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from server.errors import EngineError, ServerError, SettingsError
from server.lifetime import end_with_parent
from server.offline.model import Answer, Ask, Computes
from server.settings import Settings

_MOST_UNDER_WAY = 6
"""Batches for each device: one more than `Computing` holds, so that it never waits for the next."""

_spawn = multiprocessing.get_context("spawn")


def open_devices(settings: Settings) -> Computes:
    """Loads the first model of the settings to their device, or to each of them.

    Raises:
        SettingsError: The model cannot be loaded, or its backend or decoder is not available.
        EngineError: A process has ended.
    """
    if len(settings.devices()) > 1:
        return Devices(settings)
    from server.offline.computing import Computing  # needs torch

    return Computing(settings)


class Devices:
    """Several devices, each with a process that loads the model; raises the errors of `open_devices`."""

    def __init__(self, settings: Settings) -> None:
        names = settings.devices()
        self._processes = [_Process(settings, device, len(names)) for device in names]
        try:
            self.served = [process.receive() for process in self._processes][0]
        except BaseException:
            self.close()
            raise

    def warm_up(self, ask: Ask) -> None:
        """Warms up all devices at the same time."""
        for process in self._processes:
            process.send(ask)
        for process in self._processes:
            process.receive()

    def answers(self, ask: Ask, batches: Iterable[Sequence[str]]) -> Generator[list[Answer], None, None]:
        """Yields the answers to each batch, in order. Devices take turns, so they should be equally fast."""
        under_way: deque[_Process] = deque()
        for files, process in zip(batches, itertools.cycle(self._processes), strict=False):
            process.send(files)
            under_way.append(process)
            if len(under_way) == _MOST_UNDER_WAY * len(self._processes):
                yield under_way.popleft().receive()
        for process in self._processes:
            process.send(None)
        while under_way:
            yield under_way.popleft().receive()

    def close(self) -> None:
        """Ends the processes, even if they are busy."""
        for process in self._processes:
            process.end()


class _Process:
    """The process of one device. It sends its model, receives the request, reports when it is warm, and then receives
    batches.
    """

    def __init__(self, settings: Settings, device: str, devices: int) -> None:
        self._device = device
        self._connection, theirs = _spawn.Pipe()
        of_one = settings.model_copy(update={"device": device})
        self._process = _spawn.Process(target=_work, args=(of_one, devices, theirs), name=device, daemon=True)
        self._process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # `receive` raises the reason
            self._connection.send(message)

    def receive(self) -> Any:
        """The process's next message; raises it if it is an error."""
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise EngineError(f"the process of {self._device} has ended with status {self._process.exitcode}") from None
        if isinstance(message, Exception):
            raise message
        return message

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _work(settings: Settings, devices: int, connection: Connection) -> None:
    """Computes batches until None arrives."""
    from server.offline.computing import Computing

    end_with_parent()
    batches: queue.SimpleQueue[Sequence[str] | None] = queue.SimpleQueue()

    def receive() -> None:
        """Takes batches from the connection at once, so that the parent, which sends them, never waits for this
        process.
        """
        while (files := connection.recv()) is not None:
            batches.put(files)
        batches.put(None)

    try:
        with contextlib.closing(Computing(settings, devices)) as computing:
            connection.send(computing.served)
            ask = connection.recv()
            computing.warm_up(ask)
            connection.send("warm")
            threading.Thread(target=receive, name="receive", daemon=True).start()
            for answers in computing.answers(ask, iter(batches.get, None)):
                connection.send(answers)
    except (SettingsError, ServerError) as error:
        connection.send(error)
