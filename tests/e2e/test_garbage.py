"""The configuration's source is spoilt and an engine dies, or the server is started again: the last good one serves."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from server.model_spec import BUNDLED_NAME
from tests.e2e.clients import classify
from tests.e2e.service import Service, StartService

pytestmark = pytest.mark.slow


def kill(service: Service, name: str) -> None:
    """Kills a process, and waits until there is another one that serves."""
    before = service.pid_of(name)
    os.kill(before, signal.SIGKILL)
    service.until(lambda: service.pid_of(name) != before)
    service.wait_until_ready()


def r_of(service: Service) -> object:
    return httpx.get(f"{service.url}/v1/config").json()["models"][BUNDLED_NAME]["r"]


def test_a_followed_file_that_is_spoilt_or_gone(start_service: StartService, tmp_path: Path, photo: bytes) -> None:
    file = tmp_path / "live.yaml"

    def put(r: int) -> None:
        file.with_suffix(".new").write_text(f"models: {{{BUNDLED_NAME}: {{r: {r}}}}}")
        file.with_suffix(".new").replace(file)

    put(5)
    service = start_service("--shared-config", str(file))
    assert r_of(service) == 5 and service.metrics()["tome_config_stale"] == 0
    put(999)
    service.until(lambda: service.metrics()["tome_config_stale"] == 1)
    kill(service, "engine")
    assert classify(service, photo).status_code == 200
    assert r_of(service) == 5 and service.metrics()["tome_config_stale"] == 1
    file.unlink()
    service.stop()
    service = start_service("--shared-config", str(file))
    assert r_of(service) == 5 and service.metrics()["tome_config_stale"] == 1
    put(6)
    service.until(lambda: r_of(service) == 6 and service.metrics()["tome_config_stale"] == 0)


def test_a_state_file_that_is_spoilt(start_service: StartService, tmp_path: Path, photo: bytes) -> None:
    service, file = start_service(), tmp_path / "state" / "config-0.json"
    assert httpx.patch(f"{service.url}/v1/models/{BUNDLED_NAME}", json={"r": 3}).status_code == 200
    file.write_bytes(os.urandom(100))
    assert classify(service, photo).status_code == 200
    assert service.metrics()["tome_config_stale"] == 1
    kill(service, "engine")
    assert r_of(service) == 3 and service.metrics()["tome_config_stale"] == 1
    service.stop()
    service = start_service()
    assert r_of(service) == 3 and service.metrics()["tome_config_stale"] == 1
    assert httpx.patch(f"{service.url}/v1/models/{BUNDLED_NAME}", json={"r": 4}).status_code == 200
    assert service.metrics()["tome_config_stale"] == 0


def test_no_file_is_needed_beside_the_state(start_service: StartService, tmp_path: Path, photo: bytes) -> None:
    """The folder of temporary files has a name that is too long for a socket, is empty, and goes; processes die."""
    folder = tmp_path / ("long" * 40) / ("name" * 40)
    folder.mkdir(parents=True)
    service = start_service(environment={"TMPDIR": str(folder)})
    assert not [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir()
    folder.rmdir()
    kill(service, "engine")
    kill(service, "http-0")
    assert classify(service, photo).status_code == 200
    assert service.metrics()["tome_engine_starts_total"] == 2  # counted over the death of who counted it
