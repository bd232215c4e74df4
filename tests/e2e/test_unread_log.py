"""A server whose log nobody reads any more."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.e2e.service import START_TIMEOUT_S

PIPE_BYTES = 1 << 16


def test_a_log_that_is_not_read_and_then_closed_stops_no_answer_and_not_the_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--state-dir", str(tmp_path)]
    read_end, write_end = os.pipe()
    process = subprocess.Popen([*command, "--backend", "torch"], stderr=write_end)
    os.close(write_end)
    try:
        log = b""
        while (found := re.search(rb"http://127\.0\.0\.1:\d+", log)) is None:
            log += os.read(read_end, 1 << 16)
        with httpx.Client(base_url=found[0].decode()) as client:
            until_ready(client)
            for _ in range(1500):  # each has a line of the log
                assert client.get(f"/v1/models/{'x' * 100}").status_code == 404
            assert len(os.read(read_end, PIPE_BYTES)) > PIPE_BYTES // 2  # it was full
            os.close(read_end)
            for _ in range(500):
                assert client.get("/v1/models/none").status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()


def until_ready(client: httpx.Client) -> None:
    """Returns once the service is ready."""
    ends = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < ends:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise TimeoutError("the service does not become ready")
