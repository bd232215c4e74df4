"""`POST /classify` over a fake device: answers, headers, the dial, limits, and clients that leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from PIL import Image
from prometheus_client import REGISTRY

from server.api import asking as asking_of
from server.api import terms
from server.api.admission import Admission
from server.api.patience import at_most
from server.batching.policy import Rung
from server.dial import AutoR, RSetting
from server.errors import ServerError, TooLargeError, UndecodableError, UnsupportedError
from server.images import decoders
from server.images.image import JpegFile, Pixels
from server.images.pillow import read
from server.ipc.messages import Answered, Choice, Classify, Explain, Merges, Reason, TopK
from server.types import ComputedBy
from tests.server.conftest import (
    NUM_CLASSES,
    SIDE,
    Service,
    assert_is_error,
    class_of_grey,
    encode,
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
            "tuned": False,
            "auto": None,
            "tokens": 17 - 4 - 4 - 4,
            "batch_size": 1,
            "config_version": 1,
            "computed_by": {"backend": "openvino", "precision": "bf16"},
        }
        headers = response.headers
        assert (headers["x-r"], headers["x-batch-size"], headers["x-config-version"]) == ("4", "1", "1")
        stages = dict(stage.split(";dur=") for stage in headers["server-timing"].split(", "))
        assert {stage: float(ms) for stage, ms in stages.items()} == pytest.approx(timings, abs=0.006)


async def test_an_answer_names_the_fallback_for_a_schedule_that_is_not_compiled() -> None:
    async with serving() as service:
        service.device.uncompiled = [(4, 4, 4)]
        for path in ("/classify", "/v1/explain"):
            said = [
                (await service.client.post(path, files=FORM, params={"r": r})).json()["computed_by"] for r in (4, 8)
            ]
            assert said == [{"backend": "torch", "precision": "fp32"}, {"backend": "openvino", "precision": "bf16"}]


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


def photos(*greys: int) -> list[tuple[str, tuple[str, bytes]]]:
    """A form of several images, which are named by their brightness."""
    return [("image", (f"{grey}.png", grey_png(grey))) for grey in greys]


async def test_the_images_of_a_request_are_answered_in_order_whatever_batches_they_took() -> None:
    async with serving(batch=2) as service:
        body = (await service.client.post("/classify?top_k=1&r=3", files=photos(9, 1, 5, 7, 3))).json()
        assert [(each["filename"], each["top_k"][0]["index"]) for each in body["results"]] == [
            (f"{grey}.png", class_of_grey(grey, (3, 3, 3))) for grey in (9, 1, 5, 7, 3)
        ]
        assert body["batch_size"] == 2
        assert sorted(len(items) for _, items in service.device.batches) == [1, 2, 2]


@pytest.mark.parametrize("r", [4, AutoR(max_r=4)])
async def test_the_images_of_a_request_share_one_r_and_one_version_even_if_it_changes_between_them(
    r: RSetting,
) -> None:
    """Each is a batch of its own, and the deployment is changed after the first."""
    ladder = [Rung((0, 0, 0)), Rung((4, 4, 4), 0.0, 0.1)]
    async with serving(r=r, batch=1, steps=ladder) as service:
        service.device.gate.clear()
        call = asyncio.create_task(service.client.post("/classify", files=photos(1, 2, 3)))
        await until(lambda: len(service.device.batches) == 1)
        changed = await service.client.patch("/v1/models/tiny", json={"r": 8})
        assert changed.json()["config_version"] == 2
        service.device.gate.set()
        body = (await call).json()
        schedules = {key.schedule for key, _ in service.device.batches}
        assert len(service.device.batches) == 3 and schedules == {(body["r"],) * 3}
        assert body["r"] in (0, 4) and (body["r_source"], body["config_version"]) == ("deployment", 1)
        assert (body["auto"] is not None) == isinstance(r, AutoR)
        after = (await service.client.post("/classify", files=photos(1, 2, 3))).json()
        assert (after["r"], after["config_version"], after["auto"]) == (8, 2, None)


async def test_a_change_while_images_are_decoded_counts_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, go_on = threading.Event(), threading.Event()

    def read_slowly(encoded: bytes, *args: Any) -> Any:
        if encoded == grey_png(2):
            decoding.set()
            go_on.wait()
        return read(encoded, *args)

    async with serving(r=5) as service:
        monkeypatch.setattr(decoders, "read", read_slowly)
        call = asyncio.create_task(service.client.post("/classify", files=photos(1, 2, 3)))
        await until(decoding.is_set)
        await service.client.patch("/v1/models/tiny", json={"r": 8})
        go_on.set()
        body = (await call).json()
        assert (body["r"], body["config_version"], body["r_source"]) == (8, 2, "deployment")
        assert {key.schedule for key, _ in service.device.batches} == {(8, 8, 8)}


@pytest.mark.parametrize("path", ["/classify", "/v1/explain"])
async def test_one_image_that_cannot_be_decoded_is_named_and_none_is_computed(path: str) -> None:
    async with serving() as service:
        files = photos(1) if path == "/classify" else []
        files.append(("image", ("broken.png", PNG[:45])))
        refused = await service.client.post(path, files=files)
        assert_is_error(refused, 400, "undecodable")
        assert refused.json()["error"]["details"] == {"image": len(files) - 1, "filename": "broken.png"}
        assert service.device.batches == []


@pytest.mark.parametrize("path", ["/classify", "/v1/explain"])
@pytest.mark.parametrize("kind", [UndecodableError, UnsupportedError, TooLargeError])
async def test_an_image_that_the_engine_cannot_decode_is_named_too(path: str, kind: type[ServerError]) -> None:
    async with serving() as service, asking(service) as asked:
        asked.failure = kind("the second half is missing", image=0)
        refused = await service.client.post(path, files=[("image", ("cut.jpg", PNG))])
        assert_is_error(refused, kind.status, kind.code)
        assert refused.json()["error"]["details"] == {"image": 0, "filename": "cut.jpg"}


class Asked:
    """What an engine was asked, and what it says instead of an answer, or of its own choice of `r`."""

    def __init__(self) -> None:
        self.requests: list[Classify | Explain] = []
        self.failure: ServerError | None = None
        self.auto: Choice | None = None

    async def answer(self, request: Any) -> Answered[Any]:
        self.requests.append(request)
        if self.failure is not None:
            raise self.failure
        results: list[Any] = [TopK([0] * request.top_k, [0.1] * request.top_k) for _ in request.images]
        if isinstance(request, Explain):
            results = [Merges(top_k, (4, 4), 2, [[0] * 16] * 3) for top_k in results]
        schedule = self.auto.schedule if self.auto else (2, 2, 2)
        return Answered(results, schedule, 41, 7, 0.25, 0.5, ComputedBy("torch", "fp32"), self.auto)


@asynccontextmanager
async def asking(service: Service) -> AsyncIterator[Asked]:
    """Notes what the service asks its engine, which answers at once; the time it has is the test's."""
    asked, patch = Asked(), pytest.MonkeyPatch()
    patch.setattr(service.app.state.service.engine, "answer", asked.answer)
    yield asked
    patch.undo()


