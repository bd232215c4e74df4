"""The files for KEDA: valid, and the same deployment and bounds as with Kubernetes' own autoscaler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server import metrics
from tests.kubernetes.custom import kept

DOCKER = Path(__file__).parents[2] / "docker"


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return document


OBJECT = read("keda/scaledobject.yaml")
AUTOSCALER = read("kubernetes/autoscaler.yaml")["spec"]


def test_fits_the_schema_of_keda() -> None:
    assert kept(OBJECT) == OBJECT


def test_the_schema_refuses_what_is_wrong() -> None:
    unknown = {**OBJECT, "spec": {**OBJECT["spec"], "minReplicas": 2}}
    assert kept(unknown) == OBJECT
    with pytest.raises(ValueError, match="pollingInterval"):
        kept({**OBJECT, "spec": {**OBJECT["spec"], "pollingInterval": "often"}})


def test_scales_as_the_autoscaler_does() -> None:
    spec = OBJECT["spec"]
    assert spec["scaleTargetRef"]["name"] == AUTOSCALER["scaleTargetRef"]["name"]
    assert spec["minReplicaCount"] == AUTOSCALER["minReplicas"]
    assert spec["maxReplicaCount"] == AUTOSCALER["maxReplicas"]
    assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == AUTOSCALER["behavior"]
    [trigger] = spec["triggers"]
    assert trigger["metadata"]["threshold"] == AUTOSCALER["metrics"][0]["pods"]["target"]["averageValue"]


def test_asks_for_a_metric_of_ours() -> None:
    [trigger] = OBJECT["spec"]["triggers"]
    assert trigger["type"] == "prometheus"
    name = next(iter(metrics.IN_FLIGHT.collect())).name
    assert trigger["metadata"]["query"] == f'sum({name}{{pod=~"tome-server-.*"}})'


def test_takes_the_place_of_the_autoscaler() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which builds kustomizations, is not on the path")
    built = subprocess.run([kubectl, "kustomize", DOCKER / "keda"], capture_output=True, text=True, check=True).stdout
    kinds = {document["kind"] for document in yaml.safe_load_all(built)}
    assert kinds == {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget", "ScaledObject"}
