"""A fake device whose answers are a function of their input, the service around it, and small image files."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import logging
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from server.api.access_log import AccessLog
from server.api.app import create_app
from server.batching.engine import LocalEngine, Spans
from server.batching.loader import Loader
from server.batching.policy import Rung
from server.config.local import LocalConfig
from server.curve import Curve, CurveRow, Facts
from server.dial import AutoR, RSetting, Schedule
from server.images.image import Pixels
from server.images.preprocessing import Preprocessing
from server.ipc.engine import Engine
from server.ipc.messages import Classify, Embed, Explain, Item, Merges, Score, TopK, Vector
from server.settings import Settings
from server.tracing.provider import Tracing
from server.types import Activation, BatchKey, Compiling, ComputedBy, ModelInfo
from tests.server.listening import Listening, Recorder

SIDE = 8
NUM_CLASSES = 101  # a prime: different colours and schedules give different classes
NUM_FEATURES = 5


@pytest.fixture
def recorder() -> Recorder:
    """An application that notes what it is asked."""
    return Recorder()


@pytest.fixture
def listening(recorder: Recorder) -> Iterator[Listening]:
    """Our connections on a real socket, before that application."""
    with Listening(recorder) as server:
        yield server


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A command that sets up logging does so for its own test: its stream is closed after that."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


async def until(condition: Callable[[], bool]) -> None:
    """Lets the event loop turn until something holds."""
    while not condition():
        await asyncio.sleep(0.0005)


def model_info(name: str = "tiny", **changes: Any) -> ModelInfo:
    """A model of three blocks, 17 tokens, `r` up to 8, for images of 8 x 8 pixels."""
    half = (0.5, 0.5, 0.5)
    facts: dict[str, Any] = {
        "name": name,
        "architecture": "vit_fake",
        "source": "fake",
        "labels": tuple(f"label {index}" for index in range(NUM_CLASSES)),
        "preprocessing": Preprocessing((SIDE, SIDE), (SIDE, SIDE), "center", "bicubic", half, half),
        "num_blocks": 3,
        "num_tokens": 17,
        "num_prefix_tokens": 1,
        "max_r": 8,
        "num_features": NUM_FEATURES,
    }
    return ModelInfo(**(facts | changes))


def facts(**changes: Any) -> Facts:
    """What a made-up curve was measured with."""
    made: dict[str, Any] = {
        "weights": "ab" * 32,
        "backend": "torch",
        "device": "abacus",
        "precision": "fp32",
        "threads": 2,
        "versions": {"tome-server": "0.1.0", "torch": "2.15.0", "timm": "1.0.31"},
    }
    return Facts(**(made | changes))


def curve_row(r: int, agreement: float, line: tuple[float, float] | None, **changes: Any) -> CurveRow:
    """A row of the fake model."""
    schedule = (r,) * 3
    row = CurveRow(
        r=schedule,
        tokens=model_info().token_counts(schedule)[-1],
        agreement=agreement,
        agreement_interval=(agreement, agreement),
        **changes,
    )
    return row.at(line, 32) if line else row


def fake_curve(**changes: Any) -> Curve:
    """A curve of the fake model."""
    rows = (
        curve_row(0, 1.0, (0.5, 1.0), top1=0.8, gflops=2.0),
        curve_row(4, 0.96, (0.25, 0.5), top1=0.75, gflops=1.5),
        curve_row(8, 0.9, (0.0, 0.1), top1=0.7, gflops=1.0),
    )
    made: dict[str, Any] = {"model": "tiny", "facts": facts(), "measured": "2026-11-22", "photos": 100, "rows": rows}
    return Curve(**({"max_batch_size": 32} | made | changes))


def class_of(pixels: bytes, schedule: Sequence[int]) -> int:
    """The class that the fake device answers with: pixels and schedule both count."""
    return (sum(pixels) + sum((block + 1) * r for block, r in enumerate(schedule))) % NUM_CLASSES


def class_of_grey(grey: int, schedule: Sequence[int] = (0, 0, 0)) -> int:
    """The fake device's class for a uniform image."""
    return class_of(bytes([grey]) * (SIDE * SIDE * 3), schedule)


def score_of(rank: int, activation: Activation = "softmax") -> float:
    """The fake device's score of the class of this rank, 0 for the likeliest."""
    if activation == "softmax":
        return float(0.5 ** (rank + 1))
    return 1 / (rank + 2) if activation == "sigmoid" else float(-rank)


