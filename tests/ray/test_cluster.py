"""The service on Ray Serve: replicas on several nodes, one of which dies, and an r that reaches them all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import httpx
import pytest

from server.model_spec import BUNDLED_NAME
from tests.ray.conftest import RayService, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="these tests need the package ray[serve]"),
]

MODEL = f"/v1/models/{BUNDLED_NAME}"
AT_ONCE = 8


def classify(client: httpx.Client, photo: bytes, **parameters: Any) -> httpx.Response:
    return client.post("/classify", params=parameters, files={"image": ("photo.jpg", photo)})


@pytest.fixture
def client(ray_service: RayService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=ray_service.url, timeout=60) as client:
        yield client


@contextmanager
def load(client: httpx.Client, photo: bytes, attempts: int = 1) -> Iterator[list[httpx.Response | None]]:
    """Clients that ask without a pause until the block ends, and what each of their requests came to in the end."""
    answers: list[httpx.Response | None] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            answer = None
            for attempt in range(attempts):
                done.wait(0.2 * attempt)
                try:
                    answer = classify(client, photo)
                except httpx.TransportError:
                    continue
                if answer.status_code < 500:
                    break
            answers.append(answer)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        asking = [pool.submit(ask) for _ in range(AT_ONCE)]
        try:
            yield answers
        finally:
            done.set()
        for future in asking:
            future.result()


def deployed_r(client: httpx.Client, photo: bytes) -> set[int]:
    """The r of enough requests for every replica to be among those that answered."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda _: classify(client, photo), range(24)))
    return {answer.json()["r"] for answer in answers}


def test_requests_spread_over_the_nodes_and_the_metrics_of_all_replicas_are_rays(
    ray_service: RayService, client: httpx.Client, photo: bytes
) -> None:
    replicas = ray_service.replicas()
    assert len({replica["node_id"] for replica in replicas.values()}) == 2
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda _: classify(client, photo), range(60)))
    assert {answer.status_code for answer in answers} == {200}
    until(lambda: sum(ray_service.metrics("tome_images_total").values()) == 60)
    images = ray_service.metrics("tome_images_total")
    assert images.keys() == replicas.keys() and min(images.values()) > 0
    refused = client.get("/metrics")
    assert refused.status_code == 404 and "ray_tome_" in refused.json()["error"]["message"]


def test_batches_form_in_a_replica(ray_service: RayService, client: httpx.Client, photo: bytes) -> None:
    with load(client, photo) as answers:
        until(lambda: any(answer is not None and answer.json()["batch_size"] > 1 for answer in list(answers)))


def test_r_of_a_request_is_honoured_and_the_request_bears_one_id(client: httpx.Client, photo: bytes) -> None:
    answer = classify(client, photo, r=9)
    assert (answer.json()["r"], answer.json()["r_source"], answer.headers["x-r"]) == (9, "request", "9")
    assert len(answer.headers.get_list("x-request-id")) == 1
    refused = classify(client, photo, r=1000)
    assert refused.status_code == 422
    assert refused.json()["error"]["message"] == "r is 1000; each r must lie between 0 and 128 for this model"


def test_user_config_reaches_every_replica_without_a_restart_or_a_failure(
    ray_service: RayService, client: httpx.Client, photo: bytes
) -> None:
    before = ray_service.replicas()
    with load(client, photo) as answers:
        ray_service.deploy(user_config={"r": 13})
        until(lambda: deployed_r(client, photo) == {13}, ray_service.state)
        ray_service.wait_until_running()
    assert {answer is not None and answer.status_code for answer in answers} == {200}
    assert ray_service.replicas() == before
    patched = client.patch(MODEL, json={"r": 3})
    assert patched.status_code == 409 and "user_config" in patched.json()["error"]["message"]
    assert client.get(MODEL).json()["r"] == 13


def test_an_r_out_of_range_in_user_config_is_refused_and_the_old_one_goes_on(
    ray_service: RayService, client: httpx.Client, photo: bytes
) -> None:
    ray_service.deploy(user_config={"r": 11})
    until(lambda: deployed_r(client, photo) == {11}, ray_service.state)
    before = ray_service.replicas()
    ray_service.deploy(user_config={"r": 1000})
    until(lambda: list(ray_service.metrics("tome_config_refused").values()) == [1, 1], ray_service.state)
    assert ray_service.replicas() == before
    assert deployed_r(client, photo) == {11}
    ray_service.deploy(user_config={"r": 12})
    until(lambda: deployed_r(client, photo) == {12}, ray_service.state)
    until(lambda: list(ray_service.metrics("tome_config_refused").values()) == [0, 0], ray_service.state)
    assert ray_service.replicas() == before


def test_a_replica_that_is_taken_away_answers_what_it_has(
    ray_service: RayService, client: httpx.Client, photo: bytes
) -> None:
    with load(client, photo) as answers:
        until(lambda: len(answers) > 20)
        ray_service.deploy(num_replicas=1)
        ray_service.wait_until_running()
    assert {answer is not None and answer.status_code for answer in answers} == {200}
    ray_service.deploy(num_replicas=2)
    ray_service.wait_until_running()


def test_a_node_that_dies_under_load_loses_nothing_that_is_asked_again(
    ray_service: RayService, client: httpx.Client, photo: bytes
) -> None:
    ray_service.wait_until_running()
    killed = next(iter(ray_service.replicas().values()))
    with load(client, photo, attempts=10) as answers:
        until(lambda: len(answers) > 20)
        ray_service.tell("kill_node", killed["node_id"])
        ray_service.tell("add_node")
        until(lambda: killed["replica_id"] not in ray_service.replicas())
        ray_service.wait_until_running()
        seen = len(answers)
        until(lambda: len(answers) > seen + 20)
    assert {answer is not None and answer.status_code for answer in answers} == {200}
    assert len({replica["node_id"] for replica in ray_service.replicas().values()}) == 2
