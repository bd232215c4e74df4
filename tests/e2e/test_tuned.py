"""`tome-server serve` with tuned numbers: found in the state folder, refused when stale, as a user sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.client import Client
from server.device.models import load_model
from server.device.tuned_file import save
from server.model_spec import BUNDLED_NAME, ModelSpec
from tests.core.tuned_numbers import numbers
from tests.e2e.service import StartService

pytestmark = pytest.mark.slow


def test_tuned_numbers_are_found_and_served_and_stale_ones_are_not(
    start_service: StartService, tmp_path: Path, photo: bytes
) -> None:
    spec = ModelSpec.model_validate("bundled")
    loaded = load_model(spec)
    tuned = numbers(loaded.merged, (12, 14))
    file, _ = save(tuned, spec, loaded.weights, tmp_path / "state")
    service = start_service()
    with Client(service.url) as client:
        assert client.model(BUNDLED_NAME).tuned == ((12, 14),)
        plain, below, in_band = (client.classify(photo, r=r) for r in (0, 11, 13))
        assert [answer.tuned for answer in (plain, below, in_band)] == [False, False, True]
    service.stop()

    tuned._replace(weights={"float32": "ab" * 32}).save(file)
    service = start_service()
    with Client(service.url) as client:
        assert client.model(BUNDLED_NAME).tuned == ()
        again = [client.classify(photo, r=r) for r in (0, 11, 13)]
    assert [again[0].top_k, again[1].top_k] == [plain.top_k, below.top_k]
    assert not again[2].tuned and again[2].top_k != in_band.top_k
    service.stop()
    assert "ERROR" in "".join(service.log) and f"{file} is stale: made with other weights" in "".join(service.log)

    service = start_service("--tuned", str(file), wait=False)
    assert service.process.wait() == 2
    service.reader.join()
    assert f"model {BUNDLED_NAME}: {file} is stale: made with other weights" in "".join(service.log)
    assert "Traceback" not in "".join(service.log)
