"""Real services for the tests to talk to, on free ports of the loopback."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.e2e.service import Service, StartService


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[StartService]:
    """Starts services of one state folder, which end with the test."""
    running: list[Service] = []

    def start(*flags: str, wait: bool = True, **options: Any) -> Service:
        service = Service(*flags, state_dir=tmp_path / "state", **options)
        running.append(service)
        if wait:
            service.wait_until_ready()
        return service

    yield start
    for service in running:
        service.stop()


@pytest.fixture(scope="module")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service of two HTTP processes, for all tests of a module that leave it as it was."""
    service = Service("--http-workers", "2", state_dir=tmp_path_factory.mktemp("state"))
    service.wait_until_ready()
    yield service
    assert service.stop() == 0


@pytest.fixture
def photo() -> bytes:
    """A small JPEG."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()
