"""Which HTTP process accepts a client: the policy, the socket's errors, and real processes under a burst."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvloop

from server.api import accept
from server.api.accept import _LONGEST_WAIT_S, Acceptor, Places, wait_s
from server.ipc.door import Door
from server.settings import Settings
from server.shared_values import Sheet
from server.supervisor import Child, _run_http
from tests.server.conftest import until

PROCESSES = 4
ASK = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"


def test_who_holds_no_more_than_the_mean_does_not_wait() -> None:
    assert wait_s(0, []) == wait_s(1000, []) == 0.0  # a process alone
    assert wait_s(0, [0, 0, 0]) == wait_s(5, [5, 5]) == wait_s(3, [4, 9]) == 0.0


def test_who_holds_more_waits_longer_the_more_it_is_and_never_long() -> None:
    waits = [wait_s(mine, [10, 10, 10]) for mine in range(10, 40)]
    assert waits == sorted(waits)
    assert 0.0 == waits[0] < waits[1] < waits[4] < waits[-1] == wait_s(10_000, [0]) == _LONGEST_WAIT_S


def test_of_any_processes_one_does_not_wait() -> None:
    for held in ([0, 1], [7, 7, 8], [100, 0, 0, 0], [3, 2, 1]):
        waits = [wait_s(mine, held[:index] + held[index + 1 :]) for index, mine in enumerate(held)]
        assert waits[held.index(min(held))] == 0.0


def test_a_place_that_is_left_counts_for_nobody_and_is_known_to_have_been_open() -> None:
    places = Places(2)
    assert places.held() == [None, None] and not places.was_ever_open(0)
    places.hold(0, 3)
    assert places.held() == [3, None]
    places.leave(0)
    assert places.held() == [None, None] and places.was_ever_open(0) and not places.was_ever_open(1)


class Open(asyncio.Protocol):
    """Notes the connections that are open."""

    def __init__(self, transports: list[Any], on_lost: Callable[[], None]) -> None:
        self._transports, self._on_lost = transports, on_lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transports.append(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transports.remove(self._transport)
        self._on_lost()


class Listener(socket.socket):
    """A listening socket that can fail."""

    fails_with: int | None = None

    def accept(self) -> Any:
        if self.fails_with is not None:
            raise OSError(self.fails_with, os.strerror(self.fails_with))
        return super().accept()


def listen(host: str = "127.0.0.1") -> Listener:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return Listener(fileno=socket.create_server((host, 0), family=family).detach())


def accepting(listener: socket.socket, places: Places, index: int = 0) -> tuple[Acceptor, list[Any]]:
    connections: list[Any] = []
    acceptor = Acceptor(listener, places, index, lambda on_lost: Open(connections, on_lost))
    acceptor.open()
    return acceptor, connections


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_connections_are_counted_while_they_last_and_do_not_delay_small_writes(
    host: str, factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def run() -> None:
        places, listener = Places(1), listen(host)
        acceptor, connections = accepting(listener, places)
        assert places.held() == [0]
        clients = [socket.create_connection(listener.getsockname()[:2]) for _ in range(3)]
        await until(lambda: len(connections) == 3)
        assert places.held() == [3]
        for connection in connections:
            assert connection.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert connection.get_extra_info("peername")[0] == host
        clients.pop().close()
        await until(lambda: places.held() == [2])
        address = listener.getsockname()[:2]
        await acceptor.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        for client in clients:
            client.close()
        await until(lambda: not connections)
        assert places.held() == [None]  # also after connections are lost

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())


async def test_what_one_process_leaves_another_takes_and_else_it_takes_it_itself() -> None:
    places, first = Places(2), listen()
    second = Listener(fileno=first.dup().detach())
    busy, of_busy = accepting(first, places, 0)
    clients = [socket.create_connection(first.getsockname()) for _ in range(20)]
    await until(lambda: len(of_busy) == 20)
    free, of_free = accepting(second, places, 1)
    clients += [socket.create_connection(first.getsockname()) for _ in range(20)]
    await until(lambda: len(of_busy) + len(of_free) == 40)
    assert len(of_free) > 15  # of two that pay no heed to each other it would have ten
    await free.close()
    places.hold(1, 0)  # one that never looks
    clients += [socket.create_connection(first.getsockname()) for _ in range(5)]
    await until(lambda: len(of_busy) + len(of_free) == 45)
    await busy.close()
    for client in clients:
        client.close()
    await until(lambda: not of_busy and not of_free)


async def test_without_files_the_others_are_left_to_accept_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accept, "_RETRY_S", 0.001)
    places, listener = Places(1), listen()
    acceptor, connections = accepting(listener, places)
    listener.fails_with = errno.EMFILE
    client = socket.create_connection(listener.getsockname())
    with caplog.at_level(logging.ERROR):
        await until(lambda: places.held() == [None])
        before = places.looks()
        for _ in range(20):
            await asyncio.sleep(0.001)
    assert places.looks() == before  # it does not spin on a socket that it cannot take from
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "no connection can be accepted: Too many open files"
    ]
    listener.fails_with = None
    await until(lambda: len(connections) == 1)
    assert places.held() == [1]
    await acceptor.close()
    client.close()
    await until(lambda: not connections)


async def test_a_client_that_leaves_before_it_is_accepted_is_nothing(caplog: pytest.LogCaptureFixture) -> None:
    places, listener = Places(1), listen()
    acceptor, connections = accepting(listener, places)
    listener.fails_with = errno.ECONNABORTED
    client = socket.create_connection(listener.getsockname())
    await until(lambda: places.looks()[0] > 2)
    assert places.held() == [0]
    listener.fails_with = None
    await until(lambda: len(connections) == 1)
    assert not caplog.records
    await acceptor.close()
    client.close()
    await until(lambda: not connections)


class Fleet:
    """HTTP processes that share a socket, as the supervisor has them, without an engine."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.places = Places(PROCESSES)
        settings, self.nowhere = Settings.model_validate({"log_level": "warning"}), Door()
        sheets = [Sheet() for _ in range(PROCESSES)]
        self.children = [
            Child(
                f"http-{index}", _run_http, sheets, index, settings, self.listener, [self.nowhere], self.places, index
            )
            for index in range(PROCESSES)
        ]

    def counts(self) -> list[int]:
        return [held or 0 for held in self.places.held()]

    @contextmanager
    def clients(self, count: int) -> Iterator[None]:
        """So many clients that come at once, each of which has had an answer."""
        with ExitStack() as stack, selectors.DefaultSelector() as waiting:
            for _ in range(count):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(self.listener.getsockname())
                waiting.register(client, selectors.EVENT_WRITE)
            while waiting.get_map():
                for key, _ in waiting.select():
                    client = key.fileobj  # type: ignore[assignment]
                    if key.events == selectors.EVENT_WRITE:
                        client.send(ASK)
                        waiting.modify(client, selectors.EVENT_READ)
                    else:
                        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
                        waiting.unregister(client)
            yield

    def wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            time.sleep(0.01)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    for child in fleet.children:
        child.start()
    try:
        fleet.wait(lambda: None not in fleet.places.held())
        yield fleet
    finally:
        for child in fleet.children:
            child.tell_to_end()
        for child in fleet.children:
            child.end(time.monotonic() + 30)
        fleet.listener.close()
        fleet.nowhere.close()


