"""The image by itself: what is in it, and how a container of it lives and ends."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.docker.cli import docker, until
from tests.docker.container import Run, kill_engine, log
from tests.docker.load import Load

pytestmark = pytest.mark.slow


def test_holds_no_compiler_installer_or_test(image: str) -> None:
    look = """
import pathlib, shutil
print([name for name in ("gcc", "cc", "clang", "g++", "make") if shutil.which(name)])
print([str(path) for path in pathlib.Path("/opt").rglob("tests")])
print([str(path) for path in pathlib.Path("/opt").glob("*/lib/python*/site-packages/pip")])
print([str(path) for home in ("/root", "/var/lib/tome-server") for path in pathlib.Path(home, ".cache").glob("*")])
"""
    found = docker("run", "--rm", "--user", "root", "--entrypoint", "python", image, "-c", look)
    assert found.splitlines() == ["[]"] * 4


def test_answers_without_a_volume(run: Run, photo: bytes) -> None:
    container = run()
    container.wait_until_healthy()
    answer = httpx.post(f"{container.url}/classify?r=8", files={"image": photo}, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["results"][0]["top_k"][0]["label"].startswith("beacon")
    assert container.python("import os; print(os.getuid())") == "10001"


def test_runs_read_only_without_capabilities(run: Run, photo: bytes) -> None:
    container = run("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true")
    container.wait_until_healthy()
    assert httpx.post(f"{container.url}/classify", files={"image": photo}, timeout=60).status_code == 200


@pytest.fixture
def volume() -> Iterator[str]:
    name = docker("volume", "create")
    yield name
    docker("volume", "rm", name)


def test_live_r_outlives_the_container_in_a_volume(volume: str, run: Run) -> None:
    for r in (0, 13):
        container = run("--volume", f"{volume}:/var/lib/tome-server")
        container.wait_until_healthy()
        model = f"{container.url}/v1/models/tome-vit-tiny-64"
        assert httpx.get(model).json()["r"] == r
        assert httpx.patch(model, json={"r": 13}).status_code == 200
        container.stop()


def test_sigterm_ends_with_status_0_and_every_request_answered(run: Run, photo: bytes) -> None:
    container = run()
    container.wait_until_healthy()

    def classify(number: int) -> int:
        files = [("image", photo)] * 32
        return httpx.post(f"{container.url}/classify?r=0", files=files, timeout=60).status_code

    with ThreadPoolExecutor(4) as pool:
        statuses = pool.map(classify, range(4))
        until(lambda: container.metric("tome_in_flight_images") == 128, "four requests of 32 images in flight")
        container.stop()
        assert list(statuses) == [200] * 4
    assert container.state["ExitCode"] == 0, log(container.id)


def test_sigterm_ends_a_container_that_has_just_started(run: Run) -> None:
    container = run()
    container.stop()
    assert container.state["ExitCode"] in (0, 128 + signal.SIGTERM)  # listened already, or not yet


def test_an_engine_that_dies_is_started_again(run: Run, photo: bytes) -> None:
    container = run()
    container.wait_until_healthy()
    kill_engine(container.id)
    until(lambda: container.metric("tome_engine_starts_total") == 2, "the second engine")
    assert httpx.post(f"{container.url}/classify", files={"image": photo}, timeout=60).status_code == 200
    assert container.state["Running"]


def test_a_new_r_is_compiled_while_requests_for_it_are_answered(run: Run, photo: bytes) -> None:
    container = run("--env", "TOME_BACKEND=openvino")
    container.wait_until_healthy()
    with Load(container.url, photo, r=13, pause_s=0.05) as load:
        load.until(lambda: "at r=13 is compiled by OpenVINO" in log(container.id))
    assert load.failures() == []
    translated = "import pathlib; print(*pathlib.Path('/var/lib/tome-server/openvino').rglob('*.xml'))"
    assert container.python(translated) == ""  # the image ships what a first start would make


def test_stays_within_a_memory_limit_under_load(run: Run, photo: bytes) -> None:
    container = run("--memory", "1g", "--memory-swap", "1g")
    container.wait_until_healthy()
    with Load(container.url, photo, threads=8, pause_s=0) as load:
        load.go_on(200)
    assert load.failures() == []
    state = container.state
    assert state["Running"] and not state["OOMKilled"]
    assert container.metric("tome_engine_starts_total") == 1  # no process of it was ended for its memory either


def test_too_little_memory_ends_the_start(run: Run) -> None:
    container = run("--memory", "200m", "--memory-swap", "200m")
    until(lambda: not container.state["Running"], "the end of the container")
    assert container.state["ExitCode"] == 1, json.dumps(container.state)
