"""The servers that benchmarks.serving starts and ends, and the ratios that it tells."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from benchmarks.serving import FASTAPI, FREE, IMAGE, PEERS, NotStartedError, ratios_of, running
from server.bench.client import Answer, BrokenError, Client, Target
from server.bench.load import Request
from tests.server.conftest import grey_png


def ask(target: Target, request: Request) -> Answer:
    async def send() -> Answer:
        async with Client(target, headers=IMAGE) as client:
            return await client.post(request.path, request.body)

    return asyncio.run(send())


@pytest.mark.slow
def test_the_bare_route_counts_bytes_and_ends() -> None:
    request = Request("/classify", b"12345")
    with running(FASTAPI, {}, request, IMAGE) as target:
        assert json.loads(ask(target, request).body) == {"bytes": 5}
    with pytest.raises(BrokenError):
        ask(target, request)


@pytest.mark.slow
def test_our_server_around_a_free_model_answers_and_ends() -> None:
    request = Request("/classify?top_k=1&r=8", grey_png())
    with running(FREE, {}, request, IMAGE) as target:
        answer = ask(target, request)
        assert answer.headers["x-r"] == "8"
        assert json.loads(answer.body)["results"][0]["top_k"] == [{"label": "0", "index": 0, "score": 1.0}]
    with pytest.raises(BrokenError):
        ask(target, request)


def test_a_server_that_ends_is_said_with_its_last_words() -> None:
    command = (sys.executable, "-c", "print('no such luck'); raise SystemExit(3)")
    with pytest.raises(NotStartedError, match="no such luck"), running(command, {}, Request("/", b""), IMAGE):
        pass


def test_peers_get_images_as_they_take_them() -> None:
    (raw,) = PEERS["ray"].requests([b"photo"])
    (in_json,) = PEERS["litserve"].requests([b"photo"])
    assert (raw.body, json.loads(in_json.body)) == (b"photo", {"image": "cGhvdG8="})


def test_ratios_are_of_what_was_measured() -> None:
    speeds = {
        ("bare forward loop", "0"): 100.0,
        ("bare forward loop", "13"): 200.0,
        ("ours", "0"): 90.0,
        ("ours", "13"): 150.0,
        ("ours", "mixed"): 120.0,
        ("ours, a free model", ""): 500.0,  # beside nothing
    }
    rows = [{"name": name, "r": r, "images_per_s": speed} for (name, r), speed in speeds.items()]
    assert {each["name"]: each["ratio"] for each in ratios_of(rows, [0, 13], 13)} == {
        "end to end / bare forward loop, r=0": 0.9,
        "end to end / bare forward loop, r=13": 0.75,
        "five r mixed / r=13": 0.8,
    }
