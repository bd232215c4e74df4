"""Common to all processes of the service: logging, a pulse, SIGINT left to the supervisor, and an end with it."""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from typing import NoReturn, TextIO

from server.log_format import Format, arrange
from server.log_stream import log_stream
from server.repeats import CountingHandler
from server.unnamed import SharedNumbers

_BEAT_S = 0.5
_OBJECTS_A_COLLECTION = 20_000


class Pulse:
    """Shows the supervisor that a process's event loop turns: the loop increments a count in shared memory."""

    def __init__(self) -> None:
        self._count = SharedNumbers("Q", [0])

    @property
    def count(self) -> int:
        """Beats since the process started; 0 while it is still loading."""
        return self._count[0]

    def reset(self) -> None:
        """Forgets the beats of a process that has ended."""
        self._count[0] = 0

    async def beat(self) -> None:
        """Beats until it is cancelled."""
        while True:
            self._count[0] += 1
            await asyncio.sleep(_BEAT_S)


def configure_logging(level: str, form: Format = "text") -> TextIO:
    """Logs one line an event to standard error, with the name of the process. Repeated lines are counted.

    Returns:
        The stream of the log. A write to it never blocks.
    """
    stream = log_stream()
    handler = CountingHandler(stream)
    arrange(handler, form)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    return stream


def take_turns_quickly() -> None:
    """Lets Python's threads switch ten times as often, because a thread that feeds a GPU waits for each turn."""
    sys.setswitchinterval(0.0005)


def spare_the_collector() -> None:
    """Excludes objects that live as long as the process from garbage collection, and makes collections rarer. Call it
    after loading.

    A request makes some dozens of objects, so the collector would walk all of torch every few thousand requests. That
    took two thirds of an engine's event loop.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # otherwise bindings such as Triton's report leaks at the end
    gc.set_threshold(_OBJECTS_A_COLLECTION)


def leave(status: int) -> NoReturn:
    """Ends this process at once, even if threads are busy: the compilation of a graph cannot be interrupted.

    Exit handlers run: logs are written, temporary folders removed.
    """
    atexit._run_exitfuncs()
    os._exit(status)


def end_with_parent() -> None:
    """In a child process: ignores SIGINT, which is the supervisor's (uvicorn handles it too), and ends when the
    supervisor does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
