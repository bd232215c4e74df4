"""The Python client against real processes and sockets, as the README shows it and when things break."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from server.client import Client, Retries, UnreachableError
from server.errors import TooLargeError
from tests.e2e.service import StartService

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_the_python_of_the_readme_runs(start_service: StartService, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text().partition("\n## In Python\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert "http://localhost:8000" in block
    service = start_service()
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(compile(block.replace("http://localhost:8000", service.url), "README.md", "exec"), names)
    found = [names["answer"], *names["pair"], *names["answers"]]
    assert len(found) == 1 + 2 + 16
    assert all(answer.label.startswith("beacon, lighthouse") for answer in found)
    assert names["changed"].r == 13
    with Client(service.url) as client:  # the example leaves the server as it found it
        assert client.models()[0].r == names["before"].r == 0


def test_a_client_sees_an_engine_through_its_restart_and_a_server_through_its_end(
    start_service: StartService, photo: bytes
) -> None:
    service = start_service("--max-body-bytes", "1000000")
    with Client(service.url, retries=Retries(count=10_000, budget_s=100)) as client:
        before = client.classify(photo, r=8)
        os.kill(service.pid_of("engine"), signal.SIGKILL)
        assert client.classify(photo, r=8).top_k == before.top_k
        with pytest.raises(TooLargeError):  # said while most of the body is still to come
            client.classify(bytes(64 << 20))
    assert service.stop() == 0
    with Client(service.url, retries=Retries(count=1)) as client, pytest.raises(UnreachableError, match=service.url):
        client.models()