@pytest.mark.parametrize(
    ("query", "r", "source"),
    [
        ({}, None, "deployment"),
        ({"r": "3"}, (3, 3, 3), "request"),
        ({"r": "4,2"}, (4, 2, 0), "request"),
        ({"r": "4", "inflect": "-1"}, (8, 4, 0), "request"),
        ({"r": "auto"}, AutoR(), "request"),
        ({"r": "auto", "max_r": "6", "min_agreement": "0.9"}, AutoR(6, 0.9), "request"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("path", "kind"), [("/classify", Classify), ("/v1/explain", Explain)])
async def test_a_request_is_asked_of_the_engine_as_one(
    query: dict[str, str], r: Any, source: str, path: str, kind: type[Classify] | type[Explain]
) -> None:
    async with serving(r=1) as service, asking(service) as asked:
        files = photos(1, 2, 3) if kind is Classify else photos(1)
        response = await service.client.post(path, files=files, params={**query, "top_k": 2})
        assert response.status_code == 200, response.text
        (request,) = asked.requests
        images = [Pixels(bytes([grey]) * (SIDE * SIDE * 3)) for grey in (1, 2, 3)[: len(files)]]
        assert request == kind(model="tiny", images=list(images), r=r, deadline=request.deadline, top_k=2)
        body = response.json()
        assert (body["r"], body["r_source"], body["config_version"]) == (2, source, 41)
        assert (body["timings_ms"]["queue"], body["timings_ms"]["inference"]) == (250, 500)


async def test_a_jpeg_is_left_to_an_engine_that_decodes_and_is_decoded_for_one_that_does_not() -> None:
    jpeg = encode(Image.new("RGB", (40, 30), (7, 7, 7)), "JPEG")
    for decodes in (True, False):
        async with serving(models=[model_info(decodes_jpeg=decodes)]) as service, asking(service) as asked:
            files = [("image", ("a.jpg", jpeg)), ("image", ("b.png", PNG))]
            assert (await service.client.post("/classify", files=files)).status_code == 200
            (request,) = asked.requests
            first, second = request.images
            assert second == Pixels(bytes([100]) * (SIDE * SIDE * 3))
            if decodes:
                assert first == JpegFile(jpeg, 40, 30)
            else:
                assert isinstance(first, Pixels) and len(first.data) == SIDE * SIDE * 3


@pytest.mark.parametrize("reason", get_args(Reason))
@pytest.mark.parametrize("agreement", [None, 0.97])
async def test_an_answer_says_why_auto_took_its_r(reason: Reason, agreement: float | None) -> None:
    async with serving() as service, asking(service) as asked:
        asked.auto = Choice((4, 4, 4), reason, agreement)
        response = await service.classify(PNG, r="auto")
        body = response.json()
        assert body["auto"] == {"reason": reason, "expected_agreement": agreement}
        assert (body["r"], body["tokens"], response.headers["x-r"]) == (4, 5, "4")


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


async def test_a_client_that_hangs_up_while_queued_has_its_request_withdrawn() -> None:
    async with serving() as service:
        service.device.gate.clear()
        first = asyncio.create_task(service.classify(PNG))
        await until(lambda: len(service.device.batches) == 1)
        hangs_up = asyncio.Event()
        sent: list[MutableMapping[str, Any]] = []
        leaving = asyncio.create_task(drive(service, grey_png(1), hangs_up=hangs_up, sent=sent))
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
        await drive(service, PNG[:20], hangs_up=hangs_up, more_body=True)
        assert REGISTRY.get_sample_value("tome_requests_total", labels) == before + 1
        assert "Traceback" not in caplog.text
        assert service.device.batches == []


async def test_the_deadline_holds_while_decoding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, done = threading.Event(), threading.Event()

    def read_for_long(*args: Any) -> Any:
        decoding.set()
        done.wait()
        return read(*args)

    async with serving() as service:
        monkeypatch.setattr(decoders, "read", read_for_long)
        late = await service.classify(PNG, status=504, deadline_ms=50)
        assert (late.json()["error"]["code"], decoding.is_set()) == ("deadline_exceeded", True)
        done.set()
        assert service.device.batches == []
        assert service.app.state.service.admission._in_flight == 0


@pytest.mark.parametrize("path", ["/classify", "/v1/explain"])
async def test_a_body_that_takes_all_of_the_time_is_a_504(path: str) -> None:
    async with serving(deadline_s=0.05) as service:
        sent: list[MutableMapping[str, Any]] = []
        await drive(service, PNG[:20], sent=sent, more_body=True, path=path)
        assert sent[0]["status"] == 504
        assert service.device.batches == [] and service.app.state.service.admission.in_flight == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time as endpoints see it, which stands still unless a test moves `now`; and what they allow for each step.

    `allowed` has the seconds for reading, and for decoding and the engine; `permitted` those that admission is told.
    """
    clock = SimpleNamespace(now=1000.0, allowed=[], permitted=[])
    permit = Admission.permit

    def allow(timeout_s: float, since: float) -> at_most:
        clock.allowed.append(since + timeout_s - clock.now)
        return at_most(clock.allowed[-1])

    def note(self: Admission, images: int, timeout_s: float) -> Any:
        clock.permitted.append(timeout_s)
        return permit(self, images, timeout_s)

    for module in (terms, asking_of):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
        monkeypatch.setattr(module, "at_most", allow)
    monkeypatch.setattr(Admission, "permit", note)
    return clock


@pytest.mark.parametrize(
    ("query", "ends_at", "left_s"), [(b"", 1010.0, 3.0), (b"deadline_ms=8000", 1008.0, 1.0), (b"r=auto", 1010.0, 3.0)]
)
@pytest.mark.parametrize("path", ["/classify", "/v1/explain"])
async def test_the_deadline_counts_reading_and_answering_together(
    path: str, query: bytes, ends_at: float, left_s: float, clock: SimpleNamespace
) -> None:
    """A body takes seven of ten seconds; three are left for the answer."""

    def pass_7_s() -> None:
        clock.now += 7.0

    sent: list[MutableMapping[str, Any]] = []
    async with serving(deadline_s=10) as service, asking(service) as asked:
        await drive(service, PNG[:20], PNG[20:], between=pass_7_s, sent=sent, path=path, query=query)
        assert sent[0]["status"] == 200
        assert [request.deadline for request in asked.requests] == [ends_at]
        assert clock.allowed == [10.0, left_s] and clock.permitted == [left_s]


@pytest.mark.parametrize("path", ["/classify", "/v1/explain"])
async def test_where_reading_took_longer_than_the_client_waits_nothing_is_asked(
    path: str, clock: SimpleNamespace
) -> None:
    def pass_7_s() -> None:
        clock.now += 7.0

    sent: list[MutableMapping[str, Any]] = []
    async with serving(deadline_s=10) as service, asking(service) as asked:
        query = b"deadline_ms=5000"
        await drive(service, PNG[:20], PNG[20:], between=pass_7_s, sent=sent, path=path, query=query)
        assert sent[0]["status"] == 504 and asked.requests == []
        assert service.app.state.service.admission.in_flight == 0


async def drive(
    service: Service,
    *body: bytes,
    hangs_up: asyncio.Event | None = None,
    sent: list[MutableMapping[str, Any]] | None = None,
    more_body: bool = False,
    between: Callable[[], object] = lambda: None,
    path: str = "/classify",
    query: bytes = b"",
) -> None:
    """Sends one raw image as an ASGI server does, in pieces, and then hangs up once that is so.

    Args:
        service: Gets it.
        body: Its pieces.
        hangs_up: The client does, after all of it.
        sent: Gets what is answered.
        more_body: The last piece is not the end.
        between: Is called before every piece but the first.
        path: Of the endpoint.
        query: Its parameters.
    """
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": piece, "more_body": True} for piece in body]
    messages[-1]["more_body"] = more_body

    async def receive() -> dict[str, Any]:
        if messages:
            if len(messages) < len(body):
                between()
            return messages.pop(0)
        await (hangs_up or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if sent is not None:
            sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": [(b"content-type", b"image/png"), (b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await service.app(scope, receive, send)
