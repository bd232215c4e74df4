"""The files for Kubernetes: valid to the letter, and right about the server that they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server import metrics
from server.api import health
from server.commands import serve
from server.config.watched import WatchedFile
from server.dial import AutoR, RSetting
from server.model_spec import BUNDLED_NAME
from server.settings import Settings
from server.settings_sources import PREFIX, load_settings

FOLDER = Path(__file__).parents[1] / "docker/kubernetes"
VERSIONS = ("1.30", "1.37")  # the first that knows `sleep` without a feature gate, and the latest
OWN_KINDS = ("Kustomization", "RayService")  # not Kubernetes' own: there is no schema of theirs here


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return document


FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
DEPLOYMENT = read("deployment.yaml")
POD = DEPLOYMENT["spec"]["template"]
CONTAINER = POD["spec"]["containers"][0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [name for name in FILES if read(name)["kind"] not in OWN_KINDS])
def test_fits_kubernetes_schema(name: str, version: str) -> None:
    kubernetes_validate.validate(read(name), version, strict=True)


def test_the_schema_refuses_what_is_unknown() -> None:
    wrong = read("deployment.yaml")
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("group", ["head", "workers"])
def test_pods_of_the_ray_cluster_fit_the_schema(group: str, version: str) -> None:
    cluster = read("rayservice.yaml")["spec"]["rayClusterConfig"]
    spec = cluster["headGroupSpec"] if group == "head" else cluster["workerGroupSpecs"][0]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group}, **spec["template"]}
    kubernetes_validate.validate(pod, version, strict=True)


def test_the_kustomization_names_every_file() -> None:
    assert {*read("kustomization.yaml")["resources"], "kustomization.yaml", "rayservice.yaml"} == set(FILES)


def test_selectors_find_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert read("service.yaml")["spec"]["selector"] == labels
    assert read("disruption.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert POD["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"] == labels


def test_ports_and_volumes_are_there() -> None:
    assert [port["containerPort"] for port in CONTAINER["ports"]] == [Settings.model_fields["port"].default]
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(CONTAINER["ports"][0]["containerPort"])
    assert read("service.yaml")["spec"]["ports"][0]["targetPort"] == CONTAINER["ports"][0]["name"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {
        volume["name"] for volume in POD["spec"]["volumes"]
    }


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probes_ask_what_the_server_answers(probe: str) -> None:
    paths = {getattr(route, "path", None) for route in health.router.routes}
    assert CONTAINER[probe]["httpGet"]["path"] in paths


def test_the_server_understands_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    command, *flags = CONTAINER["args"]
    assert command == "serve"
    said = {
        flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)
    }
    for variable in CONTAINER["env"]:
        monkeypatch.setenv(variable["name"], "2")
        assert variable["name"].removeprefix(PREFIX).lower() in serve.SETTINGS
    settings = load_settings(said)
    assert settings.threads == 2
    folder = next(mount for mount in CONTAINER["volumeMounts"] if mount["name"] == "config")
    assert Path(str(settings.shared_config)).parent == Path(folder["mountPath"]) and "subPath" not in folder


def test_the_live_configuration_is_one(tmp_path: Path) -> None:
    [(name, content)] = read("configmap.yaml")["data"].items()
    (tmp_path / name).write_text(content)
    start: dict[str, RSetting] = {spec.name: 0 for spec in load_settings({}).specs()}
    config = WatchedFile(start, str(tmp_path / name), None, lambda models: None)
    assert config.configuration.models[BUNDLED_NAME] == AutoR(min_agreement=0.95)


def test_the_autoscaler_reads_a_metric_of_ours() -> None:
    autoscaler = read("autoscaler.yaml")["spec"]
    assert autoscaler["scaleTargetRef"] == {key: DEPLOYMENT[key] for key in ("apiVersion", "kind")} | {
        "name": DEPLOYMENT["metadata"]["name"]
    }
    assert autoscaler["metrics"][0]["pods"]["metric"]["name"] == next(iter(metrics.IN_FLIGHT.collect())).name


def test_there_is_time_to_end() -> None:
    """The pause, then what the supervisor grants the HTTP processes, then the engine."""
    from server import supervisor

    pause_s = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause_s + 2 * supervisor._DRAIN_S <= POD["spec"]["terminationGracePeriodSeconds"]


def test_ray_takes_the_application_of_its_own_file() -> None:
    """The cluster differs, and how many replicas it begins with; what runs in it does not."""
    service = yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])
    own = yaml.safe_load((FOLDER.parent / "ray/serve.yaml").read_text())
    for config in (service, own):
        del config["applications"][0]["deployments"][0]["autoscaling_config"]["min_replicas"]
    assert service["applications"] == own["applications"]
