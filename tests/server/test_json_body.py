"""JSON bodies of any content: read with little memory, refused with few words, in the same way by every endpoint."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api import json_body
from server.api.json_body import LONGEST_NUMBER, LONGEST_TEXT, MOST_FIELDS, MOST_VALUES, SMALL, parse_object
from server.errors import InvalidError, ServerError, TooLargeError, UndecodableError
from tests.server.conftest import Service, assert_is_error, class_of_grey, grey_png, serving

MB = 1 << 20
IMAGE = base64.b64encode(grey_png(100)).decode()


def filled(begin: bytes, piece: bytes, end: bytes, size: int = 4 * MB) -> bytes:
    """A body of about a size."""
    return begin + piece * (size // len(piece)) + end


AMPLIFIED = {
    "integers": filled(b'{"images":[', b"1,", b"1]}"),
    "empty texts": filled(b'{"images":[', b'"",', b'""]}'),
    "objects": filled(b'{"images":[', b"{},", b"{}]}"),
    "lists": filled(b'{"images":[', b"[],", b"[]]}"),
    "null": filled(b'{"images":[', b"null,", b"null]}"),
    "fields": b"{" + b",".join(b'"%x":1' % number for number in range(4 * MB // 11)) + b"}",
    "of r": filled(b'{"images":["x"],"r":[', b"0,", b"0]}"),
    "r as a text": filled(b'{"images":["x"],"r":"', b"0,", b'0"}'),
    "deep lists": b"[" * 4 * MB,
    "deep objects": filled(b"", b'{"a":', b""),
    "deep in images": b'{"images":' + b"[" * 2 * MB + b"]" * 2 * MB + b"}",
    "a long integer": b'{"images":["x"],"top_k":' + b"9" * 4 * MB + b"}",
    "a long fraction": b'{"images":["x"],"deadline_ms":1.' + b"9" * 4 * MB + b"}",
    "a long text": b'{"images":["x"],"model":"' + b"m" * 4 * MB + b'"}',
    "spaces": b" " * 4 * MB,
}
"""Bodies that would become many objects, or long work."""

STRANGE: dict[str, tuple[bytes, type[ServerError]]] = {
    "nothing": (b"", UndecodableError),
    "a list": (b"[]", UndecodableError),
    "a text": (b'"x"', UndecodableError),
    "null": (b"null", UndecodableError),
    "trailing": (b"{} x", UndecodableError),
    "cut": (b'{"r": 1', UndecodableError),
    "control character": (b'{"r": "\x01"}', UndecodableError),
    "invalid UTF-8": (b'{"r": "\xff"}', UndecodableError),
    "UTF-16 cut": (b"\xff\xfe{", UndecodableError),
    "a field twice": (b'{"r": 1, "top_k": 2, "r": 3}', InvalidError),
    "a field twice, deep": (b'{"models": {"tiny": {"r": 1, "r": 2}}}', InvalidError),
    "NaN": (b'{"r": NaN}', UndecodableError),
    "Infinity": (b'{"r": -Infinity}', UndecodableError),
    "5,000 digits": (b'{"r": ' + b"9" * 5000 + b"}", UndecodableError),
    "many fields": (json.dumps({str(number): 1 for number in range(MOST_FIELDS + 1)}).encode(), InvalidError),
    "many fields, deep": (json.dumps({"models": dict.fromkeys(map(str, range(300)), 1)}).encode(), InvalidError),
    "many values": (b'{"r": [' + b"0," * MOST_VALUES + b"0]}", TooLargeError),
}


@pytest.mark.parametrize("name", AMPLIFIED)
def test_a_few_megabytes_take_a_few_megabytes(name: str) -> None:
    body = AMPLIFIED[name]
    tracemalloc.start()
    try:
        with pytest.raises(ServerError) as refusal:
            parse_object(body, max_images=32)
        assert tracemalloc.get_traced_memory()[1] <= 4 * len(body)
    finally:
        tracemalloc.stop()
    assert len(refusal.value.message) <= 400


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_plain_json_object_is_refused_by_name(name: str) -> None:
    body, kind = STRANGE[name]
    with pytest.raises(kind) as refusal:
        parse_object(body)
    assert 15 <= len(refusal.value.message) <= 400


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=50)
@given(
    st.dictionaries(st.text(), JSON, max_size=3),
    st.sampled_from(ENCODINGS),
    st.booleans(),
)
def test_any_plain_json_object_is_read_as_it_is(said: dict[str, Any], encoding: str, is_escaped: bool) -> None:
    text = json.dumps(said, ensure_ascii=is_escaped)
    assert parse_object(text.encode(encoding, "surrogatepass")) == said


@given(st.binary(max_size=50) | st.text(alphabet='{}[]",:0e-\\u"', max_size=50).map(str.encode))
def test_any_bytes_are_an_object_or_an_error(body: bytes) -> None:
    try:
        assert isinstance(parse_object(body), dict)
    except (UndecodableError, InvalidError):
        pass


def test_images_count_on_top_of_other_values_and_may_be_long() -> None:
    images = ["data:image/png;base64," + "A" * 2 * LONGEST_TEXT] * 32
    r = [0] * (MOST_VALUES // 2)
    number = int("9" * LONGEST_NUMBER)
    said = {"images": images, "r": r, "top_k": number, "model": "m" * LONGEST_TEXT}
    assert parse_object(json.dumps(said).encode(), max_images=32) == said


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving(max_images=4, max_body_bytes=8 * MB) as service:
        yield service


def top_of(answer: httpx.Response) -> int:
    """The likeliest class of the first image."""
    assert answer.status_code == 200, answer.text
    return int(answer.json()["results"][0]["top_k"][0]["index"])


ENDPOINTS = [("POST", "/classify"), ("POST", "/v1/explain"), ("PATCH", "/v1/models/tiny"), ("PATCH", "/v1/config")]
BODIES = AMPLIFIED | {name: body for name, (body, _) in STRANGE.items()}


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
async def test_every_endpoint_refuses_them_all_and_answers_the_next(service: Service, method: str, path: str) -> None:
    for name, body in BODIES.items():
        refusal = await service.client.request(method, path, content=body, headers={"content-type": "application/json"})
        assert refusal.status_code in (400, 413, 422), (name, refusal.text[:500])
        assert len(refusal.text) <= 1000, name
        assert refusal.json()["error"]["message"], name
    good = await service.client.post("/classify", json={"images": [IMAGE]})
    assert top_of(good) == class_of_grey(100)


async def test_of_many_wrong_images_the_first_three_are_named(service: Service) -> None:
    wrong = await service.client.post("/classify", json={"images": [1, 2, 3, 4], "top_k": -1})
    message = assert_is_error(wrong, 422, "invalid_parameter")
    assert message.count("; ") == 2 and "images.1 is 2: " in message and "images.2" not in message
    many = await service.client.post("/classify", json={"images": [1] * 1000})
    assert "1000 images; at most 4" in assert_is_error(many, 413, "too_large")  # and no word about each


async def test_a_large_body_is_read_and_decoded_in_threads(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return parse_object(*args)

    monkeypatch.setattr(json_body, "parse_object", noted)
    for size in (0, SMALL):
        body = json.dumps({"images": [IMAGE]}).encode() + b" " * size
        answer = await service.client.post("/classify", content=body, headers={"content-type": "application/json"})
        assert top_of(answer) == class_of_grey(100)
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


@pytest.mark.parametrize("pairs", [[f"{number:x}=" for number in range(8_000)] + ["0="], ["r=1"] * 101])
async def test_of_a_long_query_nothing_is_read(service: Service, pairs: list[str]) -> None:
    refusal = await service.client.post("/classify?" + "&".join(pairs), content=grey_png(1))
    assert "at most 100" in assert_is_error(refusal, 422, "invalid_parameter")


async def test_many_large_bodies_at_once_are_all_answered(service: Service) -> None:
    headers, body = {"content-type": "application/json"}, AMPLIFIED["objects"]
    posts = [service.client.post("/classify", content=body, headers=headers) for _ in range(8)]
    assert {answer.status_code for answer in await asyncio.gather(*posts)} == {413}
