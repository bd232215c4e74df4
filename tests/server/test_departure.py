"""Clients that close their direction: who waits for an answer gets it, and who has left is noticed."""

from __future__ import annotations

import socket

import pytest

from tests.server.listening import Listening, Recorder, all_of, statuses

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
POST = b"POST /patient HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
GET = b"GET /good HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("behind", [b"", GET, GET * 3, GET[:20]], ids=["alone", "two", "four", "half a one behind"])
def test_a_request_after_which_no_more_is_sent_is_answered(
    listening: Listening, recorder: Recorder, behind: bytes
) -> None:
    with listening.connect() as client:
        client.sendall(POST + b"hi" + behind)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(len(INTERIM)) == INTERIM  # it has seen the end, and goes on
        listening.call(recorder.go_on.set)
        received = all_of(client)
    assert statuses(received) == [200] * (1 + behind.count(b"\r\n\r\n"))
    assert received.count(b"connection: close") == 1
    assert recorder.done[0] == "POST /patient hi" and recorder.gone == []


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_client_that_closes_is_noticed_while_it_is_worked_for(
    listening: Listening, recorder: Recorder, version: bytes
) -> None:
    client = listening.connect()
    client.sendall(POST.replace(b"1.1", version) + b"hi" + GET)
    listening.until(lambda: "/patient" in recorder.called)
    client.close()
    listening.until(lambda: recorder.gone == ["/patient"] and not listening.connections)
    assert recorder.done == []


def test_a_client_that_waits_first_and_closes_later_is_noticed(listening: Listening, recorder: Recorder) -> None:
    client = listening.connect()
    client.sendall(POST + b"hi")
    client.shutdown(socket.SHUT_WR)
    assert client.recv(len(INTERIM)) == INTERIM
    assert recorder.gone == []
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))  # by a reset
    client.close()
    listening.until(lambda: recorder.gone == ["/patient"] and not listening.connections)


@pytest.mark.parametrize(
    "sent", [POST + b"h", POST.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked") + b"2"]
)
def test_a_body_that_ends_early_is_refused(listening: Listening, recorder: Recorder, sent: bytes) -> None:
    with listening.connect() as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        received = all_of(client)
    assert statuses(received) == [400] and b"before its body does" in received
    assert recorder.done == []


def test_a_body_that_ends_early_is_refused_in_its_turn(listening: Listening, recorder: Recorder) -> None:
    with listening.connect() as client:
        client.sendall(POST + b"hi" + POST + b"h")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(len(INTERIM)) == INTERIM
        listening.call(recorder.go_on.set)
        assert statuses(all_of(client)) == [200, 400]
    assert recorder.done == ["POST /patient hi"]


@pytest.mark.parametrize("sent", [b"", b"GET /go", GET])
def test_who_waits_for_nothing_is_hung_up_on(listening: Listening, sent: bytes) -> None:
    with listening.connect() as client:
        client.sendall(sent)
        if sent == GET:
            assert statuses(client.recv(1 << 16)) == [200]
        client.shutdown(socket.SHUT_WR)
        assert all_of(client) == b""
