"""What crosses between an HTTP process and an engine comes back equal, whatever it is; all else is refused."""

from __future__ import annotations

import typing
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ServerError, UnavailableError
from server.images.image import Image, JpegFile, Pixels
from server.ipc.client import LostEngineError
from server.ipc.messages import (
    Call,
    Classify,
    Explain,
    Failure,
    Item,
    Measured,
    Reply,
    call_of,
    reply_of,
    to_bytes,
)
from tests.server.conftest import classify, embed, explain, fake_curve, score
from tests.server.messages import CALLS, ERRORS, REPLIES


def encoded(message: Call | Reply) -> bytearray:
    buffer = bytearray()
    to_bytes(message, buffer)
    return buffer


@given(CALLS)
def test_a_call_comes_back_equal(call: Call) -> None:
    assert call_of(memoryview(encoded(call))) == call


@given(REPLIES)
def test_a_reply_comes_back_equal(reply: Reply) -> None:
    assert reply_of(memoryview(encoded(reply))) == reply


def test_no_kind_of_message_is_left_out_of_these_tests() -> None:
    """A new operation is a new kind of request, with the kind of its results."""

    def kinds(message: type[Call] | type[Reply], field: str) -> set[str]:
        among = typing.get_args(typing.get_type_hints(message)[field])
        return {(typing.get_origin(kind) or kind).__name__ for kind in among}

    asked = {"Classify", "Score", "Embed", "Explain", "Probe", "GetCurve", "GetConfiguration", "Configure", "Withdraw"}
    asked |= {"Load", "Unload", "GetRepository", "GetCompiling", "Seen"}
    answered = {"Answered", "Alive", "Measured", "Progress", "Deployed", "Done", "Repository", "Failure", "Catalog"}
    assert (kinds(Call, "ask"), kinds(Reply, "answer")) == (asked, answered)


@given(st.lists(CALLS, max_size=4), st.binary(max_size=8))
def test_a_message_is_written_behind_what_a_buffer_holds(calls: list[Call], before: bytes) -> None:
    buffer, ends = bytearray(before), [len(before)]
    for call in calls:
        to_bytes(call, buffer)
        ends.append(len(buffer))
    assert buffer.startswith(before)
    parts = [memoryview(buffer)[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    assert [call_of(part) for part in parts] == calls


def test_what_was_read_shares_no_memory_with_the_bytes() -> None:
    for image in (Pixels(bytes(range(256))), JpegFile(bytes(range(256)), 16, 16)):
        sent = Call(1, Classify(model="tiny", images=[image], r=(1, 2), deadline=5.0, top_k=3))
        buffer = encoded(sent)
        got = call_of(memoryview(buffer))
        buffer[:] = bytes(len(buffer))
        assert got == sent
        del buffer[:]  # nor does it hold them


@given(st.binary(max_size=60))
def test_what_is_no_message_is_refused(said: bytes) -> None:
    for read in (call_of, reply_of):
        try:
            read(memoryview(said))  # a few bytes are a message by chance
        except msgspec.MsgspecError:
            pass


@given(CALLS, st.data())
def test_a_call_that_is_cut_off_is_refused(call: Call, data: st.DataObject) -> None:
    whole = encoded(call)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(msgspec.MsgspecError):
        call_of(memoryview(whole)[:cut])


WRONG: list[object] = [
    None,
    {},
    [1],
    [1, ["nothing"]],
    ["one", ["probe"]],
    [1, ["classify", "tiny", "no images", None, 5.0, None, 1, "softmax", None]],
    [1, ["get_curve", 5]],
]


@pytest.mark.parametrize("said", WRONG, ids=str)
@pytest.mark.parametrize("read", [call_of, reply_of])
def test_a_message_of_another_shape_is_refused(said: object, read: Callable[[memoryview], object]) -> None:
    with pytest.raises(msgspec.MsgspecError):
        read(memoryview(msgspec.msgpack.encode(said)))


def test_what_should_be_a_curve_and_is_none_is_refused() -> None:
    said = fake_curve().model_dump()
    right, wrong = ([1, ["measured", said | {"photos": photos}]] for photos in (100, 0))
    assert reply_of(memoryview(msgspec.msgpack.encode(right))) == Reply(1, Measured(fake_curve()))
    with pytest.raises(msgspec.MsgspecError):
        reply_of(memoryview(msgspec.msgpack.encode(wrong)))


@given(ERRORS)
def test_every_error_keeps_its_kind_its_words_and_its_facts(error: ServerError) -> None:
    reply = reply_of(memoryview(encoded(Reply(1, Failure.of(error)))))
    assert isinstance(reply.answer, Failure)
    got = reply.answer.error()
    assert type(got) is type(error)
    assert (got.code, got.status, got.message, str(got)) == (error.code, error.status, error.message, str(error))
    assert (got.retry_after_s, got.details) == (error.retry_after_s, error.details)


def test_an_error_of_a_newer_engine_is_still_one() -> None:
    got = Failure("out_of_paper", "no more", 2.0, {"sheets": 0}).error()
    assert (type(got), got.message, got.retry_after_s, got.details) == (ServerError, "no more", 2.0, {"sheets": 0})


def test_an_engine_that_lost_another_says_that_it_is_unavailable_and_nothing_more() -> None:
    """Else what a second engine says would be taken for its own end, and asked again."""
    assert type(Failure.of(LostEngineError("the engine went down")).error()) is UnavailableError


def test_a_request_says_what_it_asks_for_and_an_item_is_one_of_its_images() -> None:
    kinds = {classify().operation, score().operation, embed().operation}
    assert (kinds, explain().operation) == ({"forward"}, "explain")
    images: list[Image] = [Pixels(b"one"), JpegFile(b"two", 1, 1)]
    both = Explain(model="tiny", images=images, deadline=1.0, top_k=1)
    assert [Item(both, index).image for index in range(2)] == images


@given(CALLS, REPLIES)
def test_a_call_is_no_reply_and_a_reply_no_call(call: Call, reply: Reply) -> None:
    with pytest.raises(msgspec.MsgspecError):
        reply_of(memoryview(encoded(call)))
    with pytest.raises(msgspec.MsgspecError):
        call_of(memoryview(encoded(reply)))
