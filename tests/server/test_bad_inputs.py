"""At least 200 bad inputs: each gets a 4xx with a useful message, and the next good request works."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio
from PIL import Image

from server.images.pillow import FORMATS
from tests.server.conftest import Service, assert_is_error, class_of_grey, encode, grey_png, serving

LIMITS: dict[str, Any] = {"max_images": 4, "max_body_bytes": 200_000, "max_image_pixels": 250_000, "deadline_s": 10.0}
GOOD = grey_png(100)
GOOD_64 = base64.b64encode(GOOD).decode()
CODES = {400: {"undecodable"}, 404: {"not_found"}, 405: {"method_not_allowed"}, 413: {"too_large"}}
CODES |= {415: {"unsupported_format"}, 422: {"invalid_parameter"}}


NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Bad:
    """One bad request."""

    name: str
    content: bytes
    content_type: str = "image/png"
    query: str = ""
    allowed: tuple[int, ...] = (400, 415)
    method: str = "POST"


def png(width: int, height: int, data: bytes = b"", kind: int = 2, depth: int = 8) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    written = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def broken_files() -> Iterator[Bad]:
    gradient = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    for format in map(str, FORMATS):
        whole = encode(gradient, format)
        for percent in (1, 10, 20, 30, 40, 50):
            yield Bad(f"{format} cut to {percent} %", whole[: max(1, len(whole) * percent // 100)])
        yield Bad(f"{format} without its first byte", whole[1:])
        yield Bad(f"{format} full of zeros", whole[:12] + bytes(len(whole) - 12))
        yield Bad(f"{format} after garbage", b"garbage" + whole)
    for size in ((100_000, 100_000), (501, 500), (2**31 - 1, 1), (65_535, 65_535), (20_000, 9_000), (1, 250_001)):
        yield Bad(f"bomb of {size[0]} x {size[1]}", png(*size), allowed=(413,))
    bomb = zlib.compress(bytes(3_000_000))
    yield Bad("png with a thousand times the data it declares", png(700, 500, bomb), allowed=(413,))
    yield Bad("png of no width", png(0, 10))
    yield Bad("png without data", png(10, 10))
    yield Bad("png of an unknown kind", png(10, 10, bomb, kind=5))
    yield Bad("png of 7 bits", png(10, 10, bomb, depth=7))
    yield Bad("png with a wrong sum", GOOD[:29] + bytes(4) + GOOD[33:])
    yield Bad("floating-point tiff", encode(Image.new("F", (8, 8)), "TIFF"))
    for format in ("PPM", "TGA", "ICO", "PCX", "EPS", "PDF", "SGI", "ICNS", "JPEG2000", "DDS"):
        try:
            yield Bad(f"a {format} file", encode(gradient, format), allowed=(415,))
        except (OSError, KeyError):
            continue  # this Pillow does not write it
    texts = {"text": b"hello", "html": b"<html></html>", "svg": b"<svg/>", "pdf": b"%PDF-1.7\n", "zip": b"PK\3\4" * 9}
    texts |= {"one zero": b"\0", "zeros": bytes(10_000), "0xff": b"\xff" * 5000, "json": b'{"images": []}'}
    texts |= {"empty": b"", "python": b"\x80\x04K\x01.", "base64": GOOD_64.encode(), "newline": b"\r\n"}
    for name, content in texts.items():
        yield Bad(f"raw {name}", content)
        yield Bad(f"octet-stream {name}", content, "application/octet-stream")


def wrong_types() -> Iterator[Bad]:
    for kind in ("", "text/plain", "text/html", "application/xml", "video/mp4", "application/x-www-form-urlencoded"):
        yield Bad(f"content type {kind!r}", GOOD, kind, allowed=(415,))
    for kind in ("image", "images/png", "multipart/mixed; boundary=x", "application/jsonx", "*/*", "\xe9", ";;;"):
        yield Bad(f"content type {kind!r}", GOOD, kind, allowed=(415,))
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        yield Bad(f"method {method}", GOOD, allowed=(405,), method=method)


R = (
    """-1 9 1.5 1e3 abc NaN Infinity -Infinity null true 0x8 8; Auto [] [8 8] [9] [-1] [1.5] [1,1,1,1] 1,1,1,1 , 1,
