"""Several devices, an engine process each: who computes, one configuration for all, and one that dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server.model_spec import BUNDLED_NAME
from tests.e2e.clients import DEADLY, classify, png
from tests.e2e.faults import Faulty
from tests.e2e.service import Service, StartService

pytestmark = pytest.mark.slow

MODEL = f"/v1/models/{BUNDLED_NAME}"
TWO = ("--device", "cpu,cpu", "--threads", "1", "--drift-sample", "0")
ENGINES = ("engine-0", "engine-1")


def up(service: Service) -> list[float]:
    """Of each engine whether it is up."""
    samples = service.metrics()
    return [samples[f'tome_engine_up{{engine="{index}"}}'] for index in range(2)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """A service of two engines and one HTTP process, for tests that leave both engines up."""
    faulty = Faulty(tmp_path_factory.mktemp("pair"), *TWO)
    faulty.service.until(lambda: up(faulty.service) == [1, 1])
    yield faulty
    assert faulty.service.stop() == 0


def pids(service: Service) -> set[int]:
    return {service.pid_of(name) for name in ENGINES}


def test_while_one_engine_computes_the_other_does_too(pair: Faulty) -> None:
    with ThreadPoolExecutor(9) as pool:
        with pair.hold() as blocker:
            second = pool.submit(classify, pair.service, png(2))
            pair.service.until(lambda: pair.batches() == [1, 1])
            assert pair.computing() == pids(pair.service)
            others = [pool.submit(classify, pair.service, png(3 + index)) for index in range(8)]
            pair.until_queued(10)
        answers = [future.result() for future in (blocker, second, *others)]
    assert {answer.status_code for answer in answers} == {200}
    assert sum(pair.batches()) == 10


def test_after_a_change_of_r_every_answer_of_every_engine_has_it(pair: Faulty) -> None:
    service, versions = pair.service, []
    for r in (13, 4, 8):
        changed = httpx.patch(service.url + MODEL, json={"r": r})
        versions.append(changed.json()["config_version"])
        pair.mark()
        with ThreadPoolExecutor(8) as pool:
            answers = [response.json() for response in pool.map(lambda _: classify(service, png(2)), range(32))]
        assert {(a["r"], a["r_source"], a["config_version"]) for a in answers} == {(r, "deployment", versions[-1])}
        assert pair.computing() == pids(service)
        assert {httpx.get(service.url + MODEL).headers["etag"] for _ in range(6)} == {changed.headers["etag"]}
    assert versions == [versions[0], versions[0] + 1, versions[0] + 2]
    for _ in range(4):  # whichever engine is asked
        stale = httpx.patch(service.url + MODEL, json={"r": 0}, headers={"if-match": f'"{versions[0]}"'})
        assert stale.status_code == 409


def test_of_two_engines_one_is_killed_the_other_serves_on_and_it_comes_back(pair: Faulty) -> None:
    service = pair.service
    before = httpx.patch(service.url + MODEL, json={"r": 5}).json()["config_version"]
    victim, survivor = (service.pid_of(name) for name in ENGINES)
    with ThreadPoolExecutor(7) as pool:
        with pair.hold() as blocker:
            queued = [pool.submit(classify, service, png(2 + index)) for index in range(7)]
            pair.until_queued(8)
            os.kill(victim, signal.SIGKILL)
            service.until(lambda: up(service) == [0, 1])  # nor can it come back: its device is held
        answers = [future.result() for future in (blocker, *queued)]
    assert [answer.status_code for answer in answers] == [200] * 8  # what the victim held, the survivor answers

    pair.mark()
    assert httpx.get(f"{service.url}/readyz").status_code == 200
    assert [classify(service, png(2 + index)).status_code for index in range(20)] == [200] * 20
    assert survivor in pair.computing()
    service.until(lambda: up(service) == [1, 1])
    assert service.pid_of("engine-0") != victim and service.pid_of("engine-1") == survivor
    pair.mark()
    answers = [classify(service, png(2 + index)) for index in range(8)]
    assert pair.computing() == pids(service)
    assert {(answer.json()["r"], answer.json()["config_version"]) for answer in answers} == {(5, before)}


def test_an_image_that_ends_two_engines_is_refused_and_both_come_back(pair: Faulty) -> None:
    service = pair.service
    before = pids(service)
    refused = classify(service, DEADLY)
    assert refused.status_code == 500 and refused.json()["error"]["code"] == "engine_error"
    assert "two engines went down" in refused.json()["error"]["message"]
    service.until(lambda: not before & pids(service) and up(service) == [1, 1])
    pair.mark()
    assert [classify(service, png(2 + index)).status_code for index in range(8)] == [200] * 8
    assert pair.computing() == pids(service)


def test_without_a_state_folder_the_engines_agree_and_sigterm_answers_what_was_accepted(
    start_service: StartService,
) -> None:
    service = start_service(*TWO, "--state-dir", "none", "--http-workers", "2", "--drain-delay-s", "5")
    service.until(lambda: up(service) == [1, 1])
    version = httpx.patch(service.url + MODEL, json={"r": 13}).json()["config_version"]
    os.kill(service.pid_of("engine-1"), signal.SIGKILL)
    service.until(lambda: service.metrics()["tome_engine_starts_total"] == 3 and up(service) == [1, 1])
    with ThreadPoolExecutor(32) as pool:
        answers = [pool.submit(classify, service, png(index)) for index in range(32)]
        service.until(lambda: service.metrics()["tome_in_flight_images"] == 32 or all(a.done() for a in answers))
        children = [service.pid_of(name) for name in (*ENGINES, "http-0", "http-1")]
        service.process.send_signal(signal.SIGTERM)
        service.until(lambda: httpx.get(f"{service.url}/readyz").status_code == 503)
        bodies = [answer.result().json() for answer in answers]
    assert {(body["r"], body["config_version"]) for body in bodies} == {(13, version)}
    assert service.process.wait() == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_a_device_that_is_not_there_ends_the_start_with_its_name(start_service: StartService) -> None:
    service = start_service("--device", "cpu,abacus", wait=False)
    assert service.process.wait() == 2
    service.reader.join()
    assert "device 'abacus'" in "".join(service.log)
    assert "Traceback" not in "".join(service.log)
