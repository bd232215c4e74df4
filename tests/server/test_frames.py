"""Frames over a transport that is played: whole messages come out however a stream is cut, and turns leave as one."""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.errors import QueueFullError
from server.images.image import JpegFile, Pixels
from server.ipc.frames import _ROOM, Frames
from server.ipc.messages import Alive, Call, Classify, Failure, Probe, Reply, Withdraw, call_of, reply_of, to_bytes
from tests.server.messages import CALLS, REPLIES


class Wire(asyncio.Transport):
    """Keeps what is written, one entry a write, and what becomes of the connection."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_closed = self.is_aborted = self.is_gone = False

    def write(self, data: Any) -> None:
        if self.is_gone or self.is_closed or self.is_aborted:  # as uvloop's
            raise RuntimeError("unable to perform operation on a closed transport")
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.is_closed or self.is_aborted or self.is_gone

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_aborted = True


class End:
    """One end of a connection, and what it has received."""

    def __init__(self, decode: Any = call_of, greeting: Reply | None = None) -> None:
        self.received: list[Any] = []
        self.lost = 0
        self.wire = Wire()
        self.frames: Frames[Any] = Frames(
            decode, self.received.append, self._lose, (lambda: greeting) if greeting is not None else None
        )
        self.frames.connection_made(self.wire)

    def _lose(self) -> None:
        self.lost += 1

    @property
    def room(self) -> int:
        """Bytes that it would receive at once."""
        return len(self.frames.get_buffer(-1))

    def gets(self, data: bytes) -> None:
        """What an event loop does with bytes that have come: as many at once as there is room for."""
        while data and not self.wire.is_aborted:
            room = self.frames.get_buffer(-1)
            now, data = data[: len(room)], data[len(room) :]
            room[: len(now)] = now
            self.frames.buffer_updated(len(now))


def stream(messages: Iterable[Call | Reply]) -> bytes:
    """Messages as they stand on the wire."""
    whole = bytearray()
    for message in messages:
        written = bytearray()
        to_bytes(message, written)
        whole += struct.pack("!I", len(written)) + written
    return bytes(whole)


def photo(size: int, call_id: int = 1) -> Call:
    """A call with so many bytes of an image; no two bytes at a distance of 64 KiB are equal."""
    data = b"".join(struct.pack("!I", number) for number in range(size // 4 + 1))[:size]
    return Call(call_id, Classify(model="tiny", images=[JpegFile(data, 8, 8)], r=(1, 2, 3), deadline=9.0, top_k=1))


def read(writes: Iterable[bytes], decode: Any = call_of) -> list[Any]:
    """The messages in what was written."""
    other = End(decode)
    for write in writes:
        other.gets(write)
    assert not other.wire.is_aborted
    return other.received


SMALL = [Call(1, Probe()), photo(50, 2), Call(3, Withdraw())]


def test_messages_come_out_whole_wherever_the_stream_is_cut() -> None:
    whole = stream(SMALL)
    for first, second in itertools.combinations_with_replacement(range(len(whole) + 1), 2):
        end = End()
        for part in (whole[:first], whole[first:second], whole[second:]):
            end.gets(part)
        assert end.received == SMALL


def test_messages_come_out_whole_byte_by_byte_each_as_soon_as_it_is_there() -> None:
    end, ends = End(), list(itertools.accumulate(len(stream([message])) for message in SMALL))
    for count, byte in enumerate(stream(SMALL), 1):
        end.gets(bytes([byte]))
        assert len(end.received) == sum(count >= each for each in ends)
    assert end.received == SMALL


@given(st.lists(CALLS, max_size=6), st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_any_calls_come_out_of_any_pieces(calls: list[Call], pieces: list[int]) -> None:
    end, whole, start = End(), stream(calls), 0
    for piece in itertools.cycle(pieces):
        if start >= len(whole):
            break
        end.gets(whole[start : start + piece])
        start += piece
    assert end.received == calls


@given(st.lists(REPLIES, max_size=6))
def test_any_replies_come_out(replies: list[Reply]) -> None:
    end = End(reply_of)
    end.gets(stream(replies))
    assert end.received == replies


@given(
    sizes=st.lists(st.sampled_from([0, 100, _ROOM // 3, _ROOM - 60, _ROOM, _ROOM + 1, 3 * _ROOM]), max_size=6),
    piece=st.sampled_from([1000, _ROOM // 2 + 7, _ROOM, 10 * _ROOM]),
)
@example(sizes=[3 * _ROOM, 100, 3 * _ROOM, _ROOM, 0], piece=_ROOM)
def test_messages_larger_than_the_room_come_out_among_small_ones(sizes: list[int], piece: int) -> None:
    calls = [photo(size, call_id) for call_id, size in enumerate(sizes)]
    end, whole = End(), stream(calls)
    for start in range(0, len(whole), piece):
        end.gets(whole[start : start + piece])
    assert end.received == calls
    assert end.room == _ROOM  # and what the large ones took is given back


def test_the_room_is_as_large_as_the_message_that_is_under_way_and_small_again_after_it() -> None:
    end, large = End(), stream([photo(10 * _ROOM)])
    assert end.room == _ROOM
    end.gets(large[:100])
    assert end.room == len(large) - 100
    end.gets(large[100 : 5 * _ROOM])
    assert end.room == len(large) - 5 * _ROOM
    end.gets(large[5 * _ROOM :] + stream(SMALL))
    assert end.received == [photo(10 * _ROOM), *SMALL]
    assert end.room == _ROOM


def test_a_large_message_is_not_copied_again_for_every_piece_of_it() -> None:
    """Its pieces go where it will stand: the memory stays the same until it is whole."""
    end, large = End(), stream([photo(10 * _ROOM)])
    end.gets(large[:100])
    place = end.frames.get_buffer(-1).obj
    for start in range(100, len(large) - 1000, _ROOM):
        end.gets(large[start : min(start + _ROOM, len(large) - 1000)])
        assert end.frames.get_buffer(-1).obj is place


def test_many_messages_of_one_turn_are_handed_over_in_that_turn_and_in_order() -> None:
    end, calls = End(), [photo(20, call_id) for call_id in range(500)]
    data = stream(calls)
    assert len(data) < _ROOM
    end.frames.get_buffer(-1)[: len(data)] = data
    end.frames.buffer_updated(len(data))
    assert end.received == calls


def test_what_was_received_stays_as_it_was_when_more_comes() -> None:
    end = End()
    end.gets(stream([photo(5000, 1)]))
    end.gets(stream([photo(5000, 2)]) + bytes(3))
    assert end.received == [photo(5000, 1), photo(5000, 2)]


async def test_what_is_sent_in_one_turn_leaves_in_one_write() -> None:
    end, calls = End(), [photo(1000, call_id) for call_id in range(50)]
    for call in calls:
        end.frames.send(call)
    assert end.wire.writes == []
    await asyncio.sleep(0)
    assert len(end.wire.writes) == 1
    for call in SMALL:
        end.frames.send(call)
    await asyncio.sleep(0)
    assert [read([write]) for write in end.wire.writes] == [calls, SMALL]
    await asyncio.sleep(0)
    assert len(end.wire.writes) == 2  # a turn without a message writes nothing


async def test_the_greeting_goes_before_all_others() -> None:
    greeting, answer = Reply(0, Alive()), Reply(7, Alive())
    end = End(greeting=greeting)
    end.frames.send(answer)
    await asyncio.sleep(0)
    assert read(end.wire.writes, reply_of) == [greeting, answer]


async def test_who_leaves_sends_what_is_queued_first() -> None:
    end = End()
    for call in SMALL:
        end.frames.send(call)
    end.frames.close()
    assert end.wire.is_closed and read(end.wire.writes) == SMALL
    end.frames.send(Call(9, Probe()))  # too late: it is lost, and nothing is written
    await asyncio.sleep(0)
    assert read(end.wire.writes) == SMALL


async def test_a_message_for_a_connection_that_is_gone_is_lost() -> None:
    end = End()
    end.frames.send(Call(1, Probe()))  # waits for the end of this turn, which the connection does not see
    end.wire.is_gone = True
    end.frames.connection_lost(None)
    end.frames.send(Call(2, Probe()))
    await asyncio.sleep(0)
    assert (end.wire.writes, end.lost) == ([], 1)


async def test_a_message_that_cannot_be_written_is_refused_and_those_beside_it_arrive() -> None:
    end = End(reply_of)
    end.frames.send(Reply(1, Alive()))
    odd = Failure.of(QueueFullError("full", odd=object()))
    with pytest.raises((AttributeError, TypeError)):
        end.frames.send(Reply(2, odd))
    end.frames.send(Reply(3, Alive()))
    await asyncio.sleep(0)
    with pytest.raises((AttributeError, TypeError)):
        end.frames.send(Reply(4, odd))  # alone in its turn
    await asyncio.sleep(0)
    assert read(end.wire.writes, reply_of) == [Reply(1, Alive()), Reply(3, Alive())]


GARBAGE = [
    struct.pack("!I", 0),
    struct.pack("!I", 5) + b"hello",
    stream([Reply(1, Alive())]),  # a message, but not of those that this end takes
    struct.pack("!I", 3) + stream([Call(1, Probe())])[4:],  # cut short by its length
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=["empty", "text", "other", "short"])
def test_a_connection_is_given_up_for_what_is_no_message(garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        end = End()
        end.gets(stream(SMALL) + garbage + stream(SMALL))
    assert end.wire.is_aborted
    assert end.received == SMALL  # what came before it
    assert "closed after a bad message" in caplog.text


def test_whoever_breaks_over_a_message_gives_the_connection_up(caplog: pytest.LogCaptureFixture) -> None:
    def fail(call: Call) -> None:
        raise ZeroDivisionError("by zero")

    wire = Wire()
    frames = Frames(call_of, fail, lambda: None)
    frames.connection_made(wire)
    data = stream([Call(1, Probe())])
    frames.get_buffer(-1)[: len(data)] = data
    frames.buffer_updated(len(data))
    assert wire.is_aborted and "by zero" in caplog.text


def test_pixels_of_a_full_batch_fit_as_one_message() -> None:
    """What `Classify` of many images takes, and more than one read of a socket gives."""
    images = [Pixels(bytes([number]) * 150_528) for number in range(32)]
    call = Call(1, Classify(model="tiny", images=list(images), deadline=1.0, top_k=5))
    end = End()
    end.gets(stream([call, Call(2, Withdraw())]))
    assert end.received == [call, Call(2, Withdraw())]
