"""The contract of Vertex AI's containers: routes and port of AIP_* variables, instances in, predictions out."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import SettingsError
from server.settings_sources import load_settings
from tests.server.conftest import NUM_CLASSES, class_of_grey, score_of, serving
from tests.server.faces import B64, message_of

AIP = {
    "AIP_HTTP_PORT": "8080",
    "AIP_PREDICT_ROUTE": "/v1/endpoints/12/deployedModels/34:predict",
    "AIP_HEALTH_ROUTE": "/v1/endpoints/12/deployedModels/34",
}


async def test_instances_give_predictions_on_the_named_routes() -> None:
    routes: dict[str, Any] = {
        "vertex_predict_route": AIP["AIP_PREDICT_ROUTE"],
        "vertex_health_route": AIP["AIP_HEALTH_ROUTE"],
    }
    async with serving(protocol="vertex kserve", **routes) as service:
        assert (await service.client.get(AIP["AIP_HEALTH_ROUTE"])).status_code == 200
        body = {"instances": [{"b64": B64}, B64], "parameters": {"r": 4, "top_k": 2}}
        response = await service.client.post(AIP["AIP_PREDICT_ROUTE"], json=body)
        assert response.status_code == 200, response.text
        first = class_of_grey(100, (4, 4, 4))
        indices = [first, (first + 1) % NUM_CLASSES]
        prediction = {
            "ids": [str(index) for index in indices],
            "displayNames": [f"label {index}" for index in indices],
            "confidences": [score_of(0), score_of(1)],
        }
        assert response.json() == {"predictions": [prediction, prediction]}
        assert response.headers["x-r"] == "4"
        assert (await service.client.post("/predict", json=body)).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"instances": [B64], "parameters": {"confidenceThreshold": 0.5}}, 422, "INVALID_ARGUMENT"),
        ({"instances": [B64], "parameters": {"model": "huge"}}, 404, "NOT_FOUND"),
        ({"instances": [{"b64": "?"}]}, 400, "INVALID_ARGUMENT"),
        ({"instances": []}, 400, "INVALID_ARGUMENT"),
    ],
)
async def test_errors_are_those_of_googles_apis(body: Any, status: int, word: str) -> None:
    async with serving(protocol="vertex") as service:
        response = await service.client.post("/predict", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["status"]) == (status, status, word)
        assert message_of(response, "vertex")


@pytest.fixture
def aip(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AIP.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("aip")
def test_the_platforms_variables_count_where_its_protocol_is_on() -> None:
    off = load_settings({})
    assert (off.port, off.vertex_predict_route, off.vertex_health_route) == (8000, "/predict", "/health")
    on = load_settings({"protocol": "vertex"})
    assert (on.port, on.vertex_predict_route) == (8080, AIP["AIP_PREDICT_ROUTE"])
    assert on.vertex_health_route == AIP["AIP_HEALTH_ROUTE"]


@pytest.mark.usefixtures("aip")
def test_whatever_else_says_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_VERTEX_HEALTH_ROUTE", "/ours")
    said = load_settings({"protocol": "vertex,kserve", "port": "7"})
    assert (said.port, said.vertex_health_route) == (7, "/ours")
    assert said.vertex_predict_route == AIP["AIP_PREDICT_ROUTE"]


def test_sagemakers_port_counts_where_its_protocol_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", "8081")
    assert load_settings({}).port == 8000
    assert load_settings({"protocol": "sagemaker"}).port == 8081


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AIP_HTTP_PORT", "http"),
        ("AIP_PREDICT_ROUTE", "predict"),
        ("AIP_HEALTH_ROUTE", "/{x}"),
        ("AIP_HEALTH_ROUTE", "/"),
    ],
)
def test_a_variable_that_cannot_be_stops_the_start(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="port|route"):
        load_settings({"protocol": "vertex"})


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "")
    assert load_settings({"protocol": "vertex"}).vertex_predict_route == "/predict"
