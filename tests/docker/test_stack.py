"""Servers behind HAProxy under load: kills, new images and scaling cost no request."""

from __future__ import annotations

import io
import json
from collections import Counter

import httpx
import pytest
from PIL import Image

from tests.docker.cli import ROOT, command, docker, until
from tests.docker.conftest import Build
from tests.docker.container import kill_engine, log
from tests.docker.load import Load
from tests.docker.stack import Stack

pytestmark = pytest.mark.slow
OVERRIDES = ("gpu", "limits")


def test_requests_spread_evenly(stack: Stack, photo: bytes) -> None:
    with Load(stack.url(), photo) as load:
        load.until_answered_by(3)
        answers = Counter(answer.replica for answer in load.go_on(90))
    assert load.failures() == []
    assert len(answers) == 3 and min(answers.values()) >= 20, answers


def test_a_photo_larger_than_haproxys_buffer_passes(stack: Stack) -> None:
    with io.BytesIO() as file:
        Image.effect_noise((2000, 2000), 64).save(file, "PNG")
        photo = file.getvalue()
    assert len(photo) > 2 << 20
    assert httpx.post(f"{stack.url()}/classify", files={"image": photo}, timeout=60).status_code == 200


def test_a_killed_container_costs_no_request(stack: Stack, photo: bytes) -> None:
    with Load(stack.url(), photo) as load:
        load.until_answered_by(3)
        docker("kill", stack.servers()[0])
        load.until_answered_by(2)
        stack.scale(3)
        load.until_answered_by(3)
    assert load.failures() == []


def test_a_killed_engine_costs_no_request_and_comes_back(stack: Stack, photo: bytes) -> None:
    server = stack.servers()[0]
    with Load(stack.url(), photo) as load:
        load.until_answered_by(3)
        pid = kill_engine(server)
        load.until(lambda: "serving tome-vit-tiny-64" in log(server).partition(f"({pid}) ended")[2])
        load.until_answered_by(3)
    assert load.failures() == []


def test_a_rolling_update_costs_no_request(stack: Stack, photo: bytes, build: Build) -> None:
    next_image = build("next", "LABEL version=next")
    with Load(stack.url(), photo) as load:
        load.go_on(10)
        old = stack.servers()
        stack.roll(next_image)  # which the stack keeps
        load.until_answered_by(3)
    assert load.failures() == []
    assert not set(old) & set(stack.servers()) and len(stack.servers()) == 3
    images = {docker("inspect", "--format", "{{.Config.Image}}", server) for server in stack.servers()}
    assert images == {next_image}


def test_an_update_to_an_image_that_does_not_start_changes_nothing(stack: Stack, photo: bytes, build: Build) -> None:
    broken, before = build("broken", "ENV TOME_PORT=none"), stack.servers()
    image = stack.environment["TOME_IMAGE"]
    with Load(stack.url(), photo) as load:
        load.go_on(5)
        with pytest.raises(AssertionError, match="did not get ready"):
            stack.roll(broken)
    stack.environment["TOME_IMAGE"] = image
    assert load.failures() == []
    assert stack.compose("ps", "--all", "--quiet", "server").split() == before


def test_scaling_up_and_down_costs_no_request(stack: Stack, photo: bytes) -> None:
    with Load(stack.url(), photo) as load:
        for servers in (5, 2):
            stack.scale(servers)
            load.until_answered_by(servers)
    assert load.failures() == []
    stack.scale(3)


def test_a_new_r_reaches_every_replica_under_load(stack: Stack, photo: bytes) -> None:
    with Load(stack.url(), photo, r=None) as load:
        for r in (13, 4):
            assert set_r(stack, r) == 200
            load.until_answered_with(r, replicas=3)
    assert load.failures() == []


def test_without_redis_answers_go_on_and_changes_are_refused(stack: Stack, photo: bytes) -> None:
    with Load(stack.url(), photo, r=None) as load:
        assert set_r(stack, 7) == 200
        load.until_answered_with(7, replicas=3)
        stack.compose("stop", "redis")
        assert set_r(stack, 2) == 503
        assert {answer.r for answer in load.go_on(30)} == {"7"}
        stack.compose("start", "redis")
        load.until(lambda: set_r(stack, 11) == 200)
        load.until_answered_with(11, replicas=3)
    assert load.failures() == []


def set_r(stack: Stack, r: int) -> int:
    """Asks whichever replica comes next; gives the status."""
    return httpx.patch(f"{stack.url()}/v1/models/tome-vit-tiny-64", json={"r": r}, timeout=60).status_code


def test_prometheus_sees_every_replica_and_knows_the_dashboard(stack: Stack, photo: bytes) -> None:
    prometheus = stack.url("prometheus", 9090)

    def ask(expression: str) -> list[dict[str, object]]:
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        result: list[dict[str, object]] = answer["data"]["result"]
        return result

    dashboard = json.loads((ROOT / "docker/grafana/dashboards/tome-server.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    with Load(stack.url(), photo) as load:
        until(lambda: len(ask('up{job="tome-server"} == 1')) == 3, "three replicas in Prometheus")
        load.until(lambda: all(ask(expression.replace("$__rate_interval", "30s")) for expression in expressions))


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_fits(image: str, override: str) -> None:
    files = f"docker/compose.yaml:docker/compose.{override}.yaml"
    service = json.loads(
        command("docker", "compose", "config", "--format", "json", environment={"COMPOSE_FILE": files})
    )
    assert service["services"]["server"]["deploy"]["resources"]


def test_haproxy_reads_its_file_without_a_warning(stack: Stack) -> None:
    said = stack.compose("exec", "-T", "haproxy", "haproxy", "-c", "-V", "-f", "/usr/local/etc/haproxy/haproxy.cfg")
    assert "Configuration file is valid" in said and "Warnings" not in said