[[1]] ["1"] {} 1,2,9 %20 8%208 %F0%9F%98%80 %FF %00 %ED%A0%80""".split()
    + ["", "9" * 400, "9" * 5000, "[" * 3000]
)
TOP_K = "0 -1 102 1.5 abc NaN 1e400 null %F0%9F%98%80 5,5 true".split() + ["", "9" * 30, "9" * 5000]
DEADLINE = "0 0.0005 0.999 -1 abc NaN nan Infinity inf -inf 1e400 10001 null 1,5 -0".split() + ["", "9" * 400]
INFLECT = "2 -1.01 nan NaN inf -inf abc 1e400 null".split() + [""]
MODEL = "huge TINY %F0%9F%98%80 ..%2F..%2Fetc%2Fpasswd %00 tiny%20 %FF tiny,tiny".split() + ["", "a" * 3000]
ODD = """inflect=0.5 r=1,2&inflect=0.5 r=9&inflect=-1 R=8 topk=5 unknown=1 =8 %F0%9F%98%80=1 r=1&r=2 images=x image=x
max_r=3 min_agreement=0.9 r=8&max_r=3 r=8&min_agreement=0.9 r=auto&inflect=1 r=auto&max_r=-1 r=auto&max_r=1.5
r=auto&min_agreement=1.01 r=auto&min_agreement=-1 r=auto&min_agreement=nan
model=tiny&model=tiny r=1&top_k=1&top_k=1 self=1 __class__=1 model_config=1""".split()


def wrong_parameters() -> Iterator[Bad]:
    for name, values in {"r": R, "top_k": TOP_K, "deadline_ms": DEADLINE, "model": MODEL}.items():
        for value in values:
            yield Bad(f"{name}={value[:20]} ({len(value)})", GOOD, query=f"{name}={value}", allowed=(404, 422))
    for value in INFLECT:
        yield Bad(f"inflect={value}", GOOD, query=f"r=4&inflect={value}", allowed=(422,))
    for query in ODD:
        yield Bad(f"query {query}", GOOD, query=query, allowed=(422,))
    yield Bad("a hundred unknown parameters", GOOD, query="&".join(f"p{i}=1" for i in range(100)), allowed=(422,))


def part(name: str, value: bytes, filename: str | None = None, extra: str = "") -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{file}{extra}\r\n\r\n'.encode() + value + b"\r\n"


def bad_forms() -> Iterator[Bad]:
    form, end, image = "multipart/form-data; boundary=x", b"--x--\r\n", part("image", GOOD, "a.png")
    many = b"".join(part(f"p{index}", b"1") for index in range(50))
    rows: dict[str, tuple[bytes, str, tuple[int, ...]]] = {
        "empty": (b"", form, (400,)),
        "no boundary": (image + end, "multipart/form-data", (400,)),
        "empty boundary": (image + end, "multipart/form-data; boundary=", (400,)),
        "another boundary": (image + end, "multipart/form-data; boundary=y", (400,)),
        "garbage": (b"garbage" * 100, form, (400,)),
        "only an end": (end, form, (400,)),
        "headers cut short": (b"--x\r\nContent-Dispo", form, (400,)),
        "no disposition": (b"--x\r\n\r\nvalue\r\n" + end, form, (400,)),
        "no name": (b"--x\r\nContent-Disposition: form-data\r\n\r\nvalue\r\n" + end, form, (400,)),
        "a broken header": (b"--x\r\nContent Disposition: form-data\r\n\r\nvalue\r\n" + end, form, (400,)),
        "no line ends": (image.replace(b"\r\n", b"") + end, form, (400,)),
        "no image": (part("r", b"8") + end, form, (400,)),
        "image as text": (part("image", b"text") + end, form, (415,)),
        "file named otherwise": (part("photo", GOOD, "a.png") + end, form, (422,)),
        "file named r": (image + part("r", b"8", "r.txt") + end, form, (422,)),
        "empty file": (part("image", b"", "a.png") + end, form, (400,)),
        "cut in the image": (image[:90], form, (400, 415)),
        "second image broken": (image + part("image", GOOD[:50], "b.png") + end, form, (400, 415)),
        "wrong r": (image + part("r", b"x") + end, form, (422,)),
        "r that is no text": (image + part("r", b"\xff\xfe") + end, form, (422,)),
        "unknown field": (image + part("colour", b"red") + end, form, (422,)),
        "field of no name": (image + part("", b"red") + end, form, (422,)),
        "r twice": (image + part("r", b"1") + part("r", b"1") + end, form, (422,)),
        "many fields": (image + many + end, form, (400, 413, 422)),
        "large field": (image + part("r", b"1" * 150_000) + end, form, (400, 413, 422)),
        "five images": (image * 5 + end, form, (413,)),
        "six images": (image * 6 + end, form, (413,)),
        "fifty images": (image * 50 + end, form, (413,)),
        "body too large": (part("image", bytes(200_000), "a.png") + end, form, (413,)),
        "image in a multipart image": (part("image", image, "a.png") + end, form, (400, 415)),
    }
    for name, (content, kind, allowed) in rows.items():
        yield Bad(f"form: {name}", content, kind, allowed=allowed)
    for charset in ("nonsense", "idna", "base64", "unicode_escape", "utf-16", "punycode", "undefined", "rot13"):
        body = part("image", GOOD[:40], "\\ud800.png") + part("r", b"\\ud800") + end
        yield Bad(f"form: charset {charset}", body, f"{form}; charset={charset}", allowed=(400, 415, 422))
    yield Bad("form: r in query too", image + part("r", b"1") + end, form, query="r=1", allowed=(422,))


def bad_json() -> Iterator[Bad]:
    def row(name: str, content: bytes, *allowed: int) -> Bad:
        return Bad(f"json: {name}", content, "application/json", allowed=allowed)

    texts = {"empty": b"", "cut": b'{"images": ["', "no quotes": b"{images: []}", "list": b"[]", "null": b"null"}
    texts |= {"number": b"7", "text": b'"x"', "true": b"true", "NaN": b"NaN", "bytes": b"\xff\xfe\xfd"}
    texts |= {"trailing": b'{"images": []} x', "deep list": b"[" * 90_000, "deep object": b'{"a":' * 30_000}
    texts |= {"huge int": b'{"images": [], "top_k": ' + b"9" * 5000 + b"}", "an image": GOOD, "nul": b"\0"}
    texts |= {"utf-16 cut": b"\xff\xfe{"}
    for name, content in texts.items():
        yield row(name, content, 400)
    for depth in (50, 300, 900):
        nested = b"[" * depth + b"]" * depth
        yield row(f"r {depth} deep", b'{"images": ["%s"], "r": %s}' % (GOOD_64.encode(), nested), 400, 422)
        yield row(f"images {depth} deep", b'{"images": %s}' % nested, 400, 422)
        yield row(f"unknown {depth} deep", b'{"images": [], "x": %s}' % nested, 400, 422)
    images: list[object] = [None, 7, "x", {}, {"0": "x"}, True, "\ud800"]
    images += [[None], [7], [["x"]], [{}], [True], ["\ud800"]]
    for value in images:
        yield row(f"images {value!r}", json.dumps({"images": value}).encode(), 400, 422)
    encoded = "x ==== A AAA !!!! data: data:image/png;base64, data:,x é https://example.org/cat".split()
    encoded += ["", GOOD_64[:-7], GOOD_64[:40], base64.b64encode(b"garbage").decode()]
    for text in encoded:
        yield row(f"base64 {text[:24]!r} ({len(text)})", json.dumps({"images": [GOOD_64, text]}).encode(), 400, 415)
    said: dict[str, list[object]] = {
        "r": [-1, 9, 1.5, True, "x", {}, 10**400, NAN, INF, "\ud800", [], [[]], [None], [9], [1] * 4, ["\ud800"]],
        "top_k": [0, -1, 102, 1.5, "x", [], {}, NAN, 10**40, "\ud800"],
        "deadline_ms": [0, 0.0005, -1, "x", [], {}, True, NAN, INF, 10**400, 10_001],
        "model": [7, [], {}, True, "huge", "", "\ud800", "tiny\0"],
        "inflect": [0.5, "x", [], NAN, INF, 2],
        "colour": ["red", None, "\ud800"],
        "": [1],
        "\ud800": [1],
        "filename": ["x"],
    }
    for name, values in said.items():
        for value in values:
            body = json.dumps({"images": [GOOD_64], name: value}).encode()
            if (name, value) != ("deadline_ms", True):  # pydantic reads it as 1 ms
                yield row(f"{name!a}: {str(value)[:20]!a} {type(value).__name__}", body, 400, 404, 422)
    with_r = json.dumps({"images": [GOOD_64], "r": 4, "inflect": NAN})
    yield row("inflect NaN beside an r", with_r.encode(), 400)
    yield row("too many images", json.dumps({"images": [GOOD_64] * 5}).encode(), 413)
    yield row("far too many images", json.dumps({"images": ["A"] * 30_000}).encode(), 413)
    yield row("body too large", json.dumps({"images": ["A" * 200_000]}).encode(), 413)


BAD = [*broken_files(), *wrong_types(), *wrong_parameters(), *bad_forms(), *bad_json()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service() -> AsyncIterator[Service]:
    async with serving(**LIMITS) as service:
        yield service


def test_there_are_at_least_200_distinct_bad_inputs() -> None:
    assert len({(bad.content, bad.content_type, bad.query, bad.method) for bad in BAD}) >= 200
    assert len({bad.name for bad in BAD}) == len(BAD)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as server.images.pillow does when it loads
@pytest.mark.filterwarnings(
    "ignore:Unclosed file <tempfile.Spooled:ResourceWarning"
)  # Starlette's, of a form cut short
@pytest.mark.parametrize("bad", [pytest.param(bad, id=ascii(bad.name)) for bad in BAD])
async def test_a_bad_input_is_a_4xx_that_says_why_and_the_next_good_one_works(service: Service, bad: Bad) -> None:
    headers = {b"content-type": bad.content_type.encode("latin-1")} if bad.content_type else {}
    url = f"/classify?{bad.query}" if bad.query else "/classify"
    response = await service.client.request(bad.method, url, content=bad.content, headers=headers)
    status = response.status_code
    assert status in bad.allowed, response.text[:2000]
    message = assert_is_error(response, status, *CODES[status])
    assert len(message) > 15 or status == 405
    assert_answers(await service.client.post("/classify?r=2", files=[("image", ("a.png", GOOD))]))


def assert_answers(response: httpx.Response) -> None:
    assert response.status_code == 200, response.text
    assert response.json()["results"][0]["top_k"][0]["index"] == class_of_grey(100, (2, 2, 2))


@pytest.mark.asyncio(loop_scope="module")
async def test_after_them_all_nothing_is_held(service: Service) -> None:
    assert service.app.state.service.admission._in_flight == 0
    assert service.app.state.service.engine._batcher.num_waiting == 0
