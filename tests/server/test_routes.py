"""`POST /classify` over a fake device: answers, headers, the dial, limits, and clients that leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import MutableMapping
from typing import Any

import pytest
from prometheus_client import REGISTRY

from server.api import routes
from server.batching.engine import LocalEngine
from server.images.pillow import decode_for
from server.types import Job, Prediction
from tests.server.conftest import (
    NUM_CLASSES,
    Service,
    assert_is_error,
    class_of_grey,
    grey_png,
    model_info,
    serving,
    until,
)

PNG = grey_png(100)
FORM = [("image", ("a.png", PNG))]


async def test_an_answer_says_what_is_in_the_image_and_how_it_was_computed() -> None:
    async with serving() as service:
        response = await service.classify(PNG, r=4, top_k=2)
        body = response.json()
        best = class_of_grey(100, (4, 4, 4))
        classes = [best, (best + 1) % NUM_CLASSES]
        assert body.pop("results") == [
            {
                "filename": None,
                "top_k": [
                    {"label": f"label {index}", "index": index, "score": score}
                    for index, score in zip(classes, (0.5, 0.25), strict=True)
                ],
            }
        ]
        timings = body.pop("timings_ms")
        assert timings.keys() == {"decode", "queue", "inference", "total"}
        assert 0 <= timings["queue"] and max(timings.values()) == timings["total"] > 0
        assert body == {
            "model": "tiny",
            "r": 4,
            "r_source": "request",
            "auto": None,
            "tokens": 17 - 4 - 4 - 4,
            "batch_size": 1,
            "config_version": 1,
        }
        headers = response.headers
        assert (headers["x-r"], headers["x-batch-size"], headers["x-config-version"]) == ("4", "1", "1")
        stages = dict(stage.split(";dur=") for stage in headers["server-timing"].split(", "))
        assert {stage: float(ms) for stage, ms in stages.items()} == pytest.approx(timings, abs=0.006)


async def test_without_top_k_five_classes_are_named() -> None:
    async with serving() as service:
        assert len((await service.classify(PNG)).json()["results"][0]["top_k"]) == 5
        assert len((await service.classify(PNG, top_k=NUM_CLASSES)).json()["results"][0]["top_k"]) == NUM_CLASSES


async def test_a_model_of_few_classes_names_them_all_where_no_top_k_is_said() -> None:
    async with serving(models=[model_info(labels=("cat", "dog"))]) as service:
        service.device.num_classes = 2
        assert len((await service.classify(PNG)).json()["results"][0]["top_k"]) == 2
        await service.classify(PNG, status=422, top_k=3)


async def test_v1_classify_is_the_same_endpoint() -> None:
    async with serving() as service:
        response = await service.client.post("/v1/classify", files=FORM)
        assert response.json()["results"][0]["top_k"][0]["index"] == class_of_grey(100)


async def test_a_request_keeps_its_plain_id_and_gets_one_otherwise() -> None:
    async with serving() as service:
        plain = await service.client.get("/livez", headers={"x-request-id": "job-7.a_B"})
        assert plain.headers["x-request-id"] == "job-7.a_B"
        odd = [{"x-request-id": borne} for borne in ("a b", "x" * 129, "<script>")]
        answers = [await service.client.get("/livez", headers=headers) for headers in ({}, *odd)]
        made = [answer.headers["x-request-id"] for answer in answers]
        assert len(set(made)) == 4
        assert all(each.isalnum() for each in made)


@pytest.mark.parametrize(
    ("parameters", "r", "schedule", "header"),
    [
        ({"r": "8"}, 8, (8, 8, 8), "8"),
        ({"r": "0"}, 0, (0, 0, 0), "0"),
        ({"r": "[8,4]"}, [8, 4, 0], (8, 4, 0), "8,4,0"),
        ({"r": "3,3,3"}, 3, (3, 3, 3), "3"),
        ({"r": "4", "inflect": "-1"}, [8, 4, 0], (8, 4, 0), "8,4,0"),
        ({"r": "4", "inflect": "1"}, [0, 4, 8], (0, 4, 8), "0,4,8"),
        ({"r": "4", "inflect": "0"}, 4, (4, 4, 4), "4"),
    ],
)
async def test_every_way_to_say_r_reaches_the_device(
    parameters: dict[str, Any], r: Any, schedule: tuple[int, ...], header: str
) -> None:
    async with serving(r=5) as service:
        response = await service.classify(PNG, **parameters)
        assert response.json()["r"] == r
        assert response.headers["x-r"] == header
        assert response.json()["results"][0]["top_k"][0]["index"] == class_of_grey(100, schedule)
        assert [key.schedule for key, _ in service.device.batches] == [schedule]


async def test_without_r_the_deployments_is_used_and_said() -> None:
    async with serving(r=5) as service:
        body = (await service.classify(PNG)).json()
        assert (body["r"], body["r_source"], body["tokens"]) == (5, "deployment", 17 - 5 - 5 - 3)


async def test_requests_of_one_r_share_a_batch_and_others_do_not() -> None:
    async with serving() as service:
        service.device.gate.clear()
        calls = [asyncio.create_task(service.classify(PNG, r=8))]
        await until(lambda: len(service.device.batches) == 1)
        asked = [(grey, r) for grey in (1, 2, 3) for r in (2, 4)]
        calls += [asyncio.create_task(service.classify(grey_png(grey), r=r)) for grey, r in asked]
        await until(lambda: waiting(service) == 6)
        service.device.gate.set()
        answers = await asyncio.gather(*calls)
        for (grey, r), answer in zip(asked, answers[1:], strict=True):
            assert answer.json()["results"][0]["top_k"][0]["index"] == class_of_grey(grey, (r, r, r))
            assert answer.headers["x-batch-size"] == "3"
        assert sorted(len(jobs) for _, jobs in service.device.batches) == [1, 3, 3]


async def test_the_images_of_a_request_share_one_r_even_if_it_changes_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(r=5) as service:
        engine: LocalEngine = service.app.state.service.engine
        classify = engine.classify

        async def classify_after_a_change(job: Job) -> Prediction:
            await engine.configure({"tiny": len(service.device.batches) + 6}, None)
            return await classify(job)

        monkeypatch.setattr(engine, "classify", classify_after_a_change)
        files = [("image", (f"{grey}.png", grey_png(grey))) for grey in (1, 2, 3)]
        body = (await service.client.post("/classify", files=files)).json()
        assert (body["r"], body["r_source"]) == (5, "deployment")
        assert {key.schedule for key, _ in service.device.batches} == {(5, 5, 5)}


def waiting(service: Service) -> int:
    """Images in the engine's queue."""
    count: int = service.app.state.service.engine._batcher.num_waiting
    return count


