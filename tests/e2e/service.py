"""`tome-server serve` as a process, and what a test wants to know of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import pytest

from tests.e2e.preloaded import address

START_TIMEOUT_S = 240.0

StartService = Callable[..., "Service"]


class Service:
    """One running `tome-server serve`, by torch unless flags say otherwise.

    Args:
        flags: Its settings.
        state_dir: Where it keeps its state.
        faults: A folder by which its engine can be broken; see `faulty.py`.
        environment: Further variables.
        hangup: What SIGHUP does to it before it says so itself, whatever these tests were started by.
        preloaded: Fork its processes from one that has done the imports; False starts interpreters, as users do.
    """

    def __init__(
        self,
        *flags: str,
        state_dir: Path,
        faults: Path | None = None,
        environment: Mapping[str, str] | None = None,
        hangup: signal.Handlers = signal.SIG_DFL,
        preloaded: bool = True,
    ) -> None:
        program = ["server.cli"] if faults is None else ["tests.e2e.faulty", str(faults)]
        if preloaded:
            program = ["tests.e2e.preloaded", address(), *program]
        command = [sys.executable, "-m", *program, "serve", "--port", "0", "--state-dir", str(state_dir)]
        command += ["--backend", "torch", "--threads", "1", *flags]  # starts soonest, whatever else runs
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TOME_")}
        variables = {**inherited, **(environment or {})}
        before = signal.signal(signal.SIGHUP, hangup)
        try:
            self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
        finally:
            signal.signal(signal.SIGHUP, before)
        self.log: list[str] = []
        self._address = threading.Event()
        self.url = ""
        self.reader = threading.Thread(target=self._read_log, daemon=True)
        self.reader.start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if not self.url and (found := re.search(r"http://127\.0\.0\.1:\d+", line)):
                self.url = found[0]
                self._address.set()

    def wait_until_ready(self) -> None:
        """Returns once /readyz says yes; fails with the log when it does not."""
        assert self._address.wait(START_TIMEOUT_S), "".join(self.log)
        self.until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200)

    def until(self, condition: Callable[[], bool]) -> None:
        """Polls a condition of the service; a refused connection counts as not yet."""
        ends = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < ends:
            assert self.process.poll() is None, "".join(self.log)
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass  # nobody listens yet
            time.sleep(0.02)
        pytest.fail("".join(self.log))

    def pid_of(self, name: str) -> int:
        """The process that now runs as `engine`, `http-0`, and so on; the supervisor logs each start."""
        started = re.findall(rf"{name} is process (\d+)", "".join(self.log))
        return int(started[-1])

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait()
        self.reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status
