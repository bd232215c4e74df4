"""Request bodies: forms, raw images and JSON mean the same; parameters may stand anywhere, once."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.api.body import from_base64
from server.errors import UndecodableError
from tests.server.conftest import Service, assert_is_error, class_of_grey, encode, grey_png, model_info, serving

PNG = grey_png(100)
BASE64 = base64.b64encode(PNG).decode()


def indices(response: httpx.Response) -> list[int]:
    """The likeliest class of each image."""
    assert response.status_code == 200, response.text
    return [result["top_k"][0]["index"] for result in response.json()["results"]]


def image_part(grey: int = 100, filename: str = "a.png") -> tuple[str, tuple[str, bytes]]:
    return "image", (filename, grey_png(grey))


async def test_a_form_with_one_image() -> None:
    async with serving() as service:
        response = await service.client.post("/classify", files=[image_part()])
        assert indices(response) == [class_of_grey(100)]
        assert response.json()["results"][0]["filename"] == "a.png"


async def test_a_form_with_several_images_answers_each_in_order() -> None:
    async with serving(batch=2) as service:
        greys = [5, 250, 100, 5, 17]
        parts = [image_part(grey, f"{grey}.png") for grey in greys]
        response = await service.client.post("/classify", files=parts)
        assert indices(response) == [class_of_grey(grey) for grey in greys]
        assert [result["filename"] for result in response.json()["results"]] == [f"{grey}.png" for grey in greys]


RAW = ["image/png", "image/jpeg", "IMAGE/PNG", "image/png; q=1", "image/x-any", "application/octet-stream"]


@pytest.mark.parametrize("content_type", RAW)
async def test_a_raw_image_is_read_by_its_bytes_whatever_image_type_it_claims(content_type: str) -> None:
    async with serving() as service:
        response = await service.client.post("/classify", content=PNG, headers={"content-type": content_type})
        assert indices(response) == [class_of_grey(100)]
        assert response.json()["results"][0]["filename"] is None


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,", "DATA:image/png;Base64,"])
@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8"])
async def test_json_with_base64_with_and_without_a_data_prefix(prefix: str, content_type: str) -> None:
    async with serving() as service:
        other = base64.b64encode(grey_png(30)).decode()
        body = json.dumps({"images": [prefix + BASE64, other]})
        response = await service.client.post("/classify", content=body, headers={"content-type": content_type})
        assert indices(response) == [class_of_grey(100), class_of_grey(30)]


@given(
    encoded=st.binary(min_size=1, max_size=200),
    prefix=st.sampled_from(["", "data:image/png;base64,", "Data:IMAGE/PNG;charset=utf-8;base64,"]),
    is_url_safe=st.booleans(),
    is_padded=st.booleans(),
    percent_encode=st.sampled_from([str, quote, lambda text: quote(text, safe="/+"), lambda text: quote(text).lower()]),
    breaks=st.lists(st.tuples(st.integers(0, 300), st.sampled_from([" ", "\n", "\r\n", "\t"])), max_size=5),
)
def test_base64_of_every_kind_is_the_same_image(
    encoded: bytes, prefix: str, is_url_safe: bool, is_padded: bool, percent_encode: Any, breaks: list[tuple[int, str]]
) -> None:
    text = (base64.urlsafe_b64encode if is_url_safe else base64.b64encode)(encoded).decode()
    if not is_padded:
        text = text.rstrip("=")
    if percent_encode is not str and percent_encode("+") == "%2b":
        text = re.sub("[+/=]", lambda sign: percent_encode(sign[0]), text)
    else:
        text = percent_encode(text)
    for at, white_space in sorted(breaks, reverse=True):
        if "%" not in text[max(0, at - 2) : at]:  # not within an escape
            text = text[:at] + white_space + text[at:]
    assert from_base64(prefix + text, 0) == encoded


@pytest.mark.parametrize(
    "text", ["A", "AAAAA", "AA=A", "A*AA", "é", "\ud800", "https://example.org/cat.jpg", "b'AAAA'"]
)
def test_what_is_no_base64_is_refused_by_its_place(text: str) -> None:
    with pytest.raises(UndecodableError, match="image 3 is not base64"):
        from_base64(text, 3)


PARAMETERS: dict[str, Any] = {"model": "large", "r": "4,2", "top_k": "3", "deadline_ms": "20000"}


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving(models=[model_info(), model_info("large")]) as service:
        yield service


def assert_parameters_counted(response: httpx.Response) -> None:
    assert indices(response) == [class_of_grey(100, (4, 2, 0))]
    body = response.json()
    assert (body["model"], body["r"], body["r_source"]) == ("large", [4, 2, 0], "request")
    assert len(body["results"][0]["top_k"]) == 3


async def test_parameters_stand_in_the_query(service: Service) -> None:
    assert_parameters_counted(await service.classify(PNG, **PARAMETERS))
    assert_parameters_counted(await service.client.post("/classify", params=PARAMETERS, files=[image_part()]))


async def test_parameters_stand_in_the_form(service: Service) -> None:
    assert_parameters_counted(await service.client.post("/classify", data=PARAMETERS, files=[image_part()]))


@pytest.mark.parametrize("r", [[4, 2], "4,2", "[4, 2]"])
async def test_parameters_stand_in_the_json(service: Service, r: Any) -> None:
    body = {"images": [BASE64], "model": "large", "r": r, "top_k": 3, "deadline_ms": 20000}
    assert_parameters_counted(await service.client.post("/classify", json=body))


async def test_parameters_may_be_spread_over_query_and_body(service: Service) -> None:
    query = {"model": "large", "r": "4,2"}
    rest = {"top_k": "3", "deadline_ms": "20000"}
    assert_parameters_counted(await service.client.post("/classify", params=query, data=rest, files=[image_part()]))
    body = {"images": [BASE64], "top_k": 3}
    assert_parameters_counted(await service.client.post("/classify", params=query, json=body))


async def test_a_parameter_said_twice_is_refused_by_name(service: Service) -> None:
    post = service.client.post
    answers = [
        await post("/classify?r=1&r=1", files=[image_part()]),
        await post("/classify?r=1", data={"r": "1"}, files=[image_part()]),
        await post("/classify", data={"r": ["1", "1"]}, files=[image_part()]),
        await post("/classify?r=1", json={"images": [BASE64], "r": 1}),
    ]
    for answer in answers:
        assert "'r': given" in assert_is_error(answer, 422, "invalid_parameter")


@pytest.mark.parametrize("where", ["query", "form", "JSON"])
@pytest.mark.parametrize(("deadline_ms", "least"), [(0.0005, "1"), (0.999, "1"), (30_001, "1 and 30000")])
async def test_a_deadline_out_of_range_is_refused_with_the_range(
    service: Service, where: str, deadline_ms: float, least: str
) -> None:
    post, said = service.client.post, {"deadline_ms": deadline_ms}
    if where == "JSON":
        answer = await post("/classify", json={"images": [BASE64], **said})
    elif where == "form":
        answer = await post("/classify", data=said, files=[image_part()])
    else:
        answer = await post("/classify", params=said, files=[image_part()])
    message = assert_is_error(answer, 422, "invalid_parameter")
    assert f"{deadline_ms:g}" in message and (f"equal to {least}" in message or f"between {least}" in message)


async def test_a_message_quotes_the_value_that_it_refuses(service: Service) -> None:
    answer = await service.client.post("/classify", params={"deadline_ms": "30000.0001"}, files=[image_part()])
    assert "deadline_ms is 30000.0001;" in assert_is_error(answer, 422, "invalid_parameter")
    body = b'{"images": ["%s"], "\\ud800": 1}' % BASE64.encode()
    answer = await service.client.post("/classify", content=body, headers={"content-type": "application/json"})
    assert "one of the names is '\\ud800'" in assert_is_error(answer, 422, "invalid_parameter")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "video/mp4", "", "odd"])
async def test_another_content_type_is_refused_with_the_list(service: Service, content_type: str) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = await service.client.post("/classify", content=PNG, headers=headers)
    message = assert_is_error(response, 415, "unsupported_format")
    assert "multipart/form-data" in message and (content_type or "missing") in message


async def test_without_an_image_the_message_says_how_to_send_one(service: Service) -> None:
    empty = await service.client.post("/classify", files=[("r", (None, "8"))])
    assert "form part 'image'" in assert_is_error(empty, 400, "undecodable")
    assert_is_error(await service.client.post("/classify", json={"images": []}), 400, "undecodable")


async def test_a_file_under_another_name_is_refused_by_its_name(service: Service) -> None:
    response = await service.client.post("/classify", files=[("photo", ("a.png", PNG))])
    assert "'photo'" in assert_is_error(response, 422, "invalid_parameter")


async def test_no_form_is_written_to_a_disk(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    padded = PNG + bytes(3 << 20)
    assert indices(await service.client.post("/classify", files=[("image", ("a.png", padded))])) == [class_of_grey(100)]


async def test_a_broken_image_among_good_ones_is_named_by_place_and_filename(service: Service) -> None:
    parts = [image_part(1), image_part(2), ("image", ("broken.png", encode(Image.effect_noise((64, 64), 50))[:500]))]
    response = await service.client.post("/classify", files=parts)
    assert_is_error(response, 400, "undecodable")
    assert response.json()["error"]["details"] == {"image": 2, "filename": "broken.png"}


@pytest.mark.parametrize(("encoded", "status"), [(PNG, 200), (b"garbage", 415)], ids=["good", "bad"])
async def test_a_filename_that_no_answer_can_hold_does_no_harm(service: Service, encoded: bytes, status: int) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="\\ud800.png"\r\n\r\n'
    headers = {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"}  # makes it a lone surrogate
    response = await service.client.post("/classify", content=head + encoded + b"\r\n--x--\r\n", headers=headers)
    assert response.status_code in (status, 400), response.text


async def test_too_many_images_are_refused_in_form_and_json() -> None:
    async with serving(max_images=2) as service:
        assert len(indices(await service.client.post("/classify", files=[image_part()] * 2))) == 2
        for count in (3, 4, 10):
            form = await service.client.post("/classify", files=[image_part()] * count)
            assert "at most 2" in assert_is_error(form, 413, "too_large")
            body = await service.client.post("/classify", json={"images": [BASE64] * count})
            assert "at most 2" in assert_is_error(body, 413, "too_large")


async def chunks(size: int, count: int, sent: list[int]) -> AsyncIterator[bytes]:
    for _ in range(count):
        sent.append(size)
        yield bytes(size)


@pytest.mark.parametrize("content_type", ["image/png", "application/json", "multipart/form-data; boundary=x"])
async def test_a_body_over_the_cap_is_refused_announced_or_not(content_type: str) -> None:
    async with serving(max_body_bytes=1000) as service:
        headers = {"content-type": content_type}
        announced = await service.client.post("/classify", content=bytes(1001), headers=headers)
        assert "1000" in assert_is_error(announced, 413, "too_large")
        sent: list[int] = []
        chunked = await service.client.post("/classify", content=chunks(400, 50, sent), headers=headers)
        assert "transfer-encoding" in chunked.request.headers
        if content_type.startswith("multipart"):  # these bytes are no form: whichever is seen first
            assert chunked.status_code in (400, 413)
        else:
            assert "1000" in assert_is_error(chunked, 413, "too_large")
        assert len(sent) <= 3  # the rest was never read
        assert (await service.classify(PNG)).status_code == 200


async def test_a_body_of_just_the_cap_is_read() -> None:
    async with serving(max_body_bytes=len(PNG)) as service:
        await service.classify(PNG)
        assert_is_error(await service.classify(PNG + b"\0", status=413), 413, "too_large")


async def test_an_error_message_does_not_send_a_large_body_back(service: Service) -> None:
    bodies: list[dict[str, Any]] = [
        {"images": "A" * 100_000},
        {"images": [1] * 20_000},
        {"images": [BASE64], "r": "A" * 100_000},
        {"images": [BASE64], "model": "A" * 100_000},
        {"images": [BASE64], "A" * 100_000: 1},
    ]
    for body in bodies:
        response = await service.client.post("/classify", json=body)
        assert 400 <= response.status_code < 500
        assert len(response.content) < 5000
