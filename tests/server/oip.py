"""What tests of the Open Inference Protocol share: a fake device that also scores and embeds, and requests as JSON."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from server.dial import Schedule
from server.ipc.engine import Engine
from server.ipc.messages import Embed, Item, Score, TopK, Vector
from server.types import BatchKey, ModelInfo
from tests.server.conftest import (
    NUM_CLASSES,
    FakeDevice,
    Service,
    class_of,
    grey_png,
    local_engine,
    model_info,
    serving,
)

C = 5
INFER = "/v2/models/tiny/infer"


def logits_of(pixels: bytes, schedule: Schedule) -> list[float]:
    """Highest for the class that the fake device names first, and falling from there on."""
    first = class_of(pixels, schedule)
    return [-0.5 * ((index - first) % NUM_CLASSES) for index in range(NUM_CLASSES)]


def features_of(pixels: bytes, schedule: Schedule) -> list[float]:
    """Features of an image."""
    return [float(class_of(pixels, schedule) + channel) for channel in range(C)]


def activated(logits: list[float], activation: str) -> list[float]:
    """Scores of logits, by the book."""
    if activation == "softmax":
        total = sum(math.exp(logit) for logit in logits)
        return [math.exp(logit) / total for logit in logits]
    return [1 / (1 + math.exp(-logit)) for logit in logits] if activation == "sigmoid" else logits


class ScoringDevice(FakeDevice):
    """A fake device that also gives scores and features."""

    def answer(self, key: BatchKey, item: Item) -> Any:
        request, pixels = item.request, item.image.data
        features = features_of(pixels, key.schedule)
        if isinstance(request, Embed):
            return _vector(features)
        scores = activated(logits_of(pixels, key.schedule), request.activation)
        if isinstance(request, Score):
            return _vector(scores + features if request.features else scores)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_k]
        return TopK(order, [scores[index] for index in order])


def _vector(values: Sequence[float]) -> Vector:
    return Vector(struct.pack(f"<{len(values)}f", *values))


@asynccontextmanager
async def oip_serving(
    *, models: Sequence[ModelInfo] = (), engine: Engine | None = None, **settings: Any
) -> AsyncIterator[Service]:
    """The service around such a device, or an engine that is started already; keywords are settings."""
    if engine is not None:
        async with serving(engine=engine, **settings) as service:
            yield service
        return
    device = ScoringDevice()
    local = local_engine(device, models or [model_info(num_features=C)])
    local.start()
    try:
        async with serving(engine=local, **settings) as service:
            service.device = device
            yield service
    finally:
        device.gate.set()
        await local.close()


def asking(*greys: int, outputs: Sequence[Any] = (), **parameters: Any) -> dict[str, Any]:
    """A request for uniform images, as JSON."""
    files = [base64.b64encode(grey_png(grey)).decode() for grey in greys or (100,)]
    said: dict[str, Any] = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(files)], "data": files}],
        "parameters": parameters,
    }
    return said | ({"outputs": list(outputs)} if outputs else {})
