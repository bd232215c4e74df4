"""A service that cannot start: it says why in a sentence and ends, and starts nothing again and again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.service import StartService

pytestmark = pytest.mark.slow


def test_an_http_process_that_cannot_start_ends_the_service(
    start_service: StartService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError('this FastAPI is broken')")  # the engine needs none
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    service = start_service("--http-workers", "2", wait=False, preloaded=False)
    assert service.process.wait() == 1
    service.reader.join()
    log = "".join(service.log)
    assert "an HTTP process cannot start: ImportError: this FastAPI is broken\n" in log
    assert "Traceback" not in log
    assert log.count(" is process ") == 3  # an engine and two HTTP processes, each once
