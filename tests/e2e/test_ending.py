"""The end of a service: a load balancer sees it coming, and what was accepted is answered."""

from __future__ import annotations

import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.clients import classify, png
from tests.e2e.service import StartService

pytestmark = pytest.mark.slow


def test_under_load_readyz_fails_first_and_no_request_is_lost(start_service: StartService) -> None:
    service = start_service("--http-workers", "2", "--drain-delay-s", "5")
    may_send = threading.Event()
    may_send.set()

    def client(number: int) -> list[httpx.Response]:
        """Sends one request after the other for as long as the balancer lets it."""
        answers = []
        with httpx.Client(base_url=service.url, timeout=60) as client:
            while may_send.is_set():
                answers.append(client.post("/classify", files={"image": png(number)}))
        return answers

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number) for number in range(8)]
        service.until(lambda: sum(v for k, v in service.metrics().items() if k.startswith("tome_images_total")) > 20)
        service.process.send_signal(signal.SIGTERM)
        service.until(lambda: httpx.get(f"{service.url}/readyz").status_code == 503)  # what a load balancer sees
        assert classify(service, png(100)).status_code == 200  # and meanwhile everything is served
        assert httpx.get(f"{service.url}/livez").status_code == 200
        service.until(lambda: httpx.get(f"{service.url}/livez").headers.get("connection") == "close")
        may_send.clear()  # nothing is sent any more; what is on its way must be answered
        answers = [answer for each in clients for answer in each.result()]
    assert {answer.status_code for answer in answers} == {200}
    assert service.process.wait() == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{service.url}/livez")


def test_a_service_that_compiles_a_graph_ends_when_it_is_told(start_service: StartService, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    service = start_service("--backend", "openvino", "--precision", "fp32", "--state-dir", str(tmp_path))
    (model,) = httpx.get(f"{service.url}/v1/models").json()["models"]
    service.until(lambda: httpx.get(f"{service.url}/v1/models/{model['name']}").json()["compiling"] is not None)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait() == 0
    service.reader.join()
    assert [line for line in service.log if re.search("is killed|Traceback|leaked", line)] == []


@pytest.mark.parametrize("told", [("supervisor",), ("engine", "http-0", "supervisor")], ids=["supervisor", "group"])
def test_what_was_accepted_is_answered_whoever_is_told_to_end(
    start_service: StartService, told: tuple[str, ...]
) -> None:
    service = start_service("--drain-delay-s", "5")
    pids = {"supervisor": service.process.pid} | {name: service.pid_of(name) for name in ("engine", "http-0")}
    with ThreadPoolExecutor(32) as pool:
        answers = [pool.submit(classify, service, png(index)) for index in range(32)]
        service.until(lambda: service.metrics()["tome_in_flight_images"] == 32 or all(a.done() for a in answers))
        for name in told:
            os.kill(pids[name], signal.SIGTERM)
        service.until(lambda: httpx.get(f"{service.url}/readyz").status_code == 503)
        assert classify(service, png(100)).status_code == 200  # a group's engine was told too
        assert {answer.result().status_code for answer in answers} == {200}
    assert service.process.wait() == 0
