"""The endpoints of the models: descriptions, and the deployment's `r` changed live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import (
    NUM_CLASSES,
    assert_is_error,
    grey_png,
    model_info,
    serving,
)

PNG = grey_png(100)
FORM = [("image", ("a.png", PNG))]


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


async def test_a_patch_answers_with_the_new_setting_and_not_with_all_about_the_model() -> None:
    async with serving() as service:
        patched = await service.client.patch("/v1/models/tiny", json={"r": 3})
        (listed,) = (await service.client.get("/v1/models")).json()["models"]
        assert patched.json() == listed and listed["r"] == 3
        assert not {"classes", "token_counts"} & patched.json().keys() and len(patched.content) < 300


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


async def test_a_model_says_what_is_compiled() -> None:
    async with serving() as service:
        assert (await service.client.get("/v1/models/tiny")).json()["compiling"] is None
        service.device.uncompiled = [(8, 8, 8), (1, 2, 3)]
        told = (await service.client.get("/v1/models/tiny")).json()["compiling"]
        assert told == {"r": 8, "done": 1, "total": 3}
        service.device.uncompiled = [(1, 2, 3)]
        assert (await service.client.get("/v1/models/tiny")).json()["compiling"]["r"] == [1, 2, 3]


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
