"""The Helm chart: what it renders is valid, and right about the server that it starts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, get_args

import kubernetes_validate
import pytest
import yaml

import server
from server import metrics, supervisor
from server.api import health
from server.commands import serve
from server.config.watched import WatchedFile
from server.dial import AutoR, RSetting
from server.model_spec import BUNDLED_NAME
from server.settings import Protocol, Settings
from server.settings_sources import PREFIX, load_settings
from tests.kubernetes.custom import kept
from tests.test_kubernetes import VERSIONS

ROOT = Path(__file__).parents[2]
CHART = ROOT / "docker/helm/tome-server"
PROGRAM = Path(__file__).parent / "helm_chart.py"
NAME = "photos-tome-server"

EVERYTHING: dict[str, Any] = {
    "image": {"repository": "registry.example.org/tome-server", "tag": "1"},
    "imagePullSecrets": [{"name": "pull"}],
    "models": [
        {"name": "a", "source": "local-dir:/models/my photos, 2026", "tuned": "none", "live": {"r": [16, 14, 12]}},
        {"name": "b", "source": "vit_tiny_patch16_224", "weights": "/models/b.safetensors", "live": {"r": 8}},
        {"name": "c", "source": "bundled"},
    ],
    "settings": {"max_body_bytes": 33554432, "deadline_s": 2.5, "cors_origin": ["https://app.example.org"]},
    "protocols": ["oip", "kserve"],
    "grpc": {"enabled": True, "port": 9001},
    "keys": {"secret": "keys", "api": "api-key", "admin": "admin", "metrics": "metrics"},
    "gpu": {"count": 2},
    "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "20Gi"}},
    "autoscaling": {"type": "keda"},
    "persistence": {"models": {"create": True, "storageClassName": "nfs"}},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "podAnnotations": {"owner": "vision"},
    "extraEnv": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
}
ONE_WITH_STATE: dict[str, Any] = {
    "autoscaling": {"type": "none"},
    "replicaCount": 1,
    "persistence": {"state": {"create": True}, "models": {"existingClaim": "weights"}},
    "podDisruptionBudget": {"enabled": False},
}
DOCUMENTED: dict[str, Any] = yaml.safe_load(
    (ROOT / "docs/scale.md").read_text().split("### Helm")[1].split("```yaml")[1].split("```")[0]
)
RELEASES = {"default": {}, "everything": EVERYTHING, "one with state": ONE_WITH_STATE, "documented": DOCUMENTED}
each_release = pytest.mark.parametrize("values", RELEASES.values(), ids=RELEASES)


@cache
def _run(values: str) -> dict[str, Any]:
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("the package helm-python-sdk, which has Helm, is not installed")
    answer = subprocess.run([sys.executable, PROGRAM, CHART], input=values, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def run(values: dict[str, Any]) -> dict[str, Any]:
    return _run(json.dumps(values))


def render(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The documents of a release by kind and, of claims, name."""
    answer = run(values)
    assert "error" not in answer, answer["error"]
    documents = [
        document
        for name, content in answer["files"].items()
        if name.endswith(".yaml")
        for document in yaml.safe_load_all(content)
        if document is not None
    ]
    by_kind = {document["kind"]: document for document in documents}
    assert len(by_kind) == len(documents)
    return by_kind


def pod_of(release: dict[str, dict[str, Any]]) -> dict[str, Any]:
    pod: dict[str, Any] = release["Deployment"]["spec"]["template"]
    return pod


def container_of(release: dict[str, dict[str, Any]]) -> dict[str, Any]:
    [container] = pod_of(release)["spec"]["containers"]
    return dict(container)


