"""Starts and ends servers, one at a time, each on its own port."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving_parts.processes import named
from server.bench.client import BrokenError, Connections, Target
from server.bench.load import Request

START_S = 300.0
END_S = 20.0
ASK_AGAIN_S = 0.02


class NotStartedError(Exception):
    """A server ended before it answered, or did not answer in time; with the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        log: Its log file.
        ready_s: From its start until it was ready.
    """

    target: Target
    log: Path
    ready_s: float

    def processes(self, kind: str) -> dict[str, int]:
        """Processes of a kind ("engine" or "http") by name, from its log."""
        return {name: pid for name, pid in named(self.log.read_text()).items() if name.startswith(kind)}


@contextmanager
def running(
    command: Sequence[str],
    variables: Mapping[str, str],
    first: Request,
    headers: Mapping[str, str],
    ready: str | None = None,
    folder: Path | None = None,
) -> Iterator[Server]:
    """Runs a server on a free port until it has answered the first request; ends it with everything that it has
    started.

    Args:
        command: Its program; "{port}" in it stands for the port, which is also in the variable PEER_PORT.
        variables: Environment variables besides ours.
        first: Sent until it is answered with 200.
        headers: Sent with it.
        ready: Path that is requested first until it returns 200.
        folder: Folder for its log.

    Raises:
        NotStartedError: It ended, or took too long.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = Target(*free.getsockname())
    descriptor, name = tempfile.mkstemp(suffix=".log", dir=folder)
    log = Path(name)
    start = time.monotonic()
    process = subprocess.Popen(
        [part.replace("{port}", str(target.port)) for part in command],
        env={**os.environ, **variables, "PEER_PORT": str(target.port)},
        stdout=descriptor,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    os.close(descriptor)
    try:
        if ready is not None:
            _wait_until_ready(process, target, ready, log)
        ready_s = time.monotonic() - start
        asyncio.run(_wait_until_answered(process, target, first, headers, log))
        yield Server(target, log, ready_s if ready is not None else time.monotonic() - start)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # processes that it left behind
        process.wait()
        log.unlink()


def _wait_until_ready(process: subprocess.Popen[bytes], target: Target, path: str, log: Path) -> None:
    ends, said = time.monotonic() + START_S, "nothing"
    while process.poll() is None and time.monotonic() < ends:
        connection = http.client.HTTPConnection(target.host, target.port, timeout=START_S)
        try:
            connection.request("GET", path)
            status = connection.getresponse().status
            if status == 200:
                return
            said = f"status {status}"
        except (OSError, http.client.HTTPException) as error:
            said = str(error)
        finally:
            connection.close()
        time.sleep(ASK_AGAIN_S)
    raise NotStartedError(f"did not start ({said}): {last_words(log)}")


async def _wait_until_answered(
    process: subprocess.Popen[bytes], target: Target, first: Request, headers: Mapping[str, str], log: Path
) -> None:
    ends, said = time.monotonic() + START_S, "nothing"
    async with Connections(target, headers=headers) as client:
        while process.poll() is None and time.monotonic() < ends:
            try:
                answer = await client.post(first.path, first.body)
                if answer.status == 200:
                    return
                said = f"status {answer.status}"
            except BrokenError as error:
                said = str(error)
            await asyncio.sleep(0.2)
    raise NotStartedError(f"did not start ({said}): {last_words(log)}")


def last_words(log: Path) -> str:
    """The last lines of a log, joined."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])
