"""What holds for every protocol beside our own API: keys, the dial, limits, errors in its shape, its description."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import REGISTRY

from tests.server.conftest import assert_is_error, model_info, serving, until
from tests.server.faces import ASKED, B64, CHECKS, EVERY, PROTOCOLS, SAID, ask, message_of, url_of
from tests.server.test_json_body import AMPLIFIED, STRANGE
from tests.server.test_openapi import assert_described, description

ALL: dict[str, Any] = {"protocol": PROTOCOLS}
JSON = {"content-type": "application/json"}


def test_every_face_is_tested() -> None:
    assert ASKED.keys() == SAID.keys() == set(PROTOCOLS)


@pytest.mark.parametrize("face", PROTOCOLS)
async def test_a_face_has_the_routes_that_are_tested_and_no_others_when_it_is_on_alone(face: str) -> None:
    async with serving(protocol="none") as service:
        ours = {(method, route.path) for route in service.app.state.routes for method in route.methods}
    async with serving(protocol=face) as service:
        all_routes = {(method, route.path) for route in service.app.state.routes for method in route.methods}
    checks = ("/ping",) if face == "sagemaker" else CHECKS.get(face, ())
    assert all_routes - ours == {*ASKED[face], *(("GET", path) for path in checks)}


@pytest.mark.parametrize(("face", "method", "path"), EVERY)
async def test_a_face_that_is_off_is_not_there(face: str, method: str, path: str) -> None:
    async with serving(protocol="none") as service:
        response = await ask(service, face, method, path)
        assert response.status_code in (404, 405)
        assert_is_error(response, response.status_code, response.json()["error"]["code"])


@pytest.mark.parametrize(("face", "method", "path"), EVERY)
async def test_an_answer_is_as_described_and_says_how_it_was_computed(face: str, method: str, path: str) -> None:
    async with serving(r=2, **ALL) as service:
        response = await ask(service, face, method, path)
        assert response.status_code == 200, response.text
        assert (response.headers["x-r"], response.headers["x-batch-size"]) == ("2", "1")
        document = await description(service)
        assert_described(document, method, path, response)
        assert document["paths"][path][method.lower()]["tags"] == [face]
        titles = {tag["name"]: tag["x-displayName"] for tag in document["tags"]}
        assert titles[face]


@pytest.mark.parametrize(("face", "method", "path"), EVERY)
async def test_two_headers_of_the_dial_are_refused(face: str, method: str, path: str) -> None:
    async with serving(**ALL) as service:
        response = await ask(service, face, method, path, headers=[("x-r", "8"), ("x-r", "4")])
        assert response.status_code == 422, response.text
        assert "'8' and '4' in two headers x-r" in message_of(response, face)


@pytest.mark.parametrize(("face", "method", "path"), EVERY)
async def test_the_dial_turns_by_header_and_by_query_but_not_by_both(face: str, method: str, path: str) -> None:
    async with serving(**ALL) as service:
        for said in ({"headers": {"x-r": "8,4"}}, {"params": {"r": "8,4"}}):
            response = await ask(service, face, method, path, **said)
            assert (response.status_code, response.headers["x-r"]) == (200, "8,4,0"), response.text
        assert [key.schedule for key, _ in service.device.batches] == [(8, 4, 0)] * 2
        auto = await ask(service, face, method, path, headers={"x-r": "auto"}, params={"max_r": "4"})
        assert (auto.status_code, auto.headers["x-r"]) == (200, "0")
        both = await ask(service, face, method, path, headers={"x-r": "8"}, params={"r": "4"})
        assert both.status_code == 422 and "give it once" in message_of(both, face)


@pytest.mark.parametrize(("face", "method", "path"), EVERY)
@pytest.mark.parametrize("keys", [{"api_key": "user"}, {"api_key": "user", "admin_key": "admin"}], ids=str)
async def test_images_need_the_users_key(face: str, method: str, path: str, keys: dict[str, Any]) -> None:
    async with serving(**ALL, **keys) as service:
        signed = (
            "AWS4-HMAC-SHA256 Credential=user/20261126/us-east-1/sagemaker/aws4_request, SignedHeaders=h, Signature=0"
        )
        for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "user"}, {"authorization": signed}):
            refused = await ask(service, face, method, path, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert "key" in message_of(refused, face)
            assert_described(await description(service), method, path, refused)
        for key in keys.values():
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key, "authorization": signed}):
                assert (await ask(service, face, method, path, headers=headers)).status_code == 200
        operation = (await description(service))["paths"][path][method.lower()]
        assert operation["security"]


@pytest.mark.parametrize(("face", "path"), [(face, path) for face, paths in CHECKS.items() for path in paths])
async def test_a_check_needs_no_key_and_says_whether_images_should_come(face: str, path: str) -> None:
    async with serving(**ALL, api_key="user") as service:
        ready = await service.client.get(path)
        assert ready.status_code == 200
        assert_described(await description(service), "GET", path, ready)
        service.device.broken = RuntimeError("lost")
        broken = await service.client.get(path)
        assert broken.status_code == 503 and broken.headers["retry-after"] and message_of(broken, face)
        service.device.broken = None
        service.app.state.is_draining = True
        ending = await service.client.get(path)
        assert ending.status_code == 503 and "shutting down" in message_of(ending, face)


@pytest.mark.parametrize(("face", "method", "path"), EVERY)
async def test_garbage_is_refused_in_the_shape_of_the_face(face: str, method: str, path: str) -> None:
    async with serving(max_body_bytes=8 << 20, **ALL) as service:
        document = await description(service)
        for name, body in (AMPLIFIED | {name: body for name, (body, _) in STRANGE.items()}).items():
            said = body.replace(b'"images"', b'"instances"' if face in ("kserve", "vertex") else b'"inputs"')
            refused = await service.client.request(method, url_of(path), content=said, headers=JSON)
            assert refused.status_code in (400, 413, 422), (name, refused.text[:300])
            assert len(message_of(refused, face)) <= 1000
            assert_described(document, method, path, refused)
        raw = {"content-type": "image/png"}
        for said, headers in ((b"", raw), (b"\x89PNG", raw), (b"--x--", {"content-type": "multipart/form-data"})):
            refused = await service.client.request(method, url_of(path), content=said, headers=headers)
            assert refused.status_code in (400, 415, 422) and message_of(refused, face)
        assert (await ask(service, face, method, path)).status_code == 200


@pytest.mark.parametrize(("face", "method", "path"), EVERY)
@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"r": "9"}, "between 0 and 8"),
        ({"r": "x"}, "r is 'x'"),
        ({"odd": "1"}, "there is no parameter 'odd'"),
        ({"deadline_ms": "0"}, "deadline_ms"),
        ({"inflect": "1"}, "inflect goes with an r"),
    ],
)
async def test_a_wrong_parameter_is_named(face: str, method: str, path: str, query: dict[str, str], words: str) -> None:
    async with serving(**ALL) as service:
        refused = await ask(service, face, method, path, params=query)
        assert refused.status_code == 422 and words in message_of(refused, face)


@pytest.mark.parametrize(("face", "method", "path"), EVERY)
async def test_what_is_too_much_fails_or_comes_too_late_is_said_in_the_shape_of_the_face(
    face: str, method: str, path: str
) -> None:
    async with serving(max_queue_size=1, **ALL) as service:
        service.device.gate.clear()
        first = asyncio.create_task(ask(service, face, method, path, headers={"x-r": "1"}))
        await until(lambda: len(service.device.batches) == 1)
        full = await ask(service, face, method, path)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1 and message_of(full, face)
        service.device.gate.set()
        assert (await first).status_code == 200
        service.device.gate.clear()
        late = await ask(service, face, method, path, params={"deadline_ms": "20"})
        assert late.status_code == 504 and "no answer within" in message_of(late, face)
        service.device.gate.set()
        service.device.failure = RuntimeError("boom")
        failed = await ask(service, face, method, path)
        assert failed.status_code == 500 and message_of(failed, face)
        too_long = await ask(service, face, method, path, headers={"content-length": str(1 << 40)})
        assert too_long.status_code == 413 and message_of(too_long, face)


@pytest.mark.parametrize(("face", "method", "path"), EVERY)
async def test_requests_are_counted_by_model_and_r(face: str, method: str, path: str) -> None:
    def count() -> float:
        labels = {"model": "tiny", "r": "3", "code": "200"}
        return REGISTRY.get_sample_value("tome_requests_total", labels) or 0.0

    async with serving(**ALL) as service:
        before = count()
        await ask(service, face, method, path, headers={"x-r": "3"})
        assert count() == before + 1


@pytest.mark.parametrize(("face", "method", "path"), [each for each in EVERY if "{name}" in each[2]])
async def test_a_model_that_is_not_there_is_a_404(face: str, method: str, path: str) -> None:
    async with serving(**ALL) as service:
        url = path.replace("{name}", "huge").replace("{version}", "1")
        response = await service.client.request(method, url, **ASKED[face][method, path])
        if path.startswith("/endpoints/"):  # whose name is no model's
            assert response.status_code == 200
        else:
            assert response.status_code == 404 and "there are: tiny" in message_of(response, face)


@pytest.mark.parametrize(("face", "method", "path"), [each for each in EVERY if "{name}" in each[2]])
async def test_the_model_is_said_in_the_path_or_as_a_parameter_as_described(face: str, method: str, path: str) -> None:
    async with serving(protocol=face) as service:
        operation = str((await description(service))["paths"][path][method.lower()])
        again = await ask(service, face, method, path, params={"model": "tiny"})
        is_described = "A name from /v1/models" in operation
        assert "'r'" in operation
        if path.startswith("/endpoints/"):  # the name of an endpoint, not of a model
            assert is_described and again.status_code == 200
        else:
            assert not is_described and again.status_code == 422
            assert "'model': given in two places" in message_of(again, face)


@pytest.mark.parametrize(("face", "method", "path"), [each for each in EVERY if each[0] != "embeddings"])
async def test_a_model_without_a_classifier_says_what_it_gives_instead(face: str, method: str, path: str) -> None:
    async with serving(models=[model_info(labels=())], **ALL) as service:
        refused = await ask(service, face, method, path)
        assert refused.status_code == 422
        assert "no classifier" in message_of(refused, face) and "/v1/embeddings" in message_of(refused, face)


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/embeddings", "input"), ("/models/tiny", "inputs"), ("/invocations", "inputs"), ("/predict", "instances")],
)
async def test_a_list_may_hold_so_many_images(path: str, field: str) -> None:
    async with serving(max_images=3, **ALL) as service:
        many = await service.client.post(path, json={field: [B64] * 4})
        assert many.status_code == 413 and "at most 3" in many.text
        none = await service.client.post(path, json={field: []})
        assert none.status_code in (400, 422)
        several = await service.client.post(path, json={field: [B64, f"data:image/png;base64,{B64}"]})
        assert several.status_code == 200, several.text
        assert sum(len(items) for _, items in service.device.batches) == 2


async def test_ping_is_one_route_where_two_faces_have_it() -> None:
    async with serving(protocol="torchserve sagemaker") as service:
        assert (await service.client.get("/ping")).json() == {"status": "Healthy"}
        assert [route.path for route in service.app.state.routes].count("/ping") == 1
    async with serving(protocol="sagemaker") as service:
        assert (await service.client.get("/ping")).status_code == 200


async def test_with_every_protocol_on_each_operation_has_an_id_of_its_own() -> None:
    async with serving(**ALL) as service:
        paths = (await description(service))["paths"]
        ids = [operation["operationId"] for item in paths.values() for operation in item.values()]
        assert len(ids) == len(set(ids))
