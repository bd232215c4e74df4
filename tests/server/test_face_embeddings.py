"""`POST /v1/embeddings`: every way to send images, both formats, dimensions, length, and what OpenAI's clients need."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.protocols.embeddings import _cut
from server.client import AsyncClient
from server.errors import EngineError, InvalidError
from server.ipc.messages import Vector
from tests.server.conftest import (
    NUM_FEATURES,
    SIDE,
    Service,
    features_of,
    grey_png,
    model_info,
    serving,
)
from tests.server.faces import B64, PNG, message_of

PATH = "/v1/embeddings"


def features(grey: int = 100, schedule: tuple[int, ...] = (0, 0, 0)) -> list[float]:
    return features_of(bytes([grey]) * (SIDE * SIDE * 3), schedule)


def unit(values: list[float]) -> list[float]:
    return [value / math.hypot(*values) for value in values]


async def embed(service: Service, **said: Any) -> httpx.Response:
    response = await service.client.post(PATH, json={"input": B64, **said})
    assert response.status_code == 200, response.text
    return response


def vector_of(response: httpx.Response, index: int = 0) -> list[float]:
    embedding = response.json()["data"][index]["embedding"]
    if isinstance(embedding, str):
        encoded = base64.b64decode(embedding)
        embedding = list(struct.unpack(f"<{len(encoded) // 4}f", encoded))
    return list(embedding)


async def test_an_answer_is_one_of_openai_and_names_its_r() -> None:
    async with serving(r=5) as service:
        body = (await embed(service, r=4, input=[B64, base64.b64encode(grey_png(7)).decode()])).json()
        vectors = [each.pop("embedding") for each in body["data"]]
        assert vectors[0] == pytest.approx(unit(features(100, (4, 4, 4))), rel=1e-6)
        assert vectors[1] == pytest.approx(unit(features(7, (4, 4, 4))), rel=1e-6)
        assert body == {
            "object": "list",
            "model": "tiny",
            "data": [{"object": "embedding", "index": 0}, {"object": "embedding", "index": 1}],
            "usage": {"prompt_tokens": 34, "total_tokens": 34},
            "r": 4,
            "r_source": "request",
            "tokens": 5,
        }
        deployed = (await embed(service)).json()
        assert (deployed["r"], deployed["r_source"]) == (5, "deployment")


@pytest.mark.parametrize(
    "said",
    [
        {"json": {"input": B64}},
        {"json": {"input": [f"data:image/png;base64,{B64}"], "modality": "image", "user": "u"}},
        {"json": {"input": B64, "model": "default/not-specified", "dimensions": 0, "encoding_format": "float"}},
        {"json": {"input": B64, "model": ""}},
        {"json": {"input": B64, "model": "tiny", "normalize": True, "encoding_format": None, "dimensions": None}},
        {"content": PNG, "headers": {"content-type": "image/png"}},
        {"content": PNG, "headers": {"content-type": "application/octet-stream"}, "params": {"dimensions": "0"}},
        {"files": {"image": ("a.png", PNG)}, "data": {"normalize": "true"}},
    ],
    ids=str,
)
async def test_every_way_to_send_an_image_gives_its_vector(said: dict[str, Any]) -> None:
    async with serving() as service:
        response = await service.client.post(PATH, **said)
        assert response.status_code == 200, response.text
        assert vector_of(response) == pytest.approx(unit(features()), rel=1e-6)


@pytest.mark.parametrize("form", ["float", "base64"])
@pytest.mark.parametrize("dimensions", [None, 0, 1, 3, NUM_FEATURES])
@pytest.mark.parametrize("normalize", [None, True, False])
async def test_the_first_dimensions_have_length_1_again(
    form: str, dimensions: int | None, normalize: bool | None
) -> None:
    async with serving() as service:
        said = {"encoding_format": form, "dimensions": dimensions, "normalize": normalize}
        vector = vector_of(await embed(service, **said))
        expected = features()[: dimensions or NUM_FEATURES]
        assert vector == pytest.approx(expected if normalize is False else unit(expected), rel=1e-6)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.data())
def test_any_finite_vector_has_length_1_or_is_zero(values: list[float], data: st.DataObject) -> None:
    dimensions = data.draw(st.integers(1, len(values)))
    encoded = struct.pack(f"<{len(values)}f", *values)
    cut = _cut(encoded, dimensions, None)
    assert len(cut) == dimensions and all(math.isfinite(number) for number in cut)
    assert math.hypot(*cut) == pytest.approx(1, rel=1e-5) or not any(values[:dimensions])
    assert list(_cut(encoded, dimensions, False)) == values[:dimensions]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(EngineError):
        _cut(struct.pack("<2f", 1, value), 2, normalize=False)


async def test_nan_is_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as service:
        broken = Vector(struct.pack(f"<{NUM_FEATURES}f", *[math.nan] * NUM_FEATURES))
        monkeypatch.setattr(service.device, "answer", lambda key, item: broken)
        response = await service.client.post(PATH, json={"input": B64})
        assert response.status_code == 500 and "not finite" in message_of(response, "embeddings")


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        ({"modality": "text"}, 422, "images only"),
        ({"modality": "audio"}, 422, "modality is 'audio'"),
        ({"input": "hello, world"}, 400, "not base64"),
        ({"input": "hello world"}, 415, "not an image"),
        ({"input": [1, 2]}, 422, "input"),
        ({"input": []}, 400, "no image"),
        ({"input": None}, 422, "input"),
        ({"encoding_format": "hex"}, 422, "encoding_format is 'hex'"),
        ({"dimensions": NUM_FEATURES + 1}, 422, f"between 0 and {NUM_FEATURES}"),
        ({"dimensions": -1}, 422, "dimensions is -1"),
        ({"normalize": "perhaps"}, 422, "normalize"),
        ({"model": "huge"}, 404, "there are: tiny"),
        ({"top_k": 3}, 422, "there is no parameter 'top_k'"),
        ({"user": "u" * (1 << 17)}, 422, "at most"),
    ],
    ids=str,
)
async def test_what_is_wrong_is_said_as_openai_says_it(said: dict[str, Any], status: int, words: str) -> None:
    async with serving() as service:
        response = await service.client.post(PATH, json={"input": B64, **said})
        assert response.status_code == status, response.text
        assert words in message_of(response, "embeddings")
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code", "details"}
        assert (error["type"], error["param"]) == ("invalid_request_error", None)
        assert isinstance(error["code"], str)


async def test_a_model_without_a_classifier_gives_vectors() -> None:
    async with serving(models=[model_info(labels=())]) as service:
        assert vector_of(await embed(service)) == pytest.approx(unit(features()), rel=1e-6)


async def test_the_models_are_listed_for_openais_clients_too() -> None:
    async with serving(models=[model_info(), model_info("large")]) as service:
        listed = (await service.client.get("/v1/models")).json()
        assert listed["object"] == "list"
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "tome-server"} for name in ("tiny", "large")]
        assert listed["data"] == cards
        model = (await service.client.get("/v1/models/large")).json()
        assert {name: model[name] for name in cards[1]} == cards[1]


async def test_our_own_client_embeds() -> None:
    async with serving() as service:
        transport = httpx.ASGITransport(service.app)
        async with AsyncClient("http://test", transport=transport) as client:
            one = await client.embed(PNG, r=4, dimensions=3)
            assert (one.model, one.r, one.r_source, one.tokens) == ("tiny", 4, "request", 5)
            assert one.vector == pytest.approx(unit(features(100, (4, 4, 4))[:3]), rel=1e-6)
            two = await client.embed_all([PNG, grey_png(7)], normalize=False)
            assert [each.vector for each in two] == [tuple(features(100)), tuple(features(7))]
            with pytest.raises(InvalidError, match="between 0 and"):
                await client.embed(PNG, dimensions=99)
            kept = await client.classify(PNG, function_to_apply="sigmoid", threshold=0.3)
            assert [each.score for each in kept.top_k] == [0.5, pytest.approx(1 / 3)]
