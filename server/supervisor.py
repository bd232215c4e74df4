"""`tome-server serve`: one engine per device and N HTTP processes on one port; restarts those that die or hang."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import multiprocessing.connection
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

from server.api.accept import Places
from server.errors import SettingsError
from server.ipc.door import Door
from server.lifetime import Pulse, configure_logging
from server.listening import address_of, listen, reserve, url_of
from server.settings import Settings
from server.shared_values import Sheet, join
from server.unnamed import UnnamedFile

logger = logging.getLogger(__name__)

_spawn = multiprocessing.get_context("spawn")
_RESTART_AFTER_S = 0.2
_SHORT_LIFE_S = 5.0
_LONGEST_PAUSE_S = 10.0
_DRAIN_S = 30.0
_SILENCE_S = 15.0
"""A process without a beat for this time hangs. It is long enough for a compiler that holds Python's lock."""


class Child:
    """One supervised process. `start()` starts or restarts it; the pause grows if it dies young.

    Args:
        name: Its name in the log.
        target: Its function, called with the arguments and a `Pulse`.
        args: Its arguments.
    """

    def __init__(self, name: str, target: Callable[..., None], *args: Any) -> None:
        self._pulse = Pulse()
        self._seen, self._silent_s = 0, 0.0
        self._name, self._target, self._args = name, target, (*args, self._pulse)
        self._started_at, self._pause_s = 0.0, 0.0
        self.process: SpawnProcess | None = None
        self.restart_at = 0.0

    def start(self) -> None:
        """Starts the process."""
        self._pulse.reset()
        self._silent_s = 0.0
        self.process = _spawn.Process(target=self._target, args=self._args, name=self._name)
        with _unreachable_for_the_terminal():
            self.process.start()
        self._started_at = time.monotonic()
        logger.info("%s is process %d", self._name, self.process.pid)

    def watch(self, passed_s: float) -> None:
        """Kills a process that is stopped or hangs. Before its first beat there is no limit: models load.

        Args:
            passed_s: Seconds since the last call. At most one second counts, because the whole service may have paused.
        """
        count = self._pulse.count
        self._silent_s = self._silent_s + min(passed_s, 1.0) if count and count == self._seen else 0.0
        self._seen = count
        if self.process is not None and self._silent_s > _SILENCE_S:
            logger.error(
                "process %s (%d) has not moved for %g s and is killed", self._name, self.process.pid, _SILENCE_S
            )
            self._silent_s = 0.0
            self.process.kill()

    def bury(self) -> int:
        """Records the process's death, plans the next start, and returns its exit status."""
        assert self.process is not None and self.process.pid is not None and self.process.exitcode is not None
        status, now = self.process.exitcode, time.monotonic()
        lived_long = now - self._started_at > _SHORT_LIFE_S
        self._pause_s = _RESTART_AFTER_S if lived_long else min(2 * self._pause_s + _RESTART_AFTER_S, _LONGEST_PAUSE_S)
        self.restart_at = now + self._pause_s
        logger.warning("process %s (%d) ended with status %d", self._name, self.process.pid, status)
        self.process = None
        return status

    def tell_to_end(self) -> None:
        """Asks the process to finish its work and end."""
        if self.process is not None:
            self.process.terminate()

    def kill(self) -> None:
        """Ends the process at once, even if it is busy."""
        if self.process is not None:
            self.process.kill()

    def end(self, ends_at: float) -> None:
        """Waits for the process until a moment of the monotonic clock, then kills it."""
        if self.process is None:
            return
        self.process.join(max(0.0, ends_at - time.monotonic()))
        if self.process.is_alive():
            logger.warning("process %s does not end and is killed", self._name)
            self.process.kill()
            self.process.join()
        self.process = None


def serve(settings: Settings) -> int:
    """Runs the service until SIGTERM or Ctrl-C.

    Returns:
        The exit status: 0 after a drain, 1 when the service cannot start or ends without a drain.

    Raises:
        SettingsError: The address cannot be listened on, or an engine refuses a setting at its first start.
    """
    configure_logging(settings.log_level, settings.log_format)
    with _unreachable_for_the_terminal():
        resource_tracker.ensure_running()  # a process of Python's own, which a closed terminal would end
    with listen(settings.host, settings.port) as listener, contextlib.ExitStack() as stack:
        settings = _with_grpc_port(settings, stack)
        doors = [stack.enter_context(contextlib.closing(Door())) for _ in settings.devices()]
        return _supervise(settings, listener, doors, _agreed_file(settings, stack))


def _with_grpc_port(settings: Settings, stack: contextlib.ExitStack) -> Settings:
    """Settings with gRPC's port, which is reserved for all HTTP processes; raises SettingsError."""
    if settings.grpc_port is None:
        return settings
    try:
        found = all(map(importlib.util.find_spec, ("grpc", "google.protobuf")))
    except ModuleNotFoundError:  # there is no package google
        found = False
    if not found:
        raise SettingsError("grpc_port needs the packages grpcio and protobuf: pip install 'tome-server[grpc]'")
    port = stack.enter_context(reserve(settings.host, settings.grpc_port)).getsockname()[1]
    logger.info("gRPC (Open Inference Protocol v2) on %s", address_of(settings.host, port))
    return settings.model_copy(update={"grpc_port": port})


