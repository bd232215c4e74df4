"""Compressed bodies: inflated as they come, never beyond a limit, and refused where they are not what they say."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.compression import Inflater, compressed, inflater_of, wanted_encoding
from server.errors import UndecodableError

ENCODINGS = ("gzip", "deflate")


def inflate(body: bytes, encoding: str, sizes: Sequence[int] = (), most: int = 1 << 20) -> bytes:
    """A body that arrives in pieces of these sizes, and then the rest."""
    inflater, at, found = Inflater(encoding), 0, b""
    for size in sizes:
        found += inflater.feed(body[at : at + size], most, False)
        at += size
    return found + inflater.feed(body[at:], most, True)


@given(st.binary(max_size=3000), st.sampled_from(ENCODINGS), st.lists(st.integers(0, 9), max_size=5))
def test_what_was_compressed_comes_back_in_whatever_pieces(body: bytes, encoding: str, sizes: list[int]) -> None:
    assert inflate(compressed(body, encoding), encoding, sizes) == body


def test_others_compress_alike() -> None:
    body = b"a body" * 100
    assert inflate(gzip.compress(body), "gzip") == inflate(zlib.compress(body), "deflate") == body
    assert gzip.decompress(compressed(body, "gzip")) == zlib.decompress(compressed(body, "deflate")) == body


def test_a_bomb_comes_to_no_more_than_is_allowed() -> None:
    bomb = compressed(bytes(1 << 24), "gzip")
    assert len(bomb) < 1 << 17
    assert len(inflate(bomb, "gzip", most=1000)) == 1000


@given(st.binary(max_size=200), st.sampled_from(ENCODINGS))
def test_garbage_is_refused(body: bytes, encoding: str) -> None:
    with pytest.raises(UndecodableError, match=f"the body is not {encoding}|the body ends before its {encoding}"):
        inflate(body, encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_body_that_is_cut_off_or_goes_on_is_refused(encoding: str) -> None:
    body = compressed(b"a body", encoding)
    for end in range(len(body)):
        with pytest.raises(UndecodableError, match="ends before"):
            inflate(body[:end], encoding)
    with pytest.raises(UndecodableError, match="continues after"):
        inflate(body + b"x", encoding)
    with pytest.raises(UndecodableError, match="continues after"):
        inflate(body + b"x", encoding, [len(body)])


@pytest.mark.parametrize(
    ("name", "is_known"),
    [("gzip", True), ("GZIP", True), (" deflate ", True), ("br", False), ("gzip, gzip", False), ("", False)],
)
def test_two_encodings_are_known(name: str, is_known: bool) -> None:
    assert (inflater_of(name) is not None) == is_known


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("gzip", "gzip"),
        ("deflate, gzip", "deflate"),
        ("br, GZIP;q=0.1", "gzip"),
        ("gzip; q=0", None),
        ("gzip;q=0.000, deflate", "deflate"),
        ("*", None),
        ("identity", None),
        ("", None),
    ],
)
def test_an_answer_is_compressed_as_its_client_reads_it(accept: str, wanted: str | None) -> None:
    assert wanted_encoding(accept, 1 << 20) == wanted
    assert wanted_encoding(accept, 100) is None  # not worth it
