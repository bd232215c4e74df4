"""The endpoints, over a fake device: answers, headers, the dial, limits, keys, and errors of one shape."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from server.api import routes
from server.api.decode import decode
from server.engine.engine import LocalEngine
from server.engine.transport import RemoteEngine
from server.errors import ServerError
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
        engine: LocalEngine = service.app.state.engine
        classify = engine.classify

        async def classify_after_a_change(job: Job) -> Prediction:
            await engine.set_r("tiny", len(service.device.batches) + 6, None)
            return await classify(job)

        monkeypatch.setattr(engine, "classify", classify_after_a_change)
        files = [("image", (f"{grey}.png", grey_png(grey))) for grey in (1, 2, 3)]
        body = (await service.client.post("/classify", files=files)).json()
        assert (body["r"], body["r_source"]) == (5, "deployment")
        assert {key.schedule for key, _ in service.device.batches} == {(5, 5, 5)}


def waiting(service: Service) -> int:
    """Images in the engine's queue."""
    count: int = service.app.state.engine._batcher.num_waiting
    return count


RAMP = {"r": 4, "inflect": -1}


@pytest.mark.parametrize(("change", "r"), [({"r": 8}, 8), ({"r": "8,4"}, [8, 4, 0]), (RAMP, [8, 4, 0])])
async def test_a_patched_r_counts_for_the_next_request_and_after_a_restart(
    change: dict[str, Any], r: Any, tmp_path: Path
) -> None:
    async with serving(state_file=tmp_path / "state.json") as service:
        patched = await service.client.patch("/v1/models/tiny", json=change)
        assert (patched.status_code, patched.json()["r"], patched.json()["config_version"]) == (200, r, 2)
        answer = await service.classify(PNG)
        assert (answer.json()["r"], answer.json()["r_source"]) == (r, "deployment")
        assert answer.headers["x-config-version"] == "2"
        assert (await service.classify(PNG, r=1)).json()["r"] == 1
    async with serving(state_file=tmp_path / "state.json") as service:
        assert (await service.classify(PNG)).json()["r"] == r


async def test_a_ramp_that_a_request_may_ask_for_can_be_deployed_too() -> None:
    async with serving() as service:
        asked = await service.classify(PNG, r=8, inflect=-1)
        patched = await service.client.patch("/v1/models/tiny", json={"r": 8, "inflect": -1})
        assert patched.status_code == 200, patched.text
        assert (await service.classify(PNG)).json()["tokens"] == asked.json()["tokens"]


async def test_an_etag_guards_a_change_against_a_race() -> None:
    async with serving() as service:
        etag = (await service.client.get("/v1/models/tiny")).headers["etag"]
        first = await service.client.patch("/v1/models/tiny", json={"r": 1}, headers={"if-match": etag})
        assert first.status_code == 200 and first.headers["etag"] != etag
        second = await service.client.patch("/v1/models/tiny", json={"r": 2}, headers={"if-match": etag})
        assert_is_error(second, 409, "conflict")
        assert second.json()["error"]["details"] == {"config_version": 2}
        anyway = await service.client.patch("/v1/models/tiny", json={"r": 3}, headers={"if-match": "*"})
        assert anyway.json()["r"] == 3
        again = await service.client.get("/v1/models/tiny")
        assert (again.headers["etag"], again.json()["r"]) == (anyway.headers["etag"], 3)


@pytest.mark.parametrize("if_match", [b'W/"1"', b'"one"', b'"-1"', b'"1", "2"', b'"\xb2"', b'"' + b"9" * 5000 + b'"'])
async def test_an_if_match_that_is_no_etag_is_refused(if_match: bytes) -> None:
    async with serving() as service:
        response = await service.client.patch("/v1/models/tiny", json={"r": 1}, headers={b"if-match": if_match})
        assert response.status_code in (409, 422)
        assert_is_error(response, response.status_code, response.json()["error"]["code"])
        assert (await service.client.get("/v1/models/tiny")).json()["r"] == 0


