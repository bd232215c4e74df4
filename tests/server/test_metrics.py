"""Metrics: what is counted, under labels of closed sets, exactly. Of several processes: test_shared_values.py."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import BatchMetrics
from server.types import BatchKey
from tests.server.conftest import grey_png, serving, until

PNG = grey_png()


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


class Change:
    """How much a metric grew since."""

    def __init__(self, name: str, **labels: str) -> None:
        self.name, self.labels = name, labels
        self.before = value(name, **labels)

    def __call__(self) -> float:
        return value(self.name, **self.labels) - self.before


async def test_an_answer_counts_once_in_every_metric() -> None:
    async with serving() as service:
        labels = {"model": "tiny", "r": "4"}
        requests = Change("tome_requests_total", **labels, code="200")
        images = Change("tome_images_total", **labels)
        durations = [
            Change(f"tome_{stage}_duration_seconds_count", **labels) for stage in ("request", "queue", "inference")
        ]
        decoded = Change("tome_decode_duration_seconds_count")
        batches, batched = Change("tome_batch_size_count", **labels), Change("tome_batch_size_sum", **labels)
        await service.client.post("/classify?r=4", files=[("image", ("a.png", PNG))] * 3)
        assert (requests(), images(), decoded(), batched()) == (1, 3, 3, 3)
        assert batches() == len(service.device.batches)
        assert [each() for each in durations] == [1, 3, batches()]


@pytest.mark.parametrize(
    ("query", "model", "r", "code"),
    [
        ("r=8,4", "tiny", "schedule", "200"),
        ("r=4&inflect=-1", "tiny", "schedule", "200"),
        ("r=3,3,3", "tiny", "3", "200"),
        ("", "tiny", "5", "200"),
        ("model=secret-of-a-client", "unknown", "unknown", "404"),
    ],
)
async def test_labels_come_from_closed_sets(query: str, model: str, r: str, code: str) -> None:
    async with serving(r=5) as service:
        counted = Change("tome_requests_total", model=model, r=r, code=code)
        await service.client.post(f"/classify?{query}", content=PNG, headers={"content-type": "image/png"})
        assert counted() == 1
        assert "secret-of-a-client" not in (await service.client.get("/metrics")).text


async def test_an_error_of_the_image_counts_under_its_model() -> None:
    async with serving() as service:
        counted = Change("tome_requests_total", model="tiny", r="2", code="415")
        await service.classify(b"garbage", status=415, r=2)
        assert counted() == 1


async def test_images_in_flight_are_shown_while_they_are() -> None:
    async with serving() as service:
        in_flight = Change("tome_in_flight_images")
        service.device.gate.clear()
        call = asyncio.create_task(service.client.post("/classify", files=[("image", ("a.png", PNG))] * 3))
        await until(lambda: in_flight() == 3)
        service.device.gate.set()
        await call
        assert in_flight() == 0


async def test_the_scrape_is_prometheus_text_with_every_metric_of_the_service() -> None:
    async with serving() as service:
        await service.classify(PNG)
        response = await service.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = {family.name: family for family in text_string_to_metric_families(response.text)}
        ours = {name for name in families if name.startswith("tome_")}
        stages = {f"tome_{stage}_duration_seconds" for stage in ("request", "decode", "queue", "inference")}
        rest = {"requests", "images", "batch_size", "dropped_images", "in_flight_images", "engine_up", "engine_starts"}
        rest |= {"config_version", "config_stale", "drift_checked", "drift_agreed", "live_agreement", "drift"}
        assert ours >= stages | {f"tome_{name}" for name in rest}
        assert all(families[name].documentation for name in ours)


def test_drops_are_counted_by_reason_and_a_health_check_is_no_batch() -> None:
    observer = BatchMetrics()
    key = BatchKey("tiny", (1, 1), (8, 8))
    dropped = {reason: Change("tome_dropped_images_total", reason=reason) for reason in ("cancelled", "deadline")}
    batches = Change("tome_batch_size_count", model="tiny", r="1")
    observer.job_dropped("cancelled")
    observer.batch_ran(None, [0.1], 0.1)
    observer.batch_ran(key, [0.1, 0.2], 0.5)
    assert (dropped["cancelled"](), dropped["deadline"](), batches()) == (1, 0, 1)
