"""Hugging Face's image classification: bytes of any type or JSON in, labels and scores out."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.server.conftest import NUM_CLASSES, class_of_grey, grey_png, score_of, serving
from tests.server.faces import B64, PNG, message_of


def told(grey: int, count: int, schedule: tuple[int, ...] = (0, 0, 0), activation: Any = "softmax") -> list[Any]:
    """What is said of the likeliest classes of an image."""
    first = class_of_grey(grey, schedule)
    return [
        {"label": f"label {(first + rank) % NUM_CLASSES}", "score": pytest.approx(score_of(rank, activation))}
        for rank in range(count)
    ]


@pytest.mark.parametrize("path", ["/", "/models/tiny"])
@pytest.mark.parametrize(
    "headers", [{}, {"content-type": "image/jpeg"}, {"content-type": "application/x-www-form-urlencoded"}]
)
async def test_bytes_of_any_type_are_an_image(path: str, headers: dict[str, str]) -> None:
    async with serving() as service:
        response = await service.client.post(path, content=PNG, headers=headers)
        assert response.status_code == 200, response.text
        assert response.json() == told(100, 5)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"top_k": 3}, told(100, 3)),
        ({"top_k": 3, "function_to_apply": "sigmoid"}, told(100, 3, activation="sigmoid")),
        ({"top_k": 2, "function_to_apply": "none"}, told(100, 2, activation="none")),
        ({"function_to_apply": "sigmoid", "threshold": 0.3}, told(100, 2, activation="sigmoid")),
        ({"top_k": 1, "r": 4}, told(100, 1, (4, 4, 4))),
        ({"top_k": 1, "r": [8, 4]}, told(100, 1, (8, 4, 0))),
        ({}, told(100, 5)),
        (None, told(100, 5)),
    ],
    ids=str,
)
async def test_parameters_stand_beside_the_inputs(parameters: Any, expected: list[Any]) -> None:
    async with serving() as service:
        body = {"inputs": B64, "parameters": parameters, "options": {"wait_for_model": True}}
        response = await service.client.post("/models/tiny", json=body)
        assert response.status_code == 200, response.text
        assert response.json() == expected


async def test_a_list_of_images_gives_a_list_of_lists() -> None:
    async with serving() as service:
        images = [B64, base64.b64encode(grey_png(7)).decode()]
        response = await service.client.post("/", json={"inputs": images, "parameters": {"top_k": 2}})
        assert response.json() == [told(100, 2), told(7, 2)]
        one = await service.client.post("/", json={"inputs": images[1:], "parameters": {"top_k": 2}})
        assert one.json() == [told(7, 2)]


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        ({"json": {"inputs": B64, "parameters": {"top_k": 1000}}}, 422, "between 1 and 101"),
        ({"json": {"inputs": B64, "parameters": {"topk": 1}}}, 422, "there is no parameter 'topk'"),
        ({"json": {"inputs": B64, "parameters": [1]}}, 422, "parameters is [1]"),
        ({"json": {"inputs": B64, "parameters": {"r": "0" * (1 << 17)}}}, 422, "is a text of"),
        ({"json": {"inputs": 7}}, 422, "inputs"),
        ({"json": {}}, 422, "inputs is missing"),
        ({"json": {"inputs": "no base64!"}}, 400, "not base64"),
        ({"json": {"inputs": B64, "parameters": {"model": "tiny"}}}, 422, "give it once"),
        ({"files": {"image": PNG}}, 415, "takes no form"),
        ({"content": b"no image"}, 415, ""),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_is_wrong_is_said_in_a_text(said: dict[str, Any], status: int, words: str) -> None:
    async with serving() as service:
        response = await service.client.post("/models/tiny", **said)
        assert response.status_code == status, response.text
        assert response.json().keys() == {"error"} and words in message_of(response, "huggingface")


async def test_the_page_is_still_the_page_and_keeps_its_errors() -> None:
    async with serving() as service:
        page = await service.client.get("/", headers={"accept": "text/html"})
        assert page.headers["content-type"].startswith("text/html")
        refused = await service.client.put("/")
        assert refused.status_code == 405 and refused.headers["allow"] == "GET, HEAD, POST"
