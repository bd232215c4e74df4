"""KServe's protocol v1: instances in, predictions out, and the states of server and model."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.server.conftest import grey_png, serving
from tests.server.faces import B64, PNG, message_of
from tests.server.test_face_torchserve import told

PATH = "/v1/models/tiny:predict"


@pytest.mark.parametrize("content_type", ["application/json", "application/cloudevents+json", "text/plain", None])
async def test_instances_are_images_in_any_of_three_forms(content_type: str | None) -> None:
    async with serving() as service:
        instances = [{"b64": B64}, {"data": base64.b64encode(grey_png(7)).decode()}, B64]
        request = service.client.build_request("POST", PATH, json={"instances": instances, "parameters": {"r": 4}})
        if content_type is None:
            del request.headers["content-type"]
        else:
            request.headers["content-type"] = content_type
        response = await service.client.send(request)
        assert response.status_code == 200, response.text
        grey, seven = told(100, schedule=(4, 4, 4)), told(7, schedule=(4, 4, 4))
        assert response.json() == {"predictions": [grey, seven, grey]}
        assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"instances": [{"b64": 1}]}, 422, "instances.0 is {'b64': 1}"),
        ({"instances": [B64, {"image": B64}]}, 422, "instances.1 is"),
        ({"instances": [{"b64": B64, "data": B64}]}, 422, "instances.0 is"),
        ({"instances": [[1.0, 2.0]]}, 422, "instances.0 is [1.0, 2.0]"),
        ({"instances": B64}, 422, "instances"),
        ({"instances": [{"b64": "?"}]}, 400, "image 0 is not base64"),
        ({"instances": [B64], "parameters": {"odd": 1}}, 422, "there is no parameter 'odd'"),
        ({"instances": [B64], "parameter": {}}, 422, "there is no parameter 'parameter'"),
        ({"instances": [B64], "parameters": {"model": "tiny"}}, 422, "give it once"),
        ({"instances": [{"b64": B64, "odd": "o" * (1 << 17)}]}, 422, "is a text of"),
        ({}, 422, "instances is missing"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_is_wrong_is_named_in_a_text(body: Any, status: int, words: str) -> None:
    async with serving() as service:
        response = await service.client.post(PATH, json=body)
        assert response.status_code == status, response.text
        assert response.json().keys() == {"error"} and words in message_of(response, "kserve")
        assert response.headers["content-type"] == "application/json"


async def test_the_path_with_a_colon_is_no_name_of_a_model() -> None:
    async with serving() as service:
        assert (await service.client.get(PATH)).status_code == 404
        missing = await service.client.post("/v1/models/huge:predict", json={"instances": [B64]})
        assert missing.status_code == 404 and "there are: tiny" in message_of(missing, "kserve")
        explained = await service.client.post("/v1/models/tiny:explain", json={"instances": [B64]})
        assert explained.status_code in (404, 405) and message_of(explained, "kserve")


async def test_a_model_says_its_name_and_whether_it_is_ready() -> None:
    async with serving() as service:
        model = (await service.client.get("/v1/models/tiny")).json()
        assert (model["name"], model["ready"]) == ("tiny", True)
        service.app.state.is_draining = True
        assert (await service.client.get("/v1/models/tiny")).json()["ready"] is False


@pytest.mark.parametrize(
    ("accept", "protocol", "is_page"),
    [
        ("text/html,application/xhtml+xml,*/*;q=0.8", "kserve", True),
        ("*/*", "kserve", False),
        ("application/json", "kserve", False),
        ("*/*", "none", True),
    ],
)
async def test_the_root_is_the_page_for_browsers_and_a_sign_of_life_for_others(
    accept: str, protocol: str, is_page: bool
) -> None:
    async with serving(protocol=protocol, api_key="secret") as service:
        answer = await service.client.get("/", headers={"accept": accept})
        assert answer.status_code == 200 and answer.headers["vary"] == "accept"
        if is_page:
            assert answer.headers["content-type"].startswith("text/html")
        else:
            assert answer.json() == {"status": "alive"}
        head = await service.client.head("/", headers={"accept": accept})
        assert (head.status_code, head.headers["content-type"]) == (200, answer.headers["content-type"])


async def test_a_raw_image_is_no_json() -> None:
    async with serving() as service:
        refused = await service.client.post(PATH, content=PNG)
        assert refused.status_code == 400 and "not JSON" in message_of(refused, "kserve")
