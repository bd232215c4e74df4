"""`POST /v1/explain` over a fake device, and the explainer on a real small model against `tome_core.visualize`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import torch

from server.device.device import Device
from server.device.explainer import Explainer
from server.device.models import LoadedModel, load_model
from server.device.prepared import PixelBatch, Prepared, stacked
from server.device.runner import Runner
from server.dial import Schedule
from server.errors import InvalidError
from server.images.image import Pixels
from server.ipc.messages import Classify, Explain, Item
from server.model_spec import ModelSpec
from server.types import BatchKey
from tests.server.conftest import SIDE, assert_is_error, class_of_grey, grey_png, groups_of, serving, until
from tome_core.visualize import sources

PNG = {"content-type": "image/png"}


async def test_an_explanation_has_the_answer_and_the_groups_of_every_block() -> None:
    async with serving() as service:
        files = {"image": ("a.png", grey_png(100))}
        response = await service.client.post("/v1/explain", files=files, params={"r": "4,2", "top_k": 1})
        assert response.status_code == 200, response.text
        body = response.json()
        index = class_of_grey(100, (4, 2, 0))
        assert body.pop("top_k") == [{"label": f"label {index}", "index": index, "score": 0.5}]
        timings = body.pop("timings_ms")
        assert max(timings.values()) == timings["total"] > 0
        groups = groups_of((4, 2, 0))
        assert [len(set(each)) for each in groups] == [12, 10, 10]  # with the prefix: the tokens below
        assert body == {
            "model": "tiny",
            "r": [4, 2, 0],
            "r_source": "request",
            "tuned": False,
            "config_version": 1,
            "computed_by": {"backend": "openvino", "precision": "bf16"},
            "filename": "a.png",
            "seen": {"input_size": [SIDE, SIDE], "resize_size": [SIDE, SIDE], "crop_mode": "center"},
            "grid": [4, 4],
            "patch": 2,
            "num_prefix_tokens": 1,
            "tokens": 17,
            "blocks": [
                {"block": 1, "tokens": 13, "groups": groups[0]},
                {"block": 2, "tokens": 11, "groups": groups[1]},
                {"block": 3, "tokens": 11, "groups": groups[2]},
            ],
        }


async def test_without_an_r_the_deployments_is_explained() -> None:
    async with serving(r=3) as service:
        body = (await service.client.post("/v1/explain", content=grey_png(), headers=PNG)).json()
        assert (body["r"], body["r_source"]) == (3, "deployment")


@pytest.mark.parametrize(
    ("content", "parameters", "status", "code", "told"),
    [
        (b"no image", {}, 415, "unsupported_format", "not an image"),
        (b"", {}, 400, "undecodable", "empty"),
        (grey_png(), {"r": 9}, 422, "invalid_parameter", "between 0 and 8"),
        (grey_png(), {"blocks": 3}, 422, "invalid_parameter", "there is no parameter 'blocks'"),
        (grey_png(), {"model": "other"}, 404, "not_found", "there is no model 'other'"),
    ],
)
async def test_what_is_wrong_is_told_as_by_classify(
    content: bytes, parameters: dict[str, str], status: int, code: str, told: str
) -> None:
    async with serving() as service:
        response = await service.client.post("/v1/explain", content=content, params=parameters, headers=PNG)
        assert told in assert_is_error(response, status, code)
        assert service.device.batches == []


async def test_two_images_are_one_too_many() -> None:
    async with serving() as service:
        files = [("image", ("a.png", grey_png())), ("image", ("b.png", grey_png()))]
        response = await service.client.post("/v1/explain", files=files)
        assert "at most 1 are allowed" in assert_is_error(response, 413, "too_large")


async def test_an_explanation_needs_the_key_and_a_place_in_the_queue() -> None:
    async with serving(api_key="secret", max_queue_size=1) as service:

        async def explain(**keys: str) -> httpx.Response:
            return await service.client.post("/v1/explain", content=grey_png(), headers={**PNG, **keys})

        assert_is_error(await explain(), 401, "unauthorized")
        service.device.gate.clear()
        first = asyncio.create_task(explain(**{"x-api-key": "secret"}))
        await until(lambda: len(service.device.batches) == 1)
        refused = await explain(**{"x-api-key": "secret"})
        assert_is_error(refused, 429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        service.device.gate.set()
        assert (await first).status_code == 200


async def test_explaining_and_classifying_never_share_a_batch() -> None:
    async with serving() as service:
        service.device.gate.clear()
        before = asyncio.create_task(service.classify(grey_png(1)))
        await until(lambda: len(service.device.batches) == 1)
        explained = asyncio.create_task(service.client.post("/v1/explain", content=grey_png(2), headers=PNG))
        classified = asyncio.create_task(service.classify(grey_png(3)))
        await until(lambda: service.app.state.service.engine._batcher.num_waiting == 2)
        service.device.gate.set()
        assert (await explained).json()["top_k"][0]["index"] == class_of_grey(2)
        assert (await classified).json()["results"][0]["top_k"][0]["index"] == class_of_grey(3)
        await before
        assert [len(jobs) for _, jobs in service.device.batches] == [1, 1, 1]


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(ModelSpec(source=f"local-dir:{tiny_folder}", name="tiny"))


@pytest.mark.parametrize("schedule", [(0, 0), (4, 1), (8, 4)])
def test_the_explainer_says_what_visualize_says(loaded: LoadedModel, schedule: Schedule) -> None:
    explainer, runner = Explainer({"tiny": loaded}, "cpu"), Runner({"tiny": loaded}, "cpu", "fp32")
    key, images = key_and_images(loaded, schedule)
    found = sources(runner.merged("tiny"), images[0].batch.pixels, schedule, (0, 1))
    explained = explainer.explain(key, images)
    assert [merges.top_k for merges in explained] == runner.forward(key, images)
    for index, merges in enumerate(explained):
        assert (merges.grid, merges.patch) == ((4, 4), 8)
        for groups, source, tokens in zip(merges.groups, found, loaded.info.token_counts(schedule)[1:], strict=True):
            rows = source[index, 1:].tolist()
            assert groups == [rows.index(row) for row in rows]
            assert len(set(groups)) == tokens - 1


def test_the_explainer_keeps_the_models_own_weights_when_the_runner_rounds_them(loaded: LoadedModel) -> None:
    key, images = key_and_images(loaded, (4, 1))
    exact = Runner({"tiny": loaded}, "cpu", "fp32").forward(key, images)
    explainer = Explainer({"tiny": loaded}, "cpu")
    rounded = Runner({"tiny": loaded}, "cpu", "bf16").forward(key, images)
    assert [merges.top_k for merges in explainer.explain(key, images)] == exact != rounded


def test_until_then_both_use_the_same_memory(loaded: LoadedModel) -> None:
    explainer = Explainer({"tiny": loaded}, "cpu")
    theirs = dict(loaded.merged.named_parameters())
    for name, parameter in explainer._models["tiny"].merged.named_parameters():
        assert parameter is not theirs[name]
        assert parameter.data_ptr() == theirs[name].data_ptr()


def test_patches_that_are_no_squares_are_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = Explainer({"tiny": loaded}, "cpu")
    key, images = key_and_images(loaded, (0, 0))
    monkeypatch.setattr(type(loaded.merged.family), "grid", lambda *_: (4, 2))
    with pytest.raises(InvalidError, match="its 4 x 2 patches cannot be painted as squares of 8 px"):
        explainer.explain(key, images)


def test_the_device_does_what_the_key_says_for_each_request_as_it_wants_it(loaded: LoadedModel) -> None:
    """Two requests of one operation and `r` share a batch; one wants two images answered with three classes each."""
    explainer, runner = Explainer({"tiny": loaded}, "cpu"), Runner({"tiny": loaded}, "cpu", "fp32")
    device = Device(runner, explainer)
    key, images = key_and_images(loaded, (4, 1))
    pixels = images[0].item.request.images
    two = Explain(model="tiny", images=pixels, r=(4, 1), deadline=1.0, top_k=3)
    one = Explain(model="tiny", images=pixels[1:], r=(4, 1), deadline=1.0, top_k=1)
    items = [Item(two, 0), Item(one, 0), Item(two, 1)]
    first, other, second = device.compute(key._replace(operation="explain"), items)
    assert [first, second] == explainer.explain(key, images)
    assert other.grid == second.grid and other.groups == second.groups  # type: ignore[union-attr]
    assert other.top_k.indices == second.top_k.indices[:1]  # type: ignore[union-attr]
    classified = device.compute(key, items)
    wanted = runner.forward(key, images)
    assert [classified[0], classified[2]] == wanted
    assert classified[1].indices == wanted[1].indices[:1]  # type: ignore[union-attr]


def key_and_images(loaded: LoadedModel, schedule: Schedule) -> tuple[BatchKey, list[Prepared]]:
    """Two images of noise, ready to be computed."""
    torch.manual_seed(0)
    noise = [bytes(torch.randint(256, (32 * 32 * 3,)).tolist()) for _ in range(2)]
    batch = PixelBatch(stacked(noise, (32, 32), torch.device("cpu")))
    asked = Classify(model="tiny", images=[Pixels(pixels) for pixels in noise], r=schedule, deadline=1.0, top_k=3)
    return loaded.info.batch_key(schedule), [Prepared(Item(asked, row), batch, row) for row in range(2)]
