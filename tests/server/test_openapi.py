"""The API's description: whole, true of what each route answers, and right about keys and a proxy's path."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from server.api.body import CONTENT_TYPES
from tests.server.conftest import Service, fake_curve, grey_png, model_info, serving
from tests.server.fake_loader import FakeLoader
from tests.server.test_access import KEYS, ROUTES, ask

METHODS = {"get", "post", "patch", "put", "delete", "head", "options"}


async def description(service: Service, **headers: str) -> dict[str, Any]:
    response = await service.client.get("/openapi.json", headers=headers)
    assert response.headers["content-type"] == "application/json"
    document: dict[str, Any] = response.json()
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        yield from ((method.upper(), path, operation) for method, operation in item.items() if method in METHODS)


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        yield from [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        for each in part.values():
            yield from references(each)
    elif isinstance(part, list):
        for each in part:
            yield from references(each)


def assert_described(document: dict[str, Any], method: str, path: str, response: httpx.Response) -> None:
    """The status is listed, with this content type, and the body is as its schema says."""
    answers = document["paths"][path][method.lower()]["responses"]
    answer = answers[str(response.status_code)]
    (content_type,) = answer["content"]
    assert response.headers["content-type"] == content_type
    assert response.headers.keys() >= answer.get("headers", {}).keys()
    schema = answer["content"][content_type]["schema"]
    if content_type == "application/json":
        Draft202012Validator({**schema, "components": document["components"]}).validate(response.json())


async def test_every_reference_leads_somewhere() -> None:
    async with serving() as service:
        document = await description(service)
        found = set(references(document))
        assert "#/components/schemas/PatchModel" in found
        for reference in found:
            place: Any = document
            for step in reference.removeprefix("#/").split("/"):
                place = place[step]
            Draft202012Validator.check_schema(place)
        assert "$defs" not in str(document)


async def test_every_route_is_described_but_the_pages_and_second_names() -> None:
    async with serving(protocol="none") as service:
        described = {(method, path) for method, path, _ in operations(await description(service))}
        without = {"/", "/docs", "/openapi.json", "/healthz", "/v1/classify", "/static/{path:path}"}
        assert described == {(method, path) for method, path in ROUTES if path not in without}


async def test_every_route_answers_as_described() -> None:
    async with serving(curve=fake_curve(), loader=FakeLoader([model_info()]), protocol="none", **KEYS) as service:
        document = await description(service)
        for method, path, operation in operations(document):
            admin = {"x-api-key": KEYS["admin_key"]}
            answers = [await ask(service, method, path, admin), await ask(service, method, path, {})]
            if "{name}" in path:
                answers.append(await service.client.request(method, path.replace("{name}", "none"), headers=admin))
            if operation.get("requestBody"):
                bad = {**admin, "content-type": "application/json"}
                url = path.replace("{name}", "tiny")
                answers += [
                    await service.client.request(method, url, headers=bad, content=b"["),
                    await service.client.request(method, url, headers=bad, content=b'{"odd": 1}'),
                    await service.client.request(method, url, headers=bad | {"content-encoding": "gzip"}, content=b"x"),
                ]
                assert {400, 415, 422} <= {answer.status_code for answer in answers}
            for answer in answers:
                assert_described(document, method, path, answer)


async def test_an_answer_of_each_shape_is_as_described() -> None:
    async with serving() as service:
        document = await description(service)
        for query in ("r=2", "r=1,2,3", "r=auto"):
            for path in ("/classify", "/v1/explain"):
                form = {"image": ("a.png", grey_png())}
                assert_described(document, "POST", path, await service.client.post(f"{path}?{query}", files=form))
        patched = await service.client.patch("/v1/models/tiny", json={"r": "auto", "max_r": 4})
        assert_described(document, "PATCH", "/v1/models/{name}", patched)
        for path in ("/v1/models", "/v1/models/{name}", "/v1/config"):
            response = await service.client.get(path.replace("{name}", "tiny"))
            assert_described(document, "GET", path, response)


@pytest.mark.parametrize("keys", [{}, {"admin_key": "a"}, {"metrics_key": "m"}, {"api_key": "u"}, KEYS], ids=str)
async def test_a_route_that_wants_a_key_says_so(keys: dict[str, Any]) -> None:
    async with serving(curve=fake_curve(), loader=FakeLoader([model_info()]), protocol="none", **keys) as service:
        document = await description(service)
        assert ("securitySchemes" in document["components"]) == bool(keys)
        for method, path, operation in operations(document):
            refused = (await ask(service, method, path, {})).status_code in (401, 403)
            assert ("security" in operation) == refused, (method, path)
            for requirement in operation.get("security", ()):
                assert requirement.keys() <= document["components"]["securitySchemes"].keys()


async def test_the_document_lists_parameters_and_bodies_and_errors() -> None:
    async with serving() as service:
        operation = (await description(service))["paths"]["/classify"]["post"]
        listed = {each["name"]: each for each in operation["parameters"] if each["in"] == "query"}
        dial, classes = {"r", "max_r", "min_agreement", "inflect"}, {"top_k", "function_to_apply", "threshold"}
        assert listed.keys() == {"model", "deadline_ms"} | dial | classes
        assert all(each["description"] for each in listed.values())
        assert operation["requestBody"]["content"].keys() == set(CONTENT_TYPES)
        form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert form["properties"].keys() == {"image", *listed} and form["additionalProperties"] is False
        assert {"400", "413", "415", "422", "429", "503", "504"} <= operation["responses"].keys()


R_VALUES = [2, "2", "2,1", "auto", [2, 1], None, True, -1, 1.5, {}, [], [None], [-1]]


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        *(("POST", "/classify", {"r": r}) for r in R_VALUES),
        *(("PATCH", "/v1/models/{name}", {"r": r}) for r in R_VALUES),
        *(("POST", "/classify", {"r": 2, "inflect": value}) for value in (-1, 1, None, 1.5, -7)),
        *(("PATCH", "/v1/models/{name}", {"r": 2, "inflect": value}) for value in (-1, 1, None, 1.5, -7)),
        ("POST", "/classify", {"images": []}),
    ],
    ids=str,
)
async def test_a_body_is_taken_where_the_document_allows_it(method: str, path: str, said: dict[str, Any]) -> None:
    async with serving() as service:
        document = await description(service)
        schema = document["paths"][path][method.lower()]["requestBody"]["content"]["application/json"]["schema"]
        body = said if method == "PATCH" else {"images": [base64.b64encode(grey_png()).decode()], **said}
        allowed = Draft202012Validator({**schema, "components": document["components"]}).is_valid(body)
        answer = await service.client.request(method, path.replace("{name}", "tiny"), json=body)
        assert answer.status_code == 200 if allowed else answer.status_code in (400, 422)


@pytest.mark.parametrize("if_match", ["*", '"1"', "1", '"', "one", 'W/"1"', "null", '"-1"', '"1234567890123456789"'])
async def test_an_if_match_is_taken_where_the_document_allows_it(if_match: str) -> None:
    async with serving() as service:
        for path in ("/v1/models/{name}", "/v1/config"):
            (header,) = (
                each
                for each in (await description(service))["paths"][path]["patch"]["parameters"]
                if each["in"] == "header"
            )
            allowed = Draft202012Validator(header["schema"]).is_valid(if_match)
            said: dict[str, Any] = {"r": 1} if "{name}" in path else {"models": {"tiny": {"r": 1}}}
            answer = await service.client.patch(
                path.replace("{name}", "tiny"), json=said, headers={"if-match": if_match}
            )
            assert (answer.status_code in (200, 409)) == allowed and (answer.status_code == 422) != allowed


@pytest.mark.parametrize(
    ("prefix", "servers"),
    [
        ("/tome", [{"url": "/tome"}]),
        ("/a/tome-1/", [{"url": "/a/tome-1"}]),
        ("/", None),
        ("", None),
        ("tome", None),
        ("//evil.example.org", None),
        ("https://evil.example.org", None),
        ('/"><script>', None),
    ],
)
async def test_the_path_under_which_a_proxy_puts_it_is_told(prefix: str, servers: Any) -> None:
    async with serving() as service:
        assert (await description(service, **{"x-forwarded-prefix": prefix})).get("servers") == servers
        assert "servers" not in await description(service)


async def test_an_application_under_a_path_answers_there() -> None:
    async with serving() as service:
        transport = httpx.ASGITransport(service.app, root_path="/tome")  # as Ray Serve and mounts do
        async with httpx.AsyncClient(transport=transport, base_url="http://test/tome/") as client:
            assert (await client.get("openapi.json")).json()["servers"] == [{"url": "/tome"}]
            for address in ("docs", "static/docs.js", "v1/models"):
                assert (await client.get(address)).status_code == 200, address
            form = {"image": ("a.png", grey_png())}
            assert (await client.post("classify", files=form)).status_code == 200
            assert (await client.delete("v1/models/tiny")).headers["allow"] == "GET, HEAD, PATCH"