async def test_a_deadline_that_passes_is_a_504_and_the_next_request_works() -> None:
    async with serving() as service:
        service.device.gate.clear()
        assert_is_error(await service.classify(PNG, status=504, deadline_ms=20), 504, "deadline_exceeded")
        service.device.gate.set()
        await service.classify(PNG)


async def test_a_full_queue_is_a_429_that_says_when_to_come_back() -> None:
    async with serving(max_queue_size=2) as service:
        service.device.gate.clear()
        calls = [asyncio.create_task(service.classify(PNG)) for _ in range(2)]
        await until(lambda: len(service.device.batches) > 0)
        await until(lambda: service.app.state.service.admission._in_flight == 2)
        refused = await service.classify(PNG, status=429)
        assert_is_error(refused, 429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        service.device.gate.set()
        await asyncio.gather(*calls)
        await service.classify(PNG)


async def test_more_images_than_the_queue_can_ever_hold_are_a_413() -> None:
    async with serving(max_queue_size=2) as service:
        assert_is_error(await service.client.post("/classify", files=FORM * 3), 413, "too_large")


async def test_every_permit_comes_back_after_answers_and_after_errors() -> None:
    async with serving(max_queue_size=3) as service:
        gauge = REGISTRY.get_sample_value("tome_in_flight_images")
        for _ in range(3):
            await service.client.post("/classify", files=FORM * 3)
            await service.classify(b"garbage", status=415)
            service.device.gate.clear()
            await service.classify(PNG, status=504, deadline_ms=5)
            service.device.gate.set()
            service.device.failure = RuntimeError("the device burns")
            await service.classify(PNG, status=500)
            service.device.failure = None
        assert service.app.state.service.admission._in_flight == 0
        assert REGISTRY.get_sample_value("tome_in_flight_images") == gauge


async def test_a_batch_that_fails_is_a_500_and_the_next_request_works() -> None:
    async with serving() as service:
        service.device.failure = RuntimeError("the device burns")
        assert_is_error(await service.classify(PNG, status=500), 500, "engine_error")
        service.device.failure = None
        await service.classify(PNG)


async def test_a_client_that_hangs_up_while_queued_has_its_job_withdrawn() -> None:
    async with serving() as service:
        service.device.gate.clear()
        first = asyncio.create_task(service.classify(PNG))
        await until(lambda: len(service.device.batches) == 1)
        hangs_up = asyncio.Event()
        sent: list[MutableMapping[str, Any]] = []
        leaving = asyncio.create_task(drive(service, grey_png(1), hangs_up, sent))
        await until(lambda: waiting(service) == 1)
        hangs_up.set()
        await until(lambda: waiting(service) == 0)
        await leaving
        service.device.gate.set()
        await first
        await service.classify(grey_png(2))
        assert [len(jobs) for _, jobs in service.device.batches] == [1, 1]
        assert service.app.state.service.admission._in_flight == 0
        assert [message["status"] for message in sent if message["type"] == "http.response.start"] in ([], [499])


async def test_a_client_that_leaves_amid_its_body_is_counted_as_gone_and_not_as_our_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as service:
        labels = {"model": "unknown", "r": "unknown", "code": "499"}
        before = REGISTRY.get_sample_value("tome_requests_total", labels) or 0.0
        hangs_up = asyncio.Event()
        hangs_up.set()
        await drive(service, PNG[:20], hangs_up, [], more_body=True)
        assert REGISTRY.get_sample_value("tome_requests_total", labels) == before + 1
        assert "Traceback" not in caplog.text
        assert service.device.batches == []


async def test_the_deadline_holds_while_decoding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, done = threading.Event(), threading.Event()

    def decode_for_long(*args: Any) -> tuple[bytes, int]:
        decoding.set()
        done.wait()
        return decode_for(*args)

    async with serving() as service:
        monkeypatch.setattr(routes, "decode_for", decode_for_long)
        late = await service.classify(PNG, status=504, deadline_ms=50)
        assert (late.json()["error"]["code"], decoding.is_set()) == ("deadline_exceeded", True)
        done.set()
        assert service.device.batches == []
        assert service.app.state.service.admission._in_flight == 0


async def drive(
    service: Service,
    body: bytes,
    hangs_up: asyncio.Event,
    sent: list[MutableMapping[str, Any]],
    *,
    more_body: bool = False,
) -> None:
    """Sends one raw image as an ASGI server does, and then hangs up."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": more_body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await hangs_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/classify",
        "raw_path": b"/classify",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"image/png"), (b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await service.app(scope, receive, send)
