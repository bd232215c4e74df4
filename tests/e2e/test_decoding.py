"""The engine decodes (`--decode device`, here on the CPU): every kind of file, side by side with Pillow's answers."""

from __future__ import annotations

import io
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.e2e.service import Service, StartService

pytestmark = pytest.mark.slow

SAMPLES = sorted((Path(__file__).resolve().parents[2] / "server" / "static" / "samples").glob("*.jpg"))


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def files() -> dict[str, bytes]:
    """One of every kind, of real photos."""
    photos = [Image.open(file).convert("RGB") for file in SAMPLES]
    first, second = photos[0], photos[1]
    as_it_came = SAMPLES[0].read_bytes()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        **{file.name: file.read_bytes() for file in SAMPLES},
        "progressive": encoded(second, progressive=True, quality=90),
        "fine": encoded(second, subsampling=0, quality=95),
        "large": encoded(first.resize((1600, 1200)), quality=90),
        "small": encoded(second.resize((20, 17)), quality=90),
        "grey": encoded(first.convert("L"), quality=90),
        "cmyk": encoded(second.convert("CMYK"), quality=95),
        "rotated": encoded(second, exif=rotated, quality=90),
        "png": encoded(first, "PNG"),
        "webp": encoded(second, "WEBP", quality=90),
        "no picture": as_it_came[: as_it_came.index(b"\xff\xda")] + b"\xff\xd9",
        "cut off": as_it_came[: len(as_it_came) // 2],
        "too thin": encoded(Image.new("L", (2, 65_000))),
        "garbage": b"\xff\xd8 this is no JPEG \xff\xd9",
    }


ERRORS = {"no picture": 400, "cut off": 400, "too thin": 413, "garbage": 415}


def send(service: Service, *photos: bytes) -> httpx.Response:
    parts = [("image", ("photo", photo)) for photo in photos]
    return httpx.post(f"{service.url}/classify", params={"r": 4, "top_k": 5}, files=parts, timeout=60)


def close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same likeliest class, or two that are about as likely; scores close."""
    scores = [{each["index"]: each["score"] for each in result["top_k"]} for result in (one, other)]
    first = one["top_k"][0]["index"]
    return all(abs(scores[0][index] - scores[1][index]) < 0.05 for index in scores[0].keys() & scores[1]) and (
        first in scores[1]
    )


def problem(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return {**error, "message": re.sub("0x[0-9a-f]+", "", error["message"])}  # Pillow names objects by address


def test_each_file_is_answered_as_by_pillow_or_has_the_same_error(start_service: StartService) -> None:
    sent = files()
    answers: list[dict[str, httpx.Response]] = []
    for decode in ("device", "cpu"):
        service = start_service("--decode", decode, "--precision", "fp32")
        assert ("decoded by the engine" in "".join(service.log)) == (decode == "device")
        with ThreadPoolExecutor(len(sent)) as pool:  # at once: of all kinds in one batch
            many = [pool.submit(send, service, photo) for _ in range(3) for photo in sent.values()]
            responses = [each.result() for each in many]
        answers.append(dict(zip(sent, responses, strict=False)))
        if decode == "device":
            assert max(int(each.headers.get("x-batch-size", 1)) for each in responses) > 1
            several = send(service, sent["grey"], sent["no picture"], sent["png"])
            assert several.status_code == 400 and several.json()["error"]["details"]["image"] == 1
            together = send(service, *(sent[name] for name in ("grey", "png", "rotated", "fine"))).json()
            alone = [send(service, sent[name]).json()["results"][0] for name in ("grey", "png", "rotated", "fine")]
            assert all(close(one, other) for one, other in zip(together["results"], alone, strict=True))
            explained = httpx.post(f"{service.url}/v1/explain", files={"image": sent["fine"]}, timeout=60)
            assert explained.status_code == 200
        assert service.stop() == 0
    by_engine, by_pillow = answers
    for name in sent:
        assert by_engine[name].status_code == by_pillow[name].status_code == ERRORS.get(name, 200), name
        if name in ERRORS:
            assert problem(by_engine[name]) == problem(by_pillow[name])
        else:
            assert close(by_engine[name].json()["results"][0], by_pillow[name].json()["results"][0]), name
