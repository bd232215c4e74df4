"""The Python client against the real application in this process: both clients, every call, every error."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

from server.api import schemas
from server.batching.policy import Rung
from server.client import Answer, AsyncClient, Client, answers
from server.errors import (
    ConflictError,
    DeadlineError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    ServerError,
    TooLargeError,
    UnauthorizedError,
    UndecodableError,
    UnsupportedError,
)
from tests.server.conftest import (
    SIDE,
    Service,
    class_of,
    class_of_grey,
    encode,
    fake_curve,
    grey_png,
    model_info,
    serving,
)

PNG = grey_png(100)
Ask = Callable[..., Awaitable[Any]]
BOTH = pytest.mark.parametrize("kind", ["sync", "async"])


class Bridge(httpx.BaseTransport):
    """Lets the sync client, in a thread of its own, talk to an application in this thread's event loop."""

    def __init__(self, app: FastAPI) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return asyncio.run_coroutine_threadsafe(self._send(request), self._loop).result()

    async def _send(self, request: httpx.Request) -> httpx.Response:
        response = await self._transport.handle_async_request(request)
        return httpx.Response(response.status_code, headers=response.headers, content=await response.aread())


@asynccontextmanager
async def asking(kind: str, service: Service, **options: Any) -> AsyncIterator[Ask]:
    """Either client of a service, its methods by name."""
    if kind == "sync":
        with Client("http://test", transport=Bridge(service.app), **options) as client:
            yield lambda method, *said, **more: asyncio.to_thread(getattr(client, method), *said, **more)
    else:
        transport = httpx.ASGITransport(service.app, raise_app_exceptions=False)
        async with AsyncClient("http://test", transport=transport, **options) as asynchronous:
            yield lambda method, *said, **more: getattr(asynchronous, method)(*said, **more)


