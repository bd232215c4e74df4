"""The service as users meet it: processes, sockets, signals, files."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server.model_spec import BUNDLED_NAME
from tests.e2e.service import Service, StartService

pytestmark = pytest.mark.slow

MODEL = f"/v1/models/{BUNDLED_NAME}"


def classify(service: Service, photo: bytes, **parameters: int) -> httpx.Response:
    """One POST on a connection of its own, so that any HTTP process may take it."""
    url = f"{service.url}/classify"
    return httpx.post(url, params=parameters, files={"image": ("photo.jpg", photo)}, timeout=60)


def test_the_bundled_model_answers_with_the_r_asked_for(shared_service: Service, photo: bytes) -> None:
    answer = classify(shared_service, photo, r=8).json()
    assert (answer["model"], answer["r"], answer["r_source"]) == (BUNDLED_NAME, 8, "request")
    assert answer["tokens"] == 257 - 12 * 8
    assert len(answer["results"][0]["top_k"]) == 5


def test_openvino_computes_where_it_is_installed(start_service: StartService, photo: bytes) -> None:
    pytest.importorskip("openvino", reason="the backend needs the package openvino")
    answers = []
    for _ in range(2):  # the second start finds what the first has compiled
        service = start_service("--backend", "openvino", "--precision", "fp32", "--r", "8", "--max-batch-size", "1")
        backend = httpx.get(service.url + MODEL).json()["backend"]
        assert (backend["name"], backend["precision"]) == ("openvino", "fp32")
        answers += [classify(service, photo, r=r).json() for r in (0, 8)]
        assert service.stop() == 0
    service = start_service()
    for by_openvino in answers:
        by_torch = classify(service, photo, r=by_openvino["r"]).json()
        first, second = (body["results"][0]["top_k"][0] for body in (by_openvino, by_torch))
        assert first["index"] == second["index"] and abs(first["score"] - second["score"]) < 1e-3


def test_auto_is_r_0_where_nothing_asks_for_more(start_service: StartService, photo: bytes) -> None:
    service = start_service("--r", "auto", "--min-agreement", "0.95")
    assert httpx.get(f"{service.url}/v1/models").json()["models"][0]["auto"]["min_agreement"] == 0.95
    body = classify(service, photo).json()
    assert (body["r"], body["r_source"], body["auto"]["reason"]) == (0, "deployment", "idle")
    assert classify(service, photo, r=8).json()["r"] == 8


def test_metrics_of_all_processes_add_up_whichever_answers(shared_service: Service, photo: bytes) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: classify(shared_service, photo, r=(3, 5)[i % 2]), range(30)))
    for _ in range(8):  # new connections: scrapes land on both processes
        samples = shared_service.metrics()
        for r in (3, 5):
            labels = f'{{model="{BUNDLED_NAME}",r="{r}"}}'
            assert samples[f"tome_images_total{labels}"] == 15
            assert samples[f"tome_batch_size_sum{labels}"] == 15
        assert samples['tome_engine_up{engine="0"}'] == 1


def test_answers_above_r_0_are_checked_against_r_0_and_no_metric_of_production_shows_it(
    start_service: StartService, photo: bytes
) -> None:
    service = start_service("--drift-sample", "1")
    for _ in range(3):
        classify(service, photo, r=8)
    labels = f'{{model="{BUNDLED_NAME}",r="8"}}'
    service.until(lambda: service.metrics().get(f"tome_drift_checked_total{labels}") == 3)
    samples = service.metrics()
    assert samples[f"tome_live_agreement{labels}"] == samples[f"tome_drift_agreed_total{labels}"] / 3
    assert samples[f"tome_drift{labels}"] == 0  # three are too few to tell
    assert f"tome_inference_duration_seconds_count{labels}" in samples
    assert f"tome_inference_duration_seconds_count{labels.replace('8', '0')}" not in samples


def test_a_port_in_use_is_said(shared_service: Service) -> None:
    port = shared_service.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "server.cli", "serve", "--port", port]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in second.stderr


def test_a_live_r_reaches_every_http_process_at_once_and_outlives_a_restart(
    start_service: StartService, photo: bytes
) -> None:
    service = start_service("--http-workers", "2")
    assert classify(service, photo).json()["r"] == 0
    version = httpx.patch(service.url + MODEL, json={"r": 13}).json()["config_version"]
    with ThreadPoolExecutor(8) as pool:
        answers = [response.json() for response in pool.map(lambda _: classify(service, photo), range(40))]
    assert {(a["r"], a["r_source"], a["config_version"]) for a in answers} == {(13, "deployment", version)}
    assert service.stop() == 0

    again = start_service("--http-workers", "2")
    assert httpx.get(again.url + MODEL).json()["r"] == 13
    answer = classify(again, photo).json()
    assert (answer["r"], answer["config_version"]) == (13, version)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_every_process_with_status_0(start_service: StartService, number: signal.Signals) -> None:
    service = start_service()
    children = [service.pid_of(name) for name in ("engine", "http-0")]
    service.process.send_signal(number)
    assert service.process.wait() == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_the_other_processes_end_when_the_supervisor_is_killed(start_service: StartService) -> None:
    service = start_service(preloaded=False)
    children = [os.pidfd_open(service.pid_of(name)) for name in ("engine", "http-0")]
    service.process.kill()
    for child in children:
        ended, _, _ = select.select([child], [], [], 60)  # a pidfd is readable once its process has ended
        assert ended == [child]
        os.close(child)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--r", "1000"), "each r must lie between 0 and 128"),
        (("--model", "resnet18,weights=random"), "cannot merge tokens in a ResNet"),
        (("--precision", "fp8", "--device", "cpu"), "in float8: there are no kernels for cpu"),
    ],
)
def test_what_the_engine_cannot_start_with_stops_the_service_with_a_message(
    start_service: StartService, flags: tuple[str, ...], message: str
) -> None:
    service = start_service(*flags, wait=False)
    assert service.process.wait() == 2
    service.reader.join()
    log = "".join(service.log)
    assert log.count(message) == 1 and message in log.splitlines(keepends=True)[-1]
    assert "Traceback" not in log
