"""Models that come and go while a real service is asked: no request fails, all processes follow, a restart keeps it."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.model_spec import BUNDLED_NAME
from tests.e2e.clients import classify, png
from tests.e2e.faults import Faulty
from tests.e2e.service import Service, StartService
from tests.server.model_folders import random_vit

pytestmark = pytest.mark.slow

QUICK = ("--drift-sample", "0", "--deadline-s", "15")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cats` in two versions, whose images are of different sizes and whose classes are of different numbers."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "cats").mkdir()
    random_vit(folder / "cats/1", num_classes=5)
    random_vit(folder / "cats/2", num_classes=70, img_size=48)
    config = folder / "cats/2/config.json"
    config.write_text(config.read_text().replace("[3, 32, 32]", "[3, 48, 48]"))
    return folder


def change(service: Service, name: str, what: str, version: str | None = None, status: int = 200) -> httpx.Response:
    said = {"parameters": {"version": version}} if version is not None else {}
    response = httpx.post(f"{service.url}/v2/repository/models/{name}/{what}", json=said, timeout=60)
    assert response.status_code == status, response.text
    return response


def starts(service: Service) -> float:
    """How often an engine was ready to serve."""
    return service.metrics()["tome_engine_starts_total"]


def served(service: Service) -> dict[str, str]:
    """The version of every model that serves, as one of the HTTP processes says."""
    models = httpx.get(f"{service.url}/v1/models").json()["models"]
    return {model["name"]: model["version"] for model in models}


class Asking:
    """Clients that classify without a pause.

    Attributes:
        statuses: How often each status came.
        failures: What was said of the others than 200.
        classes: The highest class that was named.
    """

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.failures: list[str] = []
        self.classes = 0

    def note(self, response: httpx.Response) -> None:
        self.statuses[response.status_code] += 1
        if response.status_code != 200:
            self.failures.append(response.text)
            return
        (result,) = response.json()["results"]
        self.classes = max(self.classes, *(each["index"] for each in result["top_k"]))


@contextmanager
def asking(service: Service, name: str, clients: int = 3) -> Iterator[Asking]:
    """Has a model asked for as long as it is entered."""
    asked, ended = Asking(), threading.Event()

    def ask(number: int) -> None:
        url = f"{service.url}/classify"
        with httpx.Client(timeout=60) as client:
            while not ended.is_set():
                photo = {"image": ("photo.png", png(2 + number))}
                asked.note(client.post(url, params={"model": name, "r": number}, files=photo))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield asked
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_models_are_loaded_replaced_and_unloaded_under_load(start_service: StartService, repository: Path) -> None:
    service = start_service(*QUICK, "--http-workers", "2", "--model-repository", str(repository))
    with asking(service, BUNDLED_NAME) as other:
        change(service, "cats", "load", "1")
        for _ in range(8):  # whichever HTTP process is asked
            assert served(service) == {BUNDLED_NAME: "1", "cats": "1"}
        with asking(service, "cats") as cats:
            for version in ("2", "1", "2"):
                before = cats.statuses[200]
                service.until(lambda before=before: cats.statuses[200] > before + 5)  # type: ignore[misc]
                change(service, "cats", "load", version)
                assert served(service)["cats"] == version
            before = cats.statuses[200]
            service.until(lambda: cats.statuses[200] > before + 20)
        assert cats.failures == [] and 5 <= cats.classes < 70, "version 1 has classes 0 to 4"
        change(service, "cats", "unload")
        for _ in range(8):
            refused = classify(service, png(2))
            assert httpx.post(f"{service.url}/classify?model=cats", files={"image": png(2)}).status_code == 404
            assert refused.status_code == 200
        service.until(lambda: "cats, version 2, is freed" in "".join(service.log))
    assert other.failures == [] and other.statuses[200] > 20
    assert service.metrics()["tome_models_loaded"] == 1
    assert "Traceback" not in "".join(service.log)


def test_what_is_queued_for_a_model_that_is_unloaded_is_answered(tmp_path: Path, repository: Path) -> None:
    faulty = Faulty(tmp_path, *QUICK, "--model-repository", str(repository))
    service = faulty.service
    change(service, "cats", "load")
    url = f"{service.url}/classify"
    answers: list[int] = []

    def ask(number: int) -> None:
        files = {"image": ("a.png", png(2 + number))}
        answers.append(httpx.post(url, params={"model": "cats"}, files=files, timeout=60).status_code)

    waiting = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    with faulty.hold():
        for thread in waiting:
            thread.start()
        faulty.until_queued(7)
        change(service, "cats", "unload")
        assert httpx.post(url, params={"model": "cats"}, files={"image": png(2)}).status_code == 404
        assert "is freed" not in "".join(service.log)
    for thread in waiting:
        thread.join()
    assert answers == [200] * 6
    service.until(lambda: "cats, version 2, is freed" in "".join(service.log))
    assert service.stop() == 0


@pytest.mark.parametrize("state", [(), ("--state-dir", "none")], ids=["kept in a folder", "kept nowhere"])
def test_an_engine_that_is_killed_comes_back_with_the_same_models(
    start_service: StartService, repository: Path, state: tuple[str, ...]
) -> None:
    service = start_service(*QUICK, "--model-repository", str(repository), *state)
    change(service, "cats", "load", "1")
    assert httpx.patch(f"{service.url}/v1/models/cats", json={"r": 3}).status_code == 200
    change(service, BUNDLED_NAME, "unload")
    for count in (2, 3):
        os.kill(service.pid_of("engine"), signal.SIGKILL)
        service.until(lambda count=count: starts(service) == count)  # type: ignore[misc]
        service.until(lambda: httpx.get(f"{service.url}/readyz").status_code == 200)
        assert served(service) == {"cats": "1"}
        answer = classify(service, png(2)).json()
        assert (answer["model"], answer["r"]) == ("cats", 3)


def test_a_server_that_starts_again_serves_what_it_served(start_service: StartService, repository: Path) -> None:
    flags = (*QUICK, "--model-repository", str(repository))
    service = start_service(*flags)
    change(service, "cats", "load", "1")
    change(service, BUNDLED_NAME, "unload")
    assert service.stop() == 0
    service = start_service(*flags)
    assert served(service) == {"cats": "1"}
    change(service, BUNDLED_NAME, "load")
    change(service, "cats", "unload")
    assert service.stop() == 0
    assert served(start_service(*flags)) == {BUNDLED_NAME: "1"}


def test_several_engines_have_the_same_models_and_one_that_comes_back_takes_them_over(
    start_service: StartService, repository: Path
) -> None:
    two = ("--device", "cpu,cpu", "--threads", "1", "--http-workers", "2", "--state-dir", "none")
    service = start_service(*QUICK, *two, "--model-repository", str(repository))

    def are_up() -> bool:
        samples = service.metrics()
        return all(samples[f'tome_engine_up{{engine="{index}"}}'] == 1 for index in range(2))

    service.until(are_up)
    change(service, "cats", "load", "1")
    os.kill(service.pid_of("engine-1"), signal.SIGKILL)
    with asking(service, "cats") as cats:
        change(service, "cats", "load", "2")  # which the engine that starts learns of when it is there
        service.until(lambda: starts(service) == 3)
        service.until(lambda: "".join(service.log).count("cats, version 2, is loaded") >= 1)
        before = cats.statuses[200]
        service.until(lambda: cats.statuses[200] > before + 20)
    assert cats.failures == []
    service.until(are_up)  # as every HTTP process sees it
    os.kill(service.pid_of("engine-0"), signal.SIGKILL)  # the other one has it, too
    service.until(lambda: served(service) == {BUNDLED_NAME: "1", "cats": "2"})
    assert httpx.post(f"{service.url}/classify?model=cats", files={"image": png(2)}, timeout=60).status_code == 200


def test_a_load_that_fails_says_why_and_changes_nothing(start_service: StartService, repository: Path) -> None:
    service = start_service(*QUICK, "--model-repository", str(repository), "--admin-key", "secret")
    change(service, "cats", "load", status=403)
    url = f"{service.url}/v2/repository/models"
    key = {"x-api-key": "secret"}
    for name, said, status, message in [
        ("cats", {"parameters": {"version": "3"}}, 422, "has no version '3'; it has: 1, 2"),
        ("dogs", {}, 404, "there is no model 'dogs' to load"),
        ("..%2Fcats", {}, 404, ""),
    ]:
        response = httpx.post(f"{url}/{name}/load", json=said, headers=key)
        assert response.status_code == status and message in response.text
    assert served(service) == {BUNDLED_NAME: "1"}
