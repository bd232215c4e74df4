"""`tome-server` with child processes that are forked from a process with all imports done, such as torch.

    python -m tests.e2e.preloaded ADDRESS MODULE serve ...

runs a module, such as `server.cli`, as `python -m` does. Its supervisor starts engines and HTTP processes by the fork
server at ADDRESS, instead of new interpreters. They still get their arguments by pickle, and the environment, standard
output and standard error of the supervisor. Only the imports, which take most of a start, are done once for all tests.
"""

from __future__ import annotations

import functools
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver, reduction, resource_tracker
from multiprocessing.context import SpawnProcess
from multiprocessing.popen_forkserver import Popen
from typing import Any

MODULES = [
    *("safetensors.torch", "fastapi", "uvicorn", "httptools", "uvloop"),
    *("server.calibration.timing", "server.device.explainer", "server.device.preparing", "server.device.runner"),
    *("server.api.connection", "server.api.schemas", "server.api.terms"),
]
"""The modules to import, except those that make metrics, which each process shares with its own supervisor."""


@functools.cache
def _fork_server() -> Any:
    """The fork server of this process, which ends with it."""
    server: Any = forkserver.ForkServer()
    server.set_forkserver_preload(MODULES)
    server.ensure_running()
    return server


def address() -> str:
    """The address of this process's fork server."""
    return str(_fork_server()._forkserver_address)


class _Remote(forkserver.ForkServer):
    """The fork server of another process.

    Args:
        address: Its address.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self._forkserver_address = address
        self._forkserver_alive_fd = os.open(
            os.devnull, os.O_RDONLY
        )  # the process that started the server keeps it alive

    def ensure_running(self) -> None:
        resource_tracker.ensure_running()


class _Stream:
    """A file descriptor that is pickled as a duplicate for the new process.

    Args:
        fd: The descriptor.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _detached, (reduction.DupFd(self._fd),)


def _detached(fd: Any) -> int:
    return int(fd.detach())


def _popen(process: Any) -> Popen:
    """Starts a process by the fork server instead of a new interpreter."""
    target, args = process._target, process._args
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    process._target, process._args = _as_spawned, (dict(os.environ), mask, _Stream(1), _Stream(2), target, *args)
    try:
        return Popen(process)
    finally:
        process._target, process._args = target, args


def _as_spawned(
    environment: dict[str, str],
    mask: set[int],
    stdout: int,
    stderr: int,
    target: Callable[..., None],
    *args: Any,
) -> None:
    """Runs a target with the environment, signal mask and streams of the process that starts it."""
    os.environ.clear()
    os.environ.update(environment)
    for ours, theirs in ((1, stdout), (2, stderr)):
        os.dup2(theirs, ours)
        os.close(theirs)
    tempfile.tempdir = None
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    from server.calibration import timing  # here, because it imports torch

    timing.RUNS = 1  # no test needs an exact time of r=0
    target(*args)


def main(address: str, module: str, *arguments: str) -> None:
    """Runs the module with these arguments."""
    forkserver.connect_to_new_process = _Remote(address).connect_to_new_process
    SpawnProcess._Popen = staticmethod(_popen)  # type: ignore[assignment,method-assign]
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from tests.e2e import preloaded  # its functions can be pickled, unlike those of __main__

    preloaded.main(*sys.argv[1:])
