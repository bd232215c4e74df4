"""`tome-server` whose child processes are forked from a process that has imported torch and everything else once.

    python -m tests.e2e.preloaded ADDRESS MODULE serve ...

runs a module, such as `server.cli`, as `python -m` does. Its supervisor starts the engines and HTTP processes by the
fork server at ADDRESS instead of new interpreters. They still get their arguments by pickle, and the environment and
standard error of the supervisor; only the imports, most of the time of a start, are done once for all tests.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver, reduction, resource_tracker
from multiprocessing.context import ForkServerProcess
from typing import Any

from server import supervisor

MODULES = ["tome_core", "timm", "safetensors.torch", "fastapi", "uvicorn", "httptools", "uvloop", "server.settings"]
"""All but what makes metrics, which each process shares with its own supervisor."""


@functools.cache
def address() -> str:
    """The address of this process's fork server, which ends with this process."""
    server: Any = forkserver.ForkServer()
    server.set_forkserver_preload(MODULES)
    server.ensure_running()
    kept.append(server)
    return str(server._forkserver_address)


kept: list[Any] = []


class _Remote(forkserver.ForkServer):
    """The fork server of another process.

    Args:
        address: Where it listens.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self._forkserver_address = address
        self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # it lives as long as the process that started it

    def ensure_running(self) -> None:
        resource_tracker.ensure_running()


class _Stderr:
    """Unpickled in the new process it is a duplicate of this process's standard error."""

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _detached, (reduction.DupFd(sys.__stderr__.fileno()),)  # type: ignore[union-attr]


def _detached(fd: Any) -> int:
    return int(fd.detach())


class _Context:
    """Stands in for the spawn context of the supervisor."""

    def Process(self, *, target: Callable[..., None], args: tuple[Any, ...], name: str) -> ForkServerProcess:
        args = (dict(os.environ), _Stderr(), target, *args)
        return multiprocessing.get_context("forkserver").Process(target=_as_spawned, args=args, name=name)


def _as_spawned(environment: dict[str, str], stderr: Any, target: Callable[..., None], *args: Any) -> None:
    """Runs a target with what a new interpreter inherits from the supervisor."""
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(stderr, 2)
    os.close(stderr)
    tempfile.tempdir = None
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    target(*args)


def main(address: str, module: str, *arguments: str) -> None:
    """Runs the module with these arguments."""
    forkserver.connect_to_new_process = _Remote(address).connect_to_new_process  # type: ignore[assignment]
    supervisor._spawn = _Context()  # type: ignore[assignment]
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from tests.e2e import preloaded  # whose functions can be pickled, unlike those of __main__

    preloaded.main(*sys.argv[1:])