def scores_of(pixels: bytes, schedule: Sequence[int], activation: Activation = "none") -> list[float]:
    """The fake device's scores of all classes, in their order, as float32 has them."""
    first = class_of(pixels, schedule)
    scores = [score_of((index - first) % NUM_CLASSES, activation) for index in range(NUM_CLASSES)]
    return numbers(vector(scores))


def features_of(pixels: bytes, schedule: Sequence[int]) -> list[float]:
    """The fake device's features of an image: not of length 1, and never zero."""
    return [class_of(pixels, schedule) + 1.5 * (channel + 1) for channel in range(NUM_FEATURES)]


def vector(values: Sequence[float]) -> Vector:
    """Numbers as an engine sends them."""
    return Vector(struct.pack(f"<{len(values)}f", *values))


def numbers(sent: Vector) -> list[float]:
    """The numbers that an engine sent."""
    return list(struct.unpack(f"<{len(sent.values) // 4}f", sent.values))


def groups_of(schedule: Sequence[int]) -> list[list[int]]:
    """What the fake device says has merged of 16 patches: the first ones, as many as left a token in each block."""
    merged = itertools.accumulate(schedule)
    return [[0 if patch <= gone else patch for patch in range(16)] for gone in merged]


@dataclass
class FakeDevice:
    """Answers each image from its pixels and its batch's schedule, once `gate` is open; notes every batch.

    Where `prepares`, the pixels are prepared by adding nothing, once `prepare_gate` is open.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[tuple[BatchKey, list[Item]]] = field(default_factory=list)
    failure: Exception | None = None
    num_classes: int = NUM_CLASSES
    prepares: bool = False
    broken: Exception | None = None
    uncompiled: list[Schedule] = field(default_factory=list)
    begun: list[tuple[str, Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    def prepare(self, key: BatchKey, items: Sequence[Item]) -> Sequence[Any]:
        return items

    def compute(self, key: BatchKey, work: Sequence[Any]) -> list[TopK | Vector] | list[Merges]:
        self.batches.append((key, list(work)))
        self.gate.wait()
        if self.failure is not None:
            raise self.failure
        if key.operation == "explain":
            groups = groups_of(key.schedule)
            return [Merges(self.top_k(key, item), (4, 4), SIDE // 4, groups) for item in work]
        return [self.answer(key, item) for item in work]

    def computed_by(self, key: BatchKey) -> ComputedBy:
        return (
            ComputedBy("openvino", "bf16") if self.is_compiled(key) else ComputedBy("torch", "fp32", is_fallback=True)
        )

    def is_compiled(self, key: BatchKey) -> bool:
        return key.schedule not in self.uncompiled

    def begin(self, info: ModelInfo, on_device: Any, timed: Any) -> None:
        self.begun.append((info.name, on_device, timed))

    def close(self) -> None:
        pass

    def compiling(self, info: ModelInfo) -> Compiling | None:
        return Compiling(self.uncompiled[0], 1, 1 + len(self.uncompiled)) if self.uncompiled else None

    def answer(self, key: BatchKey, item: Item) -> TopK | Vector:
        request, pixels = item.request, item.image.data
        if isinstance(request, Embed):
            return vector(features_of(pixels, key.schedule))
        if isinstance(request, Score):
            return vector(scores_of(pixels, key.schedule, request.activation))
        return self.top_k(key, item)

    def top_k(self, key: BatchKey, item: Item) -> TopK:
        request, first = item.request, class_of(item.image.data, key.schedule)
        assert isinstance(request, Classify | Explain)
        ranks = range(request.top_k)
        if isinstance(request, Classify) and request.threshold is not None:
            ranks = range(sum(score_of(rank, request.activation) >= request.threshold for rank in ranks))
        return TopK(
            [(first + rank) % self.num_classes for rank in ranks],
            [score_of(rank, request.activation) for rank in ranks],
        )

    def check(self) -> None:
        if self.broken is not None:
            raise self.broken

    def warm_further(self) -> bool:
        return False


def classify(
    pixels: bytes = b"abc", r: Schedule | AutoR | None = None, *, model: str = "tiny", top_k: int = 1, in_s: float = 1e6
) -> Classify:
    """A request to classify one image, to be answered within so many seconds."""
    return Classify(model=model, images=[Pixels(pixels)], r=r, deadline=time.monotonic() + in_s, top_k=top_k)


def explain(pixels: bytes = b"abc", r: Schedule | AutoR | None = None, *, model: str = "tiny") -> Explain:
    """The same to explain it."""
    return Explain(model=model, images=[Pixels(pixels)], r=r, deadline=time.monotonic() + 1e6, top_k=1)


def score(
    pixels: bytes = b"abc",
    r: Schedule | AutoR | None = None,
    *,
    model: str = "tiny",
    activation: Activation = "none",
) -> Score:
    """The same for the scores of all classes."""
    deadline = time.monotonic() + 1e6
    return Score(model=model, images=[Pixels(pixels)], r=r, deadline=deadline, activation=activation)


def embed(pixels: bytes = b"abc", r: Schedule | AutoR | None = None, *, model: str = "tiny") -> Embed:
    """The same for its features."""
    return Embed(model=model, images=[Pixels(pixels)], r=r, deadline=time.monotonic() + 1e6)


def local_engine(
    device: FakeDevice,
    models: Sequence[ModelInfo] = (),
    *,
    r: RSetting = 0,
    state_file: Path | None = None,
    **limits: Any,
) -> LocalEngine:
    """An engine around a fake device; the caller starts it."""
    catalog = {info.name: info for info in models or [model_info()]}
    return LocalEngine(catalog, device, LocalConfig(dict.fromkeys(catalog, r), state_file), **limits)


@dataclass
class Service:
    """The application in this process, and a client of it."""

    client: httpx.AsyncClient
    app: FastAPI
    device: FakeDevice

    async def classify(self, encoded: bytes, *, status: int = 200, **parameters: Any) -> httpx.Response:
        """Sends one raw image and expects a status."""
        headers = {"content-type": "image/png"}
        response = await self.client.post("/classify", content=encoded, params=parameters, headers=headers)
        assert response.status_code == status, response.text
        return response


@asynccontextmanager
async def serving(
    *,
    models: Sequence[ModelInfo] = (),
    r: RSetting = 0,
    state_file: Path | None = None,
    engine: Engine | None = None,
    steps: Sequence[Rung] | None = None,
    curve: Curve | None = None,
    batch: int = 32,
    queue: int = 256,
    loader: Loader | None = None,
    access_log: AccessLog | None = None,
    tracing: Tracing | None = None,
    spans: Spans | None = None,
    **settings: Any,
) -> AsyncIterator[Service]:
    """The service around a fake device or the given engine; keywords are settings, `steps` and `curve` of `tiny`."""
    device = FakeDevice()
    ladder = {"tiny": steps} if steps else None
    limits = {"max_batch_size": batch, "max_queue_size": queue}
    curves = {"tiny": curve} if curve else None
    more = {"steps": ladder, "curves": curves, "loader": loader, "spans": spans}
    local = local_engine(device, models, r=r, state_file=state_file, **more, **limits)
    made = Settings.model_validate({"state_dir": None} | settings)
    app = create_app(made, engine or local, access_log=access_log, tracing=tracing)
    local.start()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield Service(client, app, device)
    finally:
        device.gate.set()
        app.state.service.decoders.close()
        await local.close()


def assert_is_error(response: httpx.Response, status: int, code: str) -> str:
    """Checks the one error shape; gives the message."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"code", "message", "details"}
    assert body["error"]["code"] == code
    assert isinstance(body["error"]["details"], dict)
    message = body["error"]["message"]
    assert isinstance(message, str) and message
    return message


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def grey_png(grey: int = 100) -> bytes:
    """A uniform picture whose class the fake device computes from its brightness."""
    return encode(Image.new("RGB", (SIDE, SIDE), (grey, grey, grey)))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random ViT in the Hugging Face folder layout: fp16 safetensors, config.json with label names."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    folder.mkdir()
    size: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **size)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_file({name: value.half() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": size,
        "label_names": ["n01", "n02", "n03"],
        "label_descriptions": {"n01": "cat", "n02": "dog", "n03": "goldfish"},
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "crop_pct": 0.9,
            "crop_mode": "center",
            "interpolation": "bilinear",
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.4],
            "num_classes": 3,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