def files_of(release: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the container finds of the ConfigMap, by path."""
    volumes = {volume["name"]: volume for volume in pod_of(release)["spec"]["volumes"]}
    return {
        f"{mount['mountPath']}/{item['path']}": release["ConfigMap"]["data"][item["key"]]
        for mount in container_of(release)["volumeMounts"]
        for item in volumes[mount["name"]].get("configMap", {}).get("items", [])
    }


def settings_of(release: dict[str, dict[str, Any]], folder: Path) -> Settings:
    """What the server reads where the folder holds the keys that a Secret would."""
    [path] = [each["value"] for each in container_of(release)["env"] if each["name"] == "TOME_CONFIG"]
    (folder / "settings.yaml").write_text(files_of(release)[path].replace("/etc/tome/keys", str(folder)))
    for key in ("api-key", "admin", "metrics", "metrics-key"):
        (folder / key).write_text(f"secret-{key}\n")
    return load_settings({}, str(folder / "settings.yaml"))


@each_release
def test_helm_lint_finds_nothing(values: dict[str, Any]) -> None:
    assert run(values)["lint"] == []


@pytest.mark.parametrize("version", VERSIONS)
@each_release
def test_fits_kubernetes_schema(values: dict[str, Any], version: str) -> None:
    for document in render(values).values():
        if document["kind"] not in ("ScaledObject", "ServiceMonitor"):
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("kind", ["ScaledObject", "ServiceMonitor"])
def test_fits_the_schemas_of_other_kinds(kind: str) -> None:
    document = render(EVERYTHING)[kind]
    assert kept(document) == document


def test_makes_what_is_asked_for() -> None:
    usual = {"ConfigMap", "Deployment", "Service"}
    assert render({}).keys() == usual | {"HorizontalPodAutoscaler", "PodDisruptionBudget"}
    assert render(EVERYTHING).keys() == usual | {
        "PersistentVolumeClaim", "PodDisruptionBudget", "ScaledObject", "ServiceMonitor",
    }  # fmt: skip
    assert render(ONE_WITH_STATE).keys() == usual | {"PersistentVolumeClaim"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"image": {"tga": "1"}}, "tga"),
        ({"models": []}, "models"),
        ({"models": [{"source": "bundled"}]}, "name"),
        ({"models": [{"name": "a", "source": "bundled", "live": {"max_r": 3}}]}, "live"),
        ({"settings": {"port": 9000}}, "settings.port"),
        ({"settings": {"api_key": "open"}}, "settings.api_key"),
        ({"settings": {"max-batch-size": 64}}, "max-batch-size"),
        ({"keys": {"api": "api-key"}}, "/keys/api"),
        ({"gpu": {"count": -1}}, "/gpu/count"),
        ({"autoscaling": {"type": "cpu"}}, "/autoscaling/type"),
        ({"resources": {"requests": {"cpu": None}}}, "cpu"),
        ({"persistence": {"state": {"existingClaim": "mine"}}}, "replicaCount 1"),
    ],
)
def test_refuses_wrong_values_by_name(values: dict[str, Any], named: str) -> None:
    assert named in run(values)["error"]


@each_release
def test_the_server_understands_its_settings(values: dict[str, Any], tmp_path: Path) -> None:
    release = render(values)
    container = container_of(release)
    assert container["args"] == ["serve"]
    ours = [variable["name"] for variable in container["env"] if variable["name"].startswith(PREFIX)]
    assert {name.removeprefix(PREFIX).lower() for name in ours} <= {"config", *serve.SETTINGS}
    settings = settings_of(release, tmp_path)
    named = [model["name"] for model in values.get("models", [{"name": BUNDLED_NAME}])]
    assert [spec.name for spec in settings.specs()] == named


def test_settings_arrive_as_they_were_given(tmp_path: Path) -> None:
    settings = settings_of(render(EVERYTHING), tmp_path)
    first, second, _ = settings.specs()
    assert (first.source, first.tuned) == ("local-dir:/models/my photos, 2026", "none")
    assert second.weights == "/models/b.safetensors"
    assert (settings.max_body_bytes, settings.deadline_s) == (33554432, 2.5)
    assert settings.cors_origin == ("https://app.example.org",)
    assert settings.devices() == ("cuda:0", "cuda:1")
    assert (settings.api_key, settings.admin_key) == ("secret-api-key", "secret-admin")
    assert (settings.protocol, settings.grpc_port) == (("oip", "kserve"), 9001)


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, {BUNDLED_NAME: AutoR(min_agreement=0.95)}), (EVERYTHING, {"a": (16, 14, 12), "b": 8, "c": 0})],
    ids=["default", "everything"],
)
def test_the_live_configuration_is_one(values: dict[str, Any], expected: dict[str, RSetting], tmp_path: Path) -> None:
    """The server that has these models follows it, and a model without `live` keeps the deployment's r."""
    release = render(values)
    settings = settings_of(release, tmp_path)
    start: dict[str, RSetting] = {spec.name: 0 for spec in settings.specs()}
    path = tmp_path / "live.yaml"
    path.write_text(files_of(release)[str(settings.shared_config)])
    config = WatchedFile(start, str(path), None, lambda models: None)
    assert config.configuration.models == expected


def test_a_live_change_restarts_nothing() -> None:
    def checksum(values: dict[str, Any]) -> str:
        return str(pod_of(render(values))["metadata"]["annotations"]["checksum/settings"])

    model = {"name": BUNDLED_NAME, "source": "bundled"}
    auto, fixed = ({"models": [{**model, "live": {"r": r}}]} for r in ("auto", 8))
    assert checksum(auto) == checksum(fixed)
    assert checksum(auto) != checksum({**auto, "settings": {"max_batch_size": 64}})


def test_without_a_live_r_every_replica_has_its_own(tmp_path: Path) -> None:
    release = render({"models": [{"name": BUNDLED_NAME, "source": "bundled"}]})
    assert settings_of(release, tmp_path).shared_config is None
    assert len(files_of(release)) == 1


@each_release
def test_what_refers_to_something_finds_it(values: dict[str, Any]) -> None:
    release = render(values)
    pod, container = pod_of(release), container_of(release)
    labels = pod["metadata"]["labels"]
    assert release["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert release["Service"]["spec"]["selector"] == labels
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"] for port in release["Service"]["spec"]["ports"]} == ports.keys()
    assert ports["http"] == Settings.model_fields["port"].default
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    if claim := release.get("PersistentVolumeClaim"):
        volume = claim["metadata"]["name"].removeprefix(f"{NAME}-")
        assert volumes[volume]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        paths = {getattr(route, "path", None) for route in health.router.routes}
        assert container[probe]["httpGet"]["path"] in paths


def test_keys_are_mounted_where_the_settings_name_them() -> None:
    release = render(EVERYTHING)
    settings = yaml.safe_load(release["ConfigMap"]["data"]["settings.yaml"])
    [mount] = [mount for mount in container_of(release)["volumeMounts"] if mount["name"] == "keys"]
    for name, item in (("api", "api-key"), ("admin", "admin"), ("metrics", "metrics")):
        assert settings[f"{name}_key_file"] == f"{mount['mountPath']}/{item}"
    credentials = release["ServiceMonitor"]["spec"]["endpoints"][0]["authorization"]["credentials"]
    assert credentials == {"name": "keys", "key": "metrics"}


def test_a_gpu_is_a_limit_of_the_container() -> None:
    assert container_of(render(EVERYTHING))["resources"]["limits"] == {"memory": "20Gi", "nvidia.com/gpu": 2}
    assert "nvidia.com/gpu" not in container_of(render({}))["resources"]["limits"]


def test_autoscalers_read_a_metric_of_ours() -> None:
    name = next(iter(metrics.IN_FLIGHT.collect())).name
    autoscaler = render({})["HorizontalPodAutoscaler"]["spec"]
    assert autoscaler["scaleTargetRef"]["name"] == NAME
    assert autoscaler["metrics"][0]["pods"]["metric"]["name"] == name
    scaled = render(EVERYTHING)["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == NAME
    query = scaled["triggers"][0]["metadata"]["query"]
    assert query == f'sum({name}{{namespace="vision",pod=~"{NAME}-.*"}})'
    for values in ({}, EVERYTHING):
        assert "replicas" not in render(values)["Deployment"]["spec"]  # an upgrade would set the count back


def test_replicas_share_a_claim_that_exists() -> None:
    [models] = [volume for volume in pod_of(render(ONE_WITH_STATE))["spec"]["volumes"] if volume["name"] == "models"]
    assert models["persistentVolumeClaim"]["claimName"] == "weights"


def test_a_volume_of_one_replica_is_free_before_the_next_one_starts() -> None:
    deployment = render(ONE_WITH_STATE)["Deployment"]["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})


def test_there_is_time_to_end() -> None:
    release = render({})
    pause_s = container_of(release)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause_s + 2 * supervisor._DRAIN_S <= pod_of(release)["spec"]["terminationGracePeriodSeconds"]


@each_release
def test_notes_say_how_to_ask(values: dict[str, Any]) -> None:
    [notes] = [text for name, text in run(values)["files"].items() if name.endswith("NOTES.txt")]
    assert f"service/{NAME} 8000:80" in notes and "/classify" in notes
    assert ("Authorization: Bearer" in notes) == bool(values.get("keys"))
    assert ("gRPC: port" in notes) == bool(values.get("grpc"))


def test_the_schema_knows_every_protocol() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(schema["properties"]["protocols"]["items"]["enum"]) == {"none", *get_args(Protocol)}


def test_the_chart_is_of_this_version() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == server.__version__