def _agreed_file(settings: Settings, stack: contextlib.ExitStack) -> Path | None:
    """The file of the live configuration for several engines that keep no state; None if it is not needed."""
    if settings.state_file() is not None or len(settings.devices()) == 1:
        return None
    try:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tome-server-"))
    except OSError as error:
        raise SettingsError(
            f"several devices without --state-dir need a folder for temporary files: {error.strerror}; set TMPDIR"
        ) from None
    return Path(folder) / "config.json"


def _supervise(settings: Settings, listener: socket.socket, doors: Sequence[Door], agreed_file: Path | None) -> int:
    children: list[Child] = []
    told_to_end = _on_signals(children)
    devices = settings.devices()
    names = [f"engine-{index}" for index in range(len(devices))] if len(devices) > 1 else ["engine"]
    last_good, models, refused = UnnamedFile(), UnnamedFile(), UnnamedFile()
    sheets = [Sheet() for _ in range(len(devices) + settings.http_workers)]
    engines: dict[Child, UnnamedFile] = {}  # each with what holds something once it has ever been ready
    for index, (name, device, door) in enumerate(zip(names, devices, doors, strict=True)):
        ready, its_settings = UnnamedFile(), settings.model_copy(update={"device": device})
        kept = (last_good, models, ready, refused)
        child = Child(name, _run_engine, sheets, index, its_settings, door, agreed_file, *kept)
        engines[child] = ready
    places = Places(settings.http_workers)
    workers = {
        Child(f"http-{index}", _run_http, sheets, len(devices) + index, settings, listener, doors, places, index): index
        for index in range(settings.http_workers)
    }
    children += [*engines, *workers]
    url = url_of(listener)
    logger.info("%s; try: curl -F image=@photo.jpg '%s/classify?r=8'", url, url)
    status = 0
    try:
        for child in children:
            child.start()
        watched_at = time.monotonic()
        while not told_to_end:
            alive = [child.process.sentinel for child in children if child.process]
            multiprocessing.connection.wait(alive, timeout=0.2)
            passed_s = time.monotonic() - watched_at
            watched_at += passed_s
            for child, sheet in zip(children, sheets, strict=True):
                child.watch(passed_s)
                if child.process and not child.process.is_alive():
                    child.bury()
                    sheet.forget_gauges()
                    if child in engines:
                        has_been_ready = bool(engines[child].read())
                    else:
                        places.leave(workers[child])
                        has_been_ready = places.was_ever_open(workers[child])
                    if not has_been_ready and not told_to_end:
                        if not refused.read():
                            logger.error("the service ends: what has never been ready is not started again")
                        told_to_end.append(signal.SIGTERM)
                        status = 1
                elif child.process is None and time.monotonic() >= child.restart_at:
                    child.start()
    finally:
        logger.info("shutting down")
        listener.close()  # the HTTP processes have it too, and close it when they accept no more
        _end(list(workers), settings.drain_delay_s + _DRAIN_S)
        _end(list(engines), _DRAIN_S)  # after the HTTP processes: they answer what those still hold
    if status and (refusal := refused.read()):
        raise SettingsError(refusal.decode())
    return 1 if _is_hurried(told_to_end) else status


def _is_hurried(told_to_end: Sequence[int]) -> bool:
    """Whether Ctrl-C was pressed twice, which ends all waiting."""
    return told_to_end.count(signal.SIGINT) > 1


def _end(children: Sequence[Child], within_s: float) -> None:
    """Ends processes side by side."""
    ends_at = time.monotonic() + within_s
    for child in children:
        child.tell_to_end()
    for child in children:
        child.end(ends_at)


def _run_engine(sheets: Sequence[Sheet], sheet: int, *args: Any) -> None:
    """Runs an engine process; the other arguments are those of `engine_process.main`."""
    join(sheets, sheet)
    from server import engine_process  # imports torch: in the engine process alone

    engine_process.main(*args)


def _run_http(
    sheets: Sequence[Sheet],
    sheet: int,
    settings: Settings,
    listener: socket.socket,
    doors: Sequence[Door],
    places: Places,
    index: int,
    pulse: Pulse,
) -> None:
    configure_logging(settings.log_level, settings.log_format)
    try:
        join(sheets, sheet)
        from server.api import process  # imports FastAPI: in the HTTP processes alone

        process.main(settings, listener, doors, places, index, pulse)
    except Exception as error:
        if places.was_ever_open(index):
            raise
        logger.critical("an HTTP process cannot start: %s: %s", type(error).__name__, error)
        sys.exit(1)


@contextmanager
def _unreachable_for_the_terminal() -> Iterator[None]:
    """Processes that start inside get no signals of the terminal: only the supervisor ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_signals(children: Sequence[Child]) -> list[int]:
    """A list that receives the signal that ends the service; a second Ctrl-C ends its processes at once.

    The end of a terminal (SIGHUP) also ends it, unless it was started to outlive the terminal, as by nohup.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if _is_hurried(received):
            for child in children:
                child.kill()

    signal.signal(signal.SIGTERM, receive)
    signal.signal(signal.SIGINT, receive)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, receive)
    return received
