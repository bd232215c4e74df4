"""The files for KServe: valid, and right about the server that they start."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server import metrics, supervisor
from server.api import health
from server.dial import AutoR
from server.settings import Settings
from server.settings_sources import load_settings
from tests.test_kubernetes import VERSIONS

FOLDER = Path(__file__).parents[2] / "docker/kserve"
PROGRAM = Path(__file__).parent / "kserve_models.py"


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return document


RUNTIME = read("runtime.yaml")
CONTAINER = RUNTIME["spec"]["containers"][0]
SERVICES = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != "runtime.yaml")


def settings_of(service: dict[str, Any]) -> Settings:
    """What the server is told: the runtime's arguments with the service's name filled in, then those of the service."""
    command, *flags = CONTAINER["args"] + service["spec"]["predictor"]["model"].get("args", [])
    assert command == "serve"
    said = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    return load_settings(
        {
            name.replace("-", "_"): value.replace("{{.Name}}", service["metadata"]["name"])
            for name, value in said.items()
        }
    )


def problems(*documents: dict[str, Any]) -> list[str]:
    if importlib.util.find_spec("kserve") is None:
        pytest.skip("the package kserve, which has the schemas, is not installed")
    answer = subprocess.run(
        [sys.executable, PROGRAM], input=json.dumps(documents), capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    found: list[str] = json.loads(answer.stdout)
    return found


def test_fits_the_schemas_of_kserve() -> None:
    assert problems(RUNTIME, *map(read, SERVICES)) == []


def test_the_schemas_refuse_what_is_wrong() -> None:
    runtime, service = copy.deepcopy(RUNTIME), copy.deepcopy(read("grpc.yaml"))
    runtime["spec"]["containers"][0]["readynessProbe"] = {}
    runtime["spec"]["multiModel"] = "no"
    del service["spec"]["predictor"]["model"]["modelFormat"]["name"]
    service["spec"]["predictor"]["model"]["ports"][0]["containerPort"] = "9000"
    assert len(problems(runtime, service)) == 4


@pytest.mark.parametrize("version", VERSIONS)
def test_the_container_fits_kubernetes_schema(version: str) -> None:
    spec = {key: RUNTIME["spec"][key] for key in ("containers", "volumes")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "photos"}, "spec": spec}
    kubernetes_validate.validate(pod, version, strict=True)
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


def test_kserve_finds_the_container_and_its_port() -> None:
    """By the container's name; and by port 8080, for the runtime lists none."""
    settings = settings_of(read("rest.yaml"))
    assert CONTAINER["name"] == "kserve-container" and "ports" not in CONTAINER
    assert settings.port == 8080
    assert RUNTIME["spec"]["annotations"]["prometheus.kserve.io/port"] == str(settings.port)


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probes_ask_what_the_server_answers(probe: str) -> None:
    asked = CONTAINER[probe]["httpGet"]
    assert asked["port"] == settings_of(read("rest.yaml")).port
    assert asked["path"] in {getattr(route, "path", None) for route in health.router.routes}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_asks_for_what_the_runtime_has(name: str) -> None:
    service = read(name)
    model = service["spec"]["predictor"]["model"]
    assert model["modelFormat"]["name"] in {each["name"] for each in RUNTIME["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
    [spec] = settings_of(service).specs()
    assert (spec.name, spec.source) == (service["metadata"]["name"], "local-dir:/mnt/models")


def test_arguments_of_a_service_turn_the_dial() -> None:
    assert settings_of(read("rest.yaml")).specs()[0].r == AutoR(min_agreement=0.95)
    assert settings_of(read("grpc.yaml")).specs()[0].r == 8


def test_grpc_has_the_port_that_kserve_knows_by_its_name() -> None:
    service = read("grpc.yaml")
    [port] = service["spec"]["predictor"]["model"]["ports"]
    assert port["name"] == "h2c"
    assert port["containerPort"] == settings_of(service).grpc_port


@pytest.mark.parametrize("name", SERVICES)
def test_there_is_time_to_end(name: str) -> None:
    service = read(name)
    pause_s = settings_of(service).drain_delay_s
    assert pause_s > 0
    assert pause_s + 2 * supervisor._DRAIN_S <= service["spec"]["predictor"]["terminationGracePeriodSeconds"]


def test_kserve_scales_by_a_metric_of_ours() -> None:
    service = read("scaled.yaml")
    [metric] = service["spec"]["predictor"]["autoScaling"]["metrics"]
    name = next(iter(metrics.IN_FLIGHT.collect())).name
    assert metric["external"]["metric"]["query"].startswith(f"sum({name}{{")