@BOTH
async def test_an_answer_says_what_is_in_the_image_and_how_it_was_computed(kind: str, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(PNG)
    async with serving() as service, asking(kind, service) as ask:
        answer: Answer = await ask("classify", photo, r=4, top_k=2)
        best = class_of_grey(100, (4, 4, 4))
        assert [(each.label, each.index, each.score) for each in answer.top_k] == [
            (f"label {best}", best, 0.5),
            (f"label {best + 1}", best + 1, 0.25),
        ]
        assert (answer.top, answer.label) == (answer.top_k[0], f"label {best}")
        assert (answer.filename, answer.model) == ("photo.png", "tiny")
        assert (answer.r, answer.r_source, answer.auto, answer.tokens) == (4, "request", None, 5)
        assert (answer.batch_size, answer.config_version, answer.tuned) == (1, 1, False)
        assert 0 < answer.timings_ms.inference <= answer.timings_ms.total
        with pytest.raises(FrozenInstanceError):
            answer.r = 3  # type: ignore[misc]


@BOTH
async def test_every_kind_of_image_reaches_the_model_pixel_by_pixel(kind: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    picture = Image.fromarray(pixels)
    file = encode(picture)
    (tmp_path / "a.png").write_bytes(file)
    path = tmp_path / "a.png"
    colours = [path, str(path), file, bytearray(file), memoryview(file), picture, pixels, pixels[:, ::-1][:, ::-1]]
    grey = pixels[..., 0]
    greys = [grey, Image.fromarray(grey)]
    async with serving() as service, asking(kind, service) as ask:
        for images, expected in ((colours, pixels), (greys, np.repeat(grey[..., None], 3, axis=2))):
            best = class_of(expected.tobytes(), (0, 0, 0))
            assert [(await ask("classify", image)).top.index for image in images] == [best] * len(images)
            assert [answer.top.index for answer in await ask("classify_all", images)] == [best] * len(images)


@BOTH
async def test_several_images_share_one_request_and_one_r(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(grey_png(1))
    (tmp_path / 'b "\u00e9\udcff.png').write_bytes(grey_png(2))
    paths = sorted(tmp_path.iterdir())
    async with serving() as service, asking(kind, service) as ask:
        found = await ask("classify_all", [*paths, grey_png(3)], r=[8, 4], top_k=1)
        assert [each.top.index for each in found] == [class_of_grey(grey, (8, 4, 0)) for grey in (1, 2, 3)]
        assert [each.filename for each in found] == ["a.png", 'b "\u00e9\ufffd.png', None]
        assert {each.r for each in found} == {(8, 4, 0)}
        assert len({each.timings_ms for each in found}) == 1


@BOTH
@pytest.mark.parametrize("images", ["a.png", PNG, [], np.zeros((8, 8, 3), np.uint8), iter([PNG])], ids=type)
async def test_what_is_not_several_images_is_refused(kind: str, images: Any) -> None:
    async with serving() as service, asking(kind, service) as ask:
        with pytest.raises((TypeError, ValueError), match="images is"):
            await ask("classify_all", images)


@BOTH
@pytest.mark.parametrize(
    ("asked", "schedule"),
    [
        ({}, (5, 5, 5)),
        ({"r": None, "top_k": None}, (5, 5, 5)),
        ({"r": 0}, (0, 0, 0)),
        ({"r": [3]}, (3, 0, 0)),
        ({"r": (1, 2, 3)}, (1, 2, 3)),
        ({"r": "8,4"}, (8, 4, 0)),
        ({"r": np.int64(7)}, (7, 7, 7)),
        ({"r": 4, "inflect": -1}, (8, 4, 0)),
    ],
    ids=str,
)
async def test_every_way_to_say_r_reaches_the_device(
    kind: str, asked: dict[str, Any], schedule: tuple[int, ...]
) -> None:
    async with serving(r=5) as service, asking(kind, service) as ask:
        answer = await ask("classify", PNG, **asked)
        assert answer.r_source == ("request" if asked.get("r") is not None else "deployment")
        assert answer.top.index == class_of_grey(100, schedule)
        assert [key.schedule for key, _ in service.device.batches] == [schedule]


@BOTH
async def test_an_answer_says_whether_tuned_numbers_computed_it(kind: str) -> None:
    async with serving(models=[model_info(tuned=((3, 4), (6, 8)))]) as service, asking(kind, service) as ask:
        answers = [await ask("classify", PNG, r=r) for r in (0, 2, 3, 5, 8, [8, 1, 0], [8, 0, 0])]
        assert [answer.tuned for answer in answers] == [False, False, True, False, True, True, True]
        assert (await ask("model", "tiny")).tuned == ((3, 4), (6, 8))


@BOTH
async def test_auto_says_why_it_took_its_r(kind: str) -> None:
    steps = [Rung((0,) * 3, image_s=1e-3, agreement=1.0), Rung((8,) * 3, image_s=1e-4, agreement=0.9)]
    async with serving(steps=steps) as service, asking(kind, service) as ask:
        answer = await ask("classify", PNG, r="auto", max_r=8, min_agreement=0.5)
        assert (answer.auto.reason, answer.auto.expected_agreement, answer.r) == ("idle", 1.0, 0)
        with pytest.raises(InvalidError, match="min_agreement"):
            await ask("classify", PNG, r="auto", min_agreement=1.5)


@BOTH
async def test_models_are_described_and_their_r_is_changed(kind: str) -> None:
    async with serving(models=[model_info(), model_info("large")], r=2) as service, asking(kind, service) as ask:
        listed = await ask("models")
        assert [(each.name, each.is_default, each.r) for each in listed] == [("tiny", True, 2), ("large", False, 2)]
        model = await ask("model", "large")
        assert (model.classes[3], model.input_size, model.max_r, model.backend) == ("label 3", (8, 8), 8, None)
        assert model.token_counts[4] == (17, 13, 9, 5)
        changed = await ask("set_r", "large", (8, 4), if_version=model.config_version)
        assert changed == answers.ModelSummary("large", "vit_fake", "fake", False, (8, 4, 0), None, 2)
        assert (await ask("classify", PNG, model="large")).r == (8, 4, 0)
        assert (await ask("classify", PNG)).r == 2
        with pytest.raises(ConflictError) as conflict:
            await ask("set_r", "large", 1, if_version=model.config_version)
        assert conflict.value.details == {"config_version": 2}
        ramp = await ask("set_r", "large", 4, inflect=-1)
        assert (ramp.r, ramp.config_version) == ((8, 4, 0), 3)
        auto = await ask("set_r", "large", "auto", max_r=4, min_agreement=0.9)
        assert (auto.r, auto.auto) == ("auto", answers.AutoBounds(4, 0.9))
        assert (await ask("models"))[1] == answers.ModelSummary(
            "large", "vit_fake", "fake", False, "auto", auto.auto, 4
        )


@BOTH
async def test_a_curve_is_told(kind: str) -> None:
    async with serving(curve=fake_curve()) as service, asking(kind, service) as ask:
        curve = await ask("curve", "tiny")
        assert curve.model == "tiny"
        assert curve.speed_from == answers.SpeedFrom("abacus", "torch", "fp32", "2026-11-22")
        assert curve.agreement_from == answers.AgreementFrom("abacus", "torch", "fp32", "2026-11-22", 100)
        assert [(row.r, row.schedule, row.agreement, row.top1) for row in curve.rows] == [
            (0, (0, 0, 0), 1.0, 0.8),
            (4, (4, 4, 4), 0.96, 0.75),
            (8, (8, 8, 8), 0.9, 0.7),
        ]
        assert curve.rows[1].batch_s == answers.BatchSeconds(0.25, 0.5)


@BOTH
@pytest.mark.parametrize(
    ("kind_of_error", "match", "call"),
    [
        (UndecodableError, "empty", ("classify", {"image": b""})),
        (UnsupportedError, "not an image", ("classify", {"image": b"no image"})),
        (NotFoundError, "'huge'", ("classify", {"image": PNG, "model": "huge"})),
        (NotFoundError, "'../tiny'", ("classify", {"image": PNG, "model": "../tiny"})),
        (NotFoundError, "Not Found", ("model", {"name": "../../metrics"})),
        (NotFoundError, "'huge'", ("set_r", {"name": "huge", "r": 1})),
        (NotFoundError, "curve", ("curve", {"name": "tiny"})),
        (TooLargeError, "at most 2", ("classify_all", {"images": [PNG] * 3})),
        (InvalidError, "between 0 and 8", ("classify", {"image": PNG, "r": 9})),
        (InvalidError, "between 0 and 8", ("set_r", {"name": "tiny", "r": 9})),
        (InvalidError, "no parameter 'speed'", ("classify", {"image": PNG, "speed": 2})),
        (InvalidError, "deadline_ms", ("classify", {"image": PNG, "deadline_ms": -1})),
        (InvalidError, "deadline_ms", ("classify", {"image": PNG, "deadline_ms": float("nan")})),
    ],
)
async def test_what_the_server_refuses_is_raised_in_its_words(
    kind: str, kind_of_error: type[ServerError], match: str, call: tuple[str, dict[str, Any]]
) -> None:
    method, said = call
    async with serving(max_images=2) as service, asking(kind, service) as ask:
        with pytest.raises(kind_of_error, match=match) as raised:
            await ask(method, **said)
        assert raised.value.status == kind_of_error.status
        (note,) = raised.value.__notes__
        assert note.startswith("x-request-id: ")


@BOTH
async def test_an_error_keeps_its_details(kind: str) -> None:
    async with serving() as service, asking(kind, service) as ask:
        with pytest.raises(UnsupportedError) as raised:
            await ask("classify_all", [PNG, b"no image"])
        assert raised.value.details["image"] == 1


@BOTH
async def test_a_deadline_that_passes_is_raised(kind: str) -> None:
    async with serving() as service, asking(kind, service) as ask:
        service.device.gate.clear()
        with pytest.raises(DeadlineError, match=r"0\.02 s"):
            await ask("classify", PNG, deadline_ms=20)


@BOTH
async def test_keys_are_borne(kind: str) -> None:
    async with serving(api_key="user", admin_key="admin") as service:
        async with asking(kind, service) as ask:
            with pytest.raises(UnauthorizedError):
                await ask("models")
        async with asking(kind, service, api_key="user") as ask:
            assert (await ask("classify", PNG)).top.index == class_of_grey(100)
            with pytest.raises(ForbiddenError):
                await ask("set_r", "tiny", 1)
        async with asking(kind, service, api_key="admin") as ask:
            assert (await ask("set_r", "tiny", 1)).r == 1


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "/", ""])
def test_a_url_that_is_none_is_refused(client: type[Client | AsyncClient], url: str) -> None:
    with pytest.raises(ValueError, match="url is"):
        client(url)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (answers.Class, schemas.Class),
        (answers.TimingsMs, schemas.TimingsMs),
        (answers.AutoChoice, schemas.AutoChoice),
        (answers.AutoBounds, schemas.AutoBounds),
        (answers.ModelSummary, schemas.ModelSummary),
        (answers.Backend, schemas.Backend),
        (answers.Model, schemas.ModelDetail),
        (answers.BatchSeconds, schemas.BatchSeconds),
        (answers.CurveNeighbours, schemas.CurveNeighbours),
        (answers.ModelCurveRow, schemas.ModelCurveRow),
        (answers.ModelCurve, schemas.ModelCurve),
        (answers.SpeedFrom, schemas.SpeedFrom),
        (answers.AgreementFrom, schemas.AgreementFrom),
    ],
)
def test_the_client_knows_every_field_of_an_answer(ours: Any, theirs: type[BaseModel]) -> None:
    of_openai = schemas.ModelCard.model_fields
    assert [each.name for each in fields(ours)] == [name for name in theirs.model_fields if name not in of_openai]


def test_the_client_knows_every_field_of_a_classification() -> None:
    told = {*schemas.ImageResult.model_fields, *schemas.Classification.model_fields} - {"results"}
    assert {each.name for each in fields(Answer)} == told


def test_a_missing_httpx_is_said_with_the_remedy() -> None:
    script = "import sys; sys.modules['httpx'] = None; import server.client"
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].endswith("server.client needs httpx: pip install 'tome-server[client]'")
