"""Forms: what clients write, read as they mean it; and what is no form, refused by name."""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
from collections.abc import Sequence

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.api.form import FormReader, Part, boundary_of
from server.errors import UndecodableError
from tests.server.conftest import Service, assert_is_error, class_of_grey, grey_png, serving

PNG = grey_png(100)
END = b"--x--\r\n"


def parts_of(body: bytes, boundary: bytes, sizes: Sequence[int] = ()) -> list[Part]:
    """The parts of a body that arrives in pieces of these sizes, and then the rest."""
    reader, at = FormReader(boundary, most=200), 0
    for size in (*sizes, len(body)):
        reader.feed(body[at : at + size])
        at += size
    reader.close()
    return reader.parts


def part(disposition: str | bytes, content: bytes = b"content", *headers: str) -> bytes:
    encoded = disposition if isinstance(disposition, bytes) else disposition.encode()
    head = b"\r\n".join([b"Content-Disposition: " + encoded, *(header.encode() for header in headers)])
    return b"--x\r\n" + head + b"\r\n\r\n" + content + b"\r\n"


FILE = part('form-data; name="image"; filename="a.jpg"')

NAMES: list[tuple[str | bytes, str | None]] = [
    ('name="image"; filename="a.jpg"', "a.jpg"),
    ("name=image; filename=a.jpg", "a.jpg"),
    ('NAME="image" ;  FileName = "a.jpg"', "a.jpg"),
    ('name="image"', None),
    ('name="image"; filename=""', ""),
    ('name="image"; filename="фото №1 😀.jpg"', "фото №1 😀.jpg"),
    (b'name="image"; filename="caf\xe9.jpg"', "café.jpg"),
    ('name="image"; filename="a;b=c.jpg"', "a;b=c.jpg"),
    (r'name="image"; filename="a \"b\".jpg"', 'a "b".jpg'),
    ('name="image"; filename="a %22b%22 100%.jpg"', "a %22b%22 100%.jpg"),
    (r'name="image"; filename="C:\fotos\neu\tisch.jpg"', "tisch.jpg"),
    (r'name="image"; filename="\\host\fotos\tisch.jpg"', "tisch.jpg"),
    ("name=\"image\"; filename*=utf-8''%D1%84%D0%BE.jpg", "фо.jpg"),
    ("name=\"image\"; filename*=ISO-8859-1'de'caf%E9.jpg", "café.jpg"),
    ('name="image"; filename="foto.jpg"; filename*=UTF-8\'\'%D1%84.jpg', "ф.jpg"),
    ("name=\"image\"; filename*=UTF-8''%ff%00", "\ufffd\0"),
    ('filename="a.jpg"; name="image"', "a.jpg"),
    ('name="image"; filename="a.jpg"; filename="b.jpg"', "a.jpg"),
]


@pytest.mark.parametrize(("parameters", "filename"), NAMES, ids=ascii)
def test_a_part_is_named_as_its_client_means_it(parameters: str | bytes, filename: str | None) -> None:
    encoded = parameters if isinstance(parameters, bytes) else parameters.encode()
    (read,) = parts_of(part(b"form-data; " + encoded) + END, b"x")
    assert read == Part("image", filename, b"content")


FRAMES = {
    "plain": FILE + END,
    "no line break at the end": FILE + b"--x--",
    "an epilogue": FILE + END + b"bye\r\n--x\r\n",
    "a line break before": b"\r\n" + FILE + END,
    "lower case": FILE.replace(b"Content-Disposition: form-data", b"content-disposition:FORM-DATA") + END,
    "other headers": part(
        'form-data; name="image"; filename="a.jpg"',
        b"content",
        "Content-Type: image/jpeg",
        "Content-Length: 1",
        "Content-Transfer-Encoding: Binary",
    )
    + END,
}


@pytest.mark.parametrize("body", FRAMES.values(), ids=list(FRAMES))
def test_a_form_may_be_framed_as_the_standard_allows(body: bytes) -> None:
    assert parts_of(body, b"x") == [Part("image", "a.jpg", b"content")]


BROKEN = {
    "nothing": (b"", "boundary"),
    "another boundary": (FILE.replace(b"--x", b"--y"), "boundary"),
    "no last boundary": (FILE, "last boundary"),
    "cut in the content": (FILE[:-4], "last boundary"),
    "cut in the head": (FILE[:30], "last boundary"),
    "LF alone": ((FILE + END).replace(b"\r\n", b"\n"), "CR"),
    "no disposition": (b"--x\r\nContent-Type: image/jpeg\r\n\r\nx\r\n" + END, "Content-Disposition"),
    "no header": (b"--x\r\n\r\nx\r\n" + END, "Content-Disposition"),
    "no name": (part('form-data; filename="a.jpg"') + END, "Content-Disposition"),
    "no form": (part('attachment; name="image"') + END, "Content-Disposition"),
    "a long head": (part('form-data; name="image"', b"", "X: " + "y" * 20_000) + END, "header size"),
    "many parts": (FILE * 201 + END, "more than 200 parts"),
    "many headers": (part('form-data; name="image"', b"", *["X: y"] * 20) + END, "header count"),
    "base64": (part('form-data; name="image"', b"", "Content-Transfer-Encoding: base64") + END, "'base64'"),
    "a charset that is none": (part("form-data; name=image; filename*=odd''a") + END, "'odd'"),
    "a charset of escapes": (part("form-data; name=image; filename*=unicode_escape''%5Cud800") + END, "escape"),
}