@pytest.mark.slow
def test_clients_that_come_at_once_are_spread_evenly_and_nobody_waits_for_who_is_stopped_or_gone(fleet: Fleet) -> None:
    for _ in range(2):  # the first requests of a process take it longer
        with fleet.clients(200):
            counts = fleet.counts()
            assert sum(counts) == 200 and max(counts) <= 1.3 * 200 / PROCESSES, counts
        fleet.wait(lambda: fleet.counts() == [0] * PROCESSES)

    stopped, killed = fleet.children[0].process, fleet.children[1].process
    assert stopped and stopped.pid and killed and killed.pid
    with fleet.clients(100):
        os.kill(stopped.pid, signal.SIGSTOP)
        before = fleet.counts()[0]
        with fleet.clients(90):  # all are answered
            counts = fleet.counts()
            assert counts[0] == before and max(counts[1:]) <= 1.3 * sum(counts[1:]) / (PROCESSES - 1), counts
        os.kill(stopped.pid, signal.SIGCONT)

        killed.kill()
        killed.join()
        fleet.children[1].bury()
        fleet.places.leave(1)
        with fleet.clients(30):
            assert fleet.places.held()[1] is None
        fleet.children[1].start()
        fleet.wait(lambda: None not in fleet.places.held())
        with ExitStack() as stack:
            more = 0
            while fleet.counts()[1] < sum(fleet.counts()) / PROCESSES:
                stack.enter_context(fleet.clients(1))
                more += 1
                assert more < 100, fleet.counts()  # at an even share it would never catch up