async def test_the_models_are_described() -> None:
    async with serving(models=[model_info(), model_info("large")], r=2) as service:
        listed = (await service.client.get("/v1/models")).json()["models"]
        assert [(each["name"], each["is_default"], each["r"]) for each in listed] == [
            ("tiny", True, 2),
            ("large", False, 2),
        ]
        detail = (await service.client.get("/v1/models/large")).json()
        assert {name: detail[name] for name in listed[1]} == listed[1]
        assert detail["classes"][3] == "label 3" and detail["num_classes"] == len(detail["classes"]) == NUM_CLASSES
        assert (detail["input_size"], detail["num_blocks"], detail["min_r"], detail["max_r"]) == ([8, 8], 3, 0, 8)
        assert detail["token_counts"].keys() == {str(r) for r in range(9)}
        assert detail["token_counts"]["4"] == [17, 13, 9, 5]
        assert_is_error(await service.client.get("/v1/models/huge"), 404, "not_found")
        assert_is_error(await service.client.patch("/v1/models/huge", json={"r": 1}), 404, "not_found")


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
        await until(lambda: service.app.state.admission._in_flight == 2)
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
        assert service.app.state.admission._in_flight == 0
        assert REGISTRY.get_sample_value("tome_in_flight_images") == gauge


async def test_a_batch_that_fails_is_a_500_and_the_next_request_works() -> None:
    async with serving() as service:
        service.device.failure = RuntimeError("the device burns")
        assert_is_error(await service.classify(PNG, status=500), 500, "engine_error")
        service.device.failure = None
        await service.classify(PNG)


USER, ADMIN = "user-key", "admin-key"


def bearing(key: str | None, *, bearer: bool = True) -> dict[str, str]:
    if key is None:
        return {}
    return {"authorization": f"Bearer {key}"} if bearer else {"x-api-key": key}


@pytest.mark.parametrize("bearer", [True, False])
@pytest.mark.parametrize(
    ("api_key", "admin_key", "borne", "reading", "changing"),
    [
        (None, None, None, 200, 200),
        (None, None, "any", 200, 200),
        (USER, None, None, 401, 401),
        (USER, None, "wrong", 401, 401),
        (USER, None, "userkey\xe9", 401, 401),
        (USER, None, USER, 200, 200),
        (USER, ADMIN, None, 401, 401),
        (USER, ADMIN, USER, 200, 403),
        (USER, ADMIN, ADMIN, 200, 200),
        (None, ADMIN, None, 200, 403),
        (None, ADMIN, USER, 200, 403),
        (None, ADMIN, ADMIN, 200, 200),
    ],
)
async def test_keys_open_what_they_should(
    api_key: str | None, admin_key: str | None, borne: str | None, reading: int, changing: int, bearer: bool
) -> None:
    async with serving(api_key=api_key, admin_key=admin_key) as service:
        headers = {name.encode(): value.encode("latin-1") for name, value in bearing(borne, bearer=bearer).items()}
        reads = [
            await service.client.post("/classify", files=FORM, headers=headers),
            await service.client.get("/v1/models", headers=headers),
            await service.client.get("/v1/models/tiny", headers=headers),
        ]
        change = await service.client.patch("/v1/models/tiny", json={"r": 1}, headers=headers)
        for response, status in [*((each, reading) for each in reads), (change, changing)]:
            assert response.status_code == status
            if status >= 400:
                assert_is_error(response, status, "unauthorized" if status == 401 else "forbidden")
            assert ("www-authenticate" in response.headers) == (status == 401)
        for path in ("/livez", "/readyz", "/healthz", "/metrics"):
            assert (await service.client.get(path)).status_code == 200


async def test_a_ready_service_says_so() -> None:
    async with serving() as service:
        assert (await service.client.get("/livez")).status_code == 200
        for path in ("/readyz", "/healthz"):
            assert (await service.client.get(path)).json() == {"status": "ready", "models": ["tiny"]}


async def test_without_an_engine_the_service_lives_and_is_not_ready(tmp_path: Path) -> None:
    remote = RemoteEngine(str(tmp_path / "none"))
    async with serving(engine=remote) as service:
        assert (await service.client.get("/livez")).status_code == 200
        answers = [await service.client.get(path) for path in ("/readyz", "/healthz", "/v1/models", "/v1/models/tiny")]
        answers.append(await service.classify(PNG, status=503))
        for answer in answers:
            assert_is_error(answer, 503, "unavailable")
            assert int(answer.headers["retry-after"]) >= 1


