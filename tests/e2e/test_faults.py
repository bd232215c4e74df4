"""Faults inside the service: images, memory and processes that fail, and who is answered what (docs/faults.md)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.e2e.clients import classify, png, send
from tests.e2e.faults import Faulty
from tests.e2e.service import StartService

pytestmark = pytest.mark.slow

WHITE = png(255)
"""Makes the batch of a faulty engine raise."""
CANCELLED = 'tome_dropped_images_total{reason="cancelled"}'


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """One for all tests of this module: whatever they break must mend."""
    faulty = Faulty(tmp_path_factory.mktemp("faulty"))
    yield faulty
    assert faulty.service.stop() == 0


def test_clients_that_leave_while_queued_cost_no_computing(faulty: Faulty) -> None:
    with faulty.hold() as blocker:
        clients = [send(faulty.service, png(2 + index)) for index in range(16)]
        faulty.until_queued(17)
        for client in clients:
            client.close()
        faulty.service.until(lambda: faulty.service.metrics()["tome_in_flight_images"] == 1)
    assert blocker.result().status_code == 200
    assert classify(faulty.service, png(100)).status_code == 200
    assert faulty.batches() == [1, 1]  # the one before and the one after
    assert faulty.counted(CANCELLED) == 16
    gone = [
        name for name in faulty.service.metrics() if name.startswith("tome_requests_total") and 'code="499"' in name
    ]
    assert sum(faulty.counted(name) for name in gone) == 16


def test_an_image_that_makes_its_batch_raise_fails_alone(faulty: Faulty) -> None:
    engine = faulty.service.pid_of("engine")
    with ThreadPoolExecutor(8) as pool:
        with faulty.hold():
            mates = [pool.submit(classify, faulty.service, png(2 + index)) for index in range(7)]
            culprit = pool.submit(classify, faulty.service, WHITE)
            faulty.until_queued(9)
        assert {mate.result().status_code for mate in mates} == {200}
        error = culprit.result()
    assert error.status_code == 500 and error.json()["error"]["code"] == "engine_error"
    assert "a white image" in error.json()["error"]["message"]
    assert faulty.batches()[1] == 8 and len(faulty.batches()) <= 2 + 2 * 3
    assert httpx.get(f"{faulty.service.url}/readyz").status_code == 200
    assert faulty.service.pid_of("engine") == engine


def test_memory_that_runs_out_makes_batches_smaller(faulty: Faulty) -> None:
    engine = faulty.service.pid_of("engine")
    faulty.room(2)
    for sizes, times in (([8, 4, 2, 2, 2, 2], 2), ([2, 2, 2, 2], 0)):  # the second batch knows
        with ThreadPoolExecutor(8) as pool:
            with faulty.hold():
                photos = [pool.submit(classify, faulty.service, png(2 + index)) for index in range(8)]
                faulty.until_queued(9)
            assert {photo.result().status_code for photo in photos} == {200}
        assert faulty.batches() == [1, *sizes]
        assert faulty.counted("tome_out_of_memory_total") == times

    faulty.room(0)
    refused = classify(faulty.service, png(50))
    assert refused.status_code == 500 and refused.json()["error"]["code"] == "engine_error"
    faulty.room(None)
    assert classify(faulty.service, png(50)).status_code == 200
    assert faulty.service.pid_of("engine") == engine  # no crash, and so no crash loop


def test_a_killed_engine_is_503_at_once_and_comes_back(faulty: Faulty) -> None:
    service, engine = faulty.service, faulty.service.pid_of("engine")
    with ThreadPoolExecutor(8) as pool:
        with faulty.hold() as blocker:
            queued = [pool.submit(classify, service, png(2 + index)) for index in range(8)]
            faulty.until_queued(9)
            os.kill(engine, signal.SIGKILL)
            answers = [future.result() for future in (blocker, *queued)]
            assert httpx.get(f"{service.url}/livez").status_code == 200
            ready = httpx.get(f"{service.url}/readyz")  # the next engine cannot be ready: its device is held
            assert ready.status_code == 503 and int(ready.headers["retry-after"]) >= 1
            assert classify(service, png(100)).status_code == 503
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.json()["error"]["code"] for answer in answers} == {"unavailable"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    service.wait_until_ready()
    assert service.pid_of("engine") != engine
    assert classify(service, png(100)).status_code == 200
    assert faulty.counted("tome_engine_starts_total") == 1


def test_a_dead_http_process_is_replaced_and_the_engine_forgets_its_jobs(faulty: Faulty) -> None:
    service, worker = faulty.service, faulty.service.pid_of("http-0")
    with faulty.hold() as blocker:
        clients = [send(service, png(2 + index)) for index in range(8)]
        faulty.until_queued(9)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            blocker.result()
        for client in clients:
            client.close()
        service.until(lambda: faulty.counted(CANCELLED) == 8)
    assert service.pid_of("http-0") != worker
    assert classify(service, png(100)).status_code == 200
    assert faulty.batches() == [1, 1]
    assert service.metrics()["tome_in_flight_images"] == 0


def test_processes_that_stand_still_are_found_and_replaced(start_service: StartService) -> None:
    service = start_service("--http-workers", "2")
    stopped = {name: service.pid_of(name) for name in ("engine", "http-1")}
    os.kill(stopped["http-1"], signal.SIGSTOP)
    os.kill(stopped["engine"], signal.SIGSTOP)
    with ThreadPoolExecutor(8) as pool:
        answers = [future.result() for future in [pool.submit(classify, service, png(index)) for index in range(8)]]
    assert {answer.status_code for answer in answers} == {503}
    service.until(lambda: all(service.pid_of(name) != pid for name, pid in stopped.items()))
    service.wait_until_ready()
    assert classify(service, png(100)).status_code == 200
    assert sum("has not moved" in line for line in service.log) == 2