@pytest.mark.parametrize(("body", "named"), BROKEN.values(), ids=list(BROKEN))
def test_what_is_no_form_is_refused_by_name(body: bytes, named: str) -> None:
    with pytest.raises(UndecodableError, match="the form cannot be read") as refusal:
        parts_of(body, b"x")
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        ("multipart/form-data; boundary=x", b"x"),
        ("Multipart/Form-Data;Boundary=x;charset=utf-8", b"x"),
        ('multipart/form-data; charset=utf-8; boundary="a\'()+_,-./:=? b"', b"a'()+_,-./:=? b"),
        ("multipart/form-data; boundary=\xff", b"\xff"),
    ],
)
def test_the_boundary_is_what_the_header_says(header: str, boundary: bytes) -> None:
    assert boundary_of(header) == boundary


@pytest.mark.parametrize("header", ["", "; boundary=", '; boundary=""', "; boundary=" + "x" * 201, "; charset=x"])
def test_a_header_without_a_boundary_is_refused(header: str) -> None:
    with pytest.raises(UndecodableError, match="boundary"):
        boundary_of("multipart/form-data" + header)


BOUNDARY = st.sampled_from([b"xyz", b"-", b"--", b"a b"])
NAME = st.text(st.characters(exclude_characters='"\\\r\n', exclude_categories=["Cs"]), max_size=20)
CONTENT = st.one_of(
    st.binary(max_size=60), st.lists(st.sampled_from([b"\r\n", b"--", b"\r", b"-", b"y"])).map(b"".join)
)


@given(st.lists(st.tuples(NAME, NAME | st.none(), CONTENT), max_size=5), BOUNDARY, st.lists(st.integers(1, 9)))
@example([("image", None, b"\r\n--"), ("image", None, b"--xy\r\n\r\n")], b"xyz", [])
def test_what_is_written_is_read_again_in_whatever_pieces_it_comes(
    parts: list[tuple[str, str | None, bytes]], boundary: bytes, sizes: list[int]
) -> None:
    mark = b"\r\n--" + boundary
    parts = [each for each in parts if mark not in each[2] + mark[:-1] and "\0" not in each[0]]
    written = b""
    for name, filename, content in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        head = f'Content-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        written += b"--" + boundary + b"\r\n" + head + content + b"\r\n"
    read = parts_of(written + b"--" + boundary + b"--\r\n", boundary, sizes)
    assert read == [Part(*each) for each in parts]


@given(st.lists(st.sampled_from([b"--x", b"--", b"\r\n", b"\r", b'Content-Disposition: form-data; name="a"', b";"])))
def test_garbage_is_refused_or_read_and_nothing_else(pieces: list[bytes]) -> None:
    body = b"".join(pieces)
    try:
        assert sum(len(read.content) for read in parts_of(body, b"x")) <= len(body)
    except UndecodableError:
        pass


@pytest.mark.parametrize("rest", [END, b"--y", b"--x\r\nno header\r\n\r\n"], ids=["whole", "cut off", "broken"])
def test_what_was_read_is_freed_with_its_reader(rest: bytes) -> None:
    body = part('form-data; name="image"; filename="a.jpg"', bytes(1 << 20)) + rest
    gc.disable()  # it comes once in many requests
    tracemalloc.start()
    try:
        for _ in range(4):
            reader = FormReader(b"x", most=200)
            with contextlib.suppress(UndecodableError):
                reader.feed(body)
                reader.close()
            del reader
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert held < 1 << 20


async def post(service: Service, *parts: bytes) -> httpx.Response:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    return await service.client.post("/classify", content=b"".join(parts) + END, headers=headers)


@pytest.mark.parametrize("size", [0, 3 << 20])
async def test_an_image_needs_no_file_name_however_large_it_is(size: int) -> None:
    async with serving() as service:
        for header in ([], ["Content-Type: image/png"], ["Content-Type: application/octet-stream"]):
            response = await post(service, part('form-data; name="image"', PNG + bytes(size), *header))
            assert response.status_code == 200, response.text
            (result,) = response.json()["results"]
            assert (result["filename"], result["top_k"][0]["index"]) == (None, class_of_grey(100))


async def test_a_file_name_may_be_any_text() -> None:
    async with serving() as service:
        response = await post(service, part("form-data; name=\"image\"; filename*=UTF-8''%D1%84.png", PNG))
        assert response.json()["results"][0]["filename"] == "ф.png"


async def test_fields_are_few_and_short() -> None:
    async with serving() as service:
        image = part('form-data; name="image"', PNG)
        long = await post(service, image, part('form-data; name="r"', b"1" * 70_000))
        assert "at most 65536" in assert_is_error(long, 422, "invalid_parameter")
        many = await post(service, image, *[part('form-data; name="r"', b"1")] * 101)
        assert "more than 100 fields" in assert_is_error(many, 422, "invalid_parameter")
