"""TorchServe's predictions: raw bodies, forms and JSON in, labels and scores out; versions."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.server.conftest import NUM_CLASSES, class_of_grey, grey_png, model_info, score_of, serving
from tests.server.faces import B64, PNG, message_of

PATH = "/predictions/tiny"


def told(grey: int, count: int = 5, schedule: tuple[int, ...] = (0, 0, 0)) -> dict[str, Any]:
    first = class_of_grey(grey, schedule)
    return {f"label {(first + rank) % NUM_CLASSES}": score_of(rank) for rank in range(count)}


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("path", [PATH, f"{PATH}/1"])
@pytest.mark.parametrize(
    "headers", [{}, {"content-type": "application/x-www-form-urlencoded"}, {"expect": ""}], ids=str
)
async def test_a_raw_body_is_an_image_whatever_its_type(method: str, path: str, headers: dict[str, str]) -> None:
    async with serving() as service:
        response = await service.client.request(method, path, content=PNG, headers=headers)
        assert response.status_code == 200, response.text
        assert response.json() == told(100)
        assert list(response.json().values()) == sorted(response.json().values(), reverse=True)


def form(*parts: tuple[str, str | None, bytes]) -> dict[str, Any]:
    """A form whose parts need no file name and no type, as perf_analyzer sends it."""
    body = b""
    for name, filename, content in parts:
        named = f'; filename="{filename}"' if filename else ""
        body += f'--xx\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"
    return {"content": body + b"--xx--\r\n", "headers": {"content-type": "multipart/form-data; boundary=xx"}}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([("data", None, PNG)], told(100)),
        ([("data", "a.png", PNG)], told(100)),
        ([("body", "a.png", PNG)], told(100)),
        ([("data", None, PNG), ("r", None, b"4"), ("top_k", None, b"2")], told(100, 2, (4, 4, 4))),
        ([("data", None, PNG), ("data", "b.png", grey_png(7))], [told(100), told(7)]),
    ],
    ids=["no name", "name", "body", "fields", "several"],
)
async def test_a_form_holds_images_as_data(parts: list[Any], expected: Any) -> None:
    async with serving() as service:
        response = await service.client.post(PATH, **form(*parts))
        assert response.status_code == 200, response.text
        assert response.json() == expected


async def test_json_is_an_envelope_of_instances() -> None:
    async with serving() as service:
        instances = [{"data": B64}, {"b64": base64.b64encode(grey_png(7)).decode()}, f"data:image/png;base64,{B64}"]
        response = await service.client.post(PATH, json={"instances": instances, "parameters": {"top_k": 2}})
        assert response.json() == {"predictions": [told(100, 2), told(7, 2), told(100, 2)]}


async def test_of_classes_of_one_label_the_highest_score_stands() -> None:
    labels = tuple("crane" for _ in range(NUM_CLASSES))
    async with serving(models=[model_info(labels=labels)]) as service:
        assert (await service.client.post(PATH, content=PNG)).json() == {"crane": 0.5}


@pytest.mark.parametrize(
    ("path", "said", "status", "kind", "words"),
    [
        ("/predictions/huge", {"content": PNG}, 404, "ModelNotFoundException", "there are: tiny"),
        (f"{PATH}/2", {"content": PNG}, 404, "ModelVersionNotFoundException", "the only one is 1"),
        (f"{PATH}/1/x", {"content": PNG}, 404, "ResourceNotFoundException", ""),
        (PATH, {"content": b"\x89PNG"}, 415, "BadRequestException", ""),
        (PATH, {"content": PNG, "params": {"model": "tiny"}}, 422, "BadRequestException", "give it once"),
        (PATH, form(("image", "a.png", PNG)), 422, "BadRequestException", "send images as 'data'"),
        (PATH, form(("r", None, b"1")), 400, "BadRequestException", "no image"),
        (PATH, form(*[("data", None, PNG)] * 33), 413, "BadRequestException", "at most 32"),
    ],
)
async def test_errors_have_code_type_and_message(
    path: str, said: dict[str, Any], status: int, kind: str, words: str
) -> None:
    async with serving() as service:
        response = await service.client.post(path, **said)
        assert response.status_code == status, response.text
        assert response.json().keys() == {"code", "type", "message"}
        assert (response.json()["code"], response.json()["type"]) == (status, kind)
        assert words in message_of(response, "torchserve")


async def test_a_method_that_is_not_there_is_said_in_its_shape() -> None:
    async with serving() as service:
        refused = await service.client.delete(PATH)
        assert refused.status_code == 405 and refused.json()["type"] == "MethodNotAllowedException"
        assert refused.headers["allow"] == "POST, PUT"