async def test_the_openapi_document_lists_parameters_and_bodies_and_errors() -> None:
    async with serving() as service:
        document = (await service.client.get("/openapi.json")).json()
        operation = document["paths"]["/classify"]["post"]
        listed = {each["name"]: each for each in operation["parameters"] if each["in"] == "query"}
        assert listed.keys() == {"model", "r", "inflect", "top_k", "deadline_ms"}
        assert all(each["description"] for each in listed.values())
        assert operation["requestBody"]["content"].keys() == {"multipart/form-data", "image/*", "application/json"}
        assert {"400", "413", "415", "422", "429", "503", "504"} <= operation["responses"].keys()
        assert {"/v1/models", "/v1/models/{name}", "/livez", "/readyz", "/metrics"} <= document["paths"].keys()
        docs = await service.client.get("/docs")
        assert docs.status_code == 200 and "text/html" in docs.headers["content-type"]


async def test_an_unknown_path_and_a_wrong_method_have_the_one_error_shape() -> None:
    async with serving() as service:
        assert_is_error(await service.client.get("/nothing"), 404, "not_found")
        wrong = await service.client.get("/classify")
        assert_is_error(wrong, 405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"


async def test_an_unforeseen_exception_is_a_500_of_the_one_shape_that_tells_nothing_inside(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as service:

        async def explode(model: str) -> None:
            raise ZeroDivisionError("secret inner detail")

        monkeypatch.setattr(service.app.state.engine, "deployment", explode)
        response = await service.client.get("/v1/models/tiny")
        assert "secret" not in assert_is_error(response, 500, "internal")
        logged = [record for record in caplog.records if response.headers["x-request-id"] in record.getMessage()]
        assert logged and logged[0].exc_info
        await service.classify(PNG)


BAD_R = [
    b'"x"',
    b"9",
    b"-1",
    b"NaN",
    b"Infinity",
    b"null",
    b"true",
    b"[1, 1, 1, 1]",
    b'"\\ud800"',
    b"[" * 900 + b"]" * 900,
]
BAD_INFLECT = [b"2", b"NaN", b'"x"']
BAD_PATCHES = [b"", b"{", b"[]", b'"r"', b"{}", b'{"q": 1}', b'{"r": 1, "q": 1}', b"\xff", b"[" * 100_000]
BAD_PATCHES += [b'{"r": 1, "\\ud800": 1}']
BAD_PATCHES += [b'{"r": %s}' % r for r in BAD_R] + [b'{"r": 1, "inflect": %s}' % inflect for inflect in BAD_INFLECT]


@pytest.mark.parametrize("body", BAD_PATCHES, ids=lambda body: ascii(body[:30]))
async def test_a_bad_patch_is_refused_and_changes_nothing(body: bytes) -> None:
    async with serving() as service:
        headers = {"content-type": "application/json"}
        response = await service.client.patch("/v1/models/tiny", content=body, headers=headers)
        assert response.status_code in (400, 422), response.text
        assert_is_error(response, response.status_code, response.json()["error"]["code"])
        assert (await service.client.get("/v1/models/tiny")).json()["r"] == 0


async def test_a_patch_over_the_byte_cap_is_a_413() -> None:
    async with serving(max_body_bytes=100) as service:
        response = await service.client.patch("/v1/models/tiny", json={"r": "1" * 200})
        assert_is_error(response, 413, "too_large")


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
        assert service.app.state.admission._in_flight == 0
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

    def decode_for_long(encoded: bytes, **options: Any) -> bytes:
        decoding.set()
        done.wait()
        return decode(encoded, **options)

    async with serving() as service:
        monkeypatch.setattr(routes, "decode", decode_for_long)
        late = await service.classify(PNG, status=504, deadline_ms=50)
        assert (late.json()["error"]["code"], decoding.is_set()) == ("deadline_exceeded", True)
        done.set()
        assert service.device.batches == []
        assert service.app.state.admission._in_flight == 0


@pytest.mark.parametrize("header", ["Bearer secret", "bearer secret", "BEARER  secret"])
async def test_the_scheme_of_a_key_is_read_in_any_case(header: str) -> None:
    async with serving(api_key="secret") as service:
        response = await service.client.get("/v1/models", headers={"authorization": header})
        assert response.status_code == 200


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


def test_the_error_table_is_that_of_the_architecture_page() -> None:
    table = {kind.code: kind.status for kind in ServerError.__subclasses__()}
    assert table == {
        "undecodable": 400,
        "unauthorized": 401,
        "forbidden": 403,
        "not_found": 404,
        "conflict": 409,
        "too_large": 413,
        "unsupported_format": 415,
        "invalid_parameter": 422,
        "queue_full": 429,
        "client_gone": 499,
        "engine_error": 500,
        "unavailable": 503,
        "deadline_exceeded": 504,
    }
