"""`tome-server bench` against a server whose every answer is known, its percentiles, and its search for a rate."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.client import BrokenError, Connections, Target
from server.bench.load import Reply, Request, Run, closed_loop, open_loop, poisson
from server.bench.rate import ALLOWED, TOLERANCE, Probe, find_rate
from server.bench.rows import percentile, row_of
from server.cli import main
from tests.server.conftest import grey_png

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-r: 8\r\n\r\n{}"
BUSY = b'HTTP/1.1 429 Too Many Requests\r\ncontent-length: 33\r\n\r\n{"error": {"message": "not now"}}'


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


@dataclass
class Known:
    """A server that answers what `answer` says, bytes for bytes; None ends the connection.

    Attributes:
        asked: What came.
        connections: How many were opened.
    """

    answer: Callable[[Asked, int], bytes | None]
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines if line)
                method, url, _ = start.split()
                body = await reader.readexactly(int(headers["content-length"]))
                parts = urlsplit(url)
                self.asked.append(Asked(method, parts.path, parse_qs(parts.query), headers, body))
                said = self.answer(self.asked[-1], len(self.asked) - 1)
                if said is None:
                    break
                writer.write(said)
                if not keeps(said):
                    break
        except asyncio.IncompleteReadError:
            pass  # the client has gone
        finally:
            writer.close()


def keeps(said: bytes) -> bool:
    """Whether the connection stays open after an answer."""
    said = said.lower()
    return b"connection: close" not in said and (b"content-length" in said or b"chunked" in said)


@asynccontextmanager
async def known(answer: Callable[[Asked, int], bytes | None]) -> AsyncIterator[tuple[Known, Target]]:
    """The server on a free port of this loop."""
    server = Known(answer)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    try:
        yield server, Target("127.0.0.1", listening.sockets[0].getsockname()[1])
    finally:
        listening.close()
        await listening.wait_closed()


@contextmanager
def apart(answer: Callable[[Asked, int], bytes | None]) -> Iterator[tuple[Known, str]]:
    """The server in a thread of its own, for commands that run loops of theirs; and its URL."""
    ready = threading.Event()
    found: list[Any] = []

    async def run() -> None:
        told = asyncio.Event()
        async with known(answer) as (server, target):
            found.extend([server, str(target), asyncio.get_running_loop(), told])
            ready.set()
            await told.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(60)
    server, url, loop, told = found
    try:
        yield server, url
    finally:
        loop.call_soon_threadsafe(told.set)
        thread.join()


def ok(asked: Asked, number: int) -> bytes:
    return OK


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for grey in (10, 200):
        (folder / f"{grey}.png").write_bytes(grey_png(grey))
    return folder


# --- the client


@pytest.mark.parametrize(
    ("said", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n", b"hello"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nsum: 1\r\n\r\n", b"hello"),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello", b"hello"),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b""),
    ],
)
async def test_the_client_reads_every_form_of_an_answer(said: bytes, body: bytes) -> None:
    async with known(lambda asked, number: said) as (server, target), Connections(target) as client:
        for _ in range(3):
            answer = await client.post("/classify?r=8", b"photo")
            assert (answer.status, answer.body) == (200, body)
    assert [(asked.method, asked.path, asked.body) for asked in server.asked] == [("POST", "/classify", b"photo")] * 3
    assert server.connections == (1 if keeps(said) else 3)


async def test_a_kept_connection_that_was_closed_is_opened_again() -> None:
    def once_each(asked: Asked, number: int) -> bytes | None:
        return None if number == 1 else OK  # the second request finds its connection gone

    async with known(once_each) as (server, target), Connections(target) as client:
        assert [(await client.post("/", b"x")).status for _ in range(2)] == [200, 200]
    assert (len(server.asked), server.connections) == (3, 2)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (None, "ended before the answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nconnection: close\r\n\r\nhello", "ended before the answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", "not HTTP"),
    ],
)
async def test_what_is_no_answer_is_said(said: bytes | None, named: str) -> None:
    async with known(lambda asked, number: said) as (_, target), Connections(target) as client:
        with pytest.raises(BrokenError, match=named):
            await client.post("/", b"x")


async def test_silence_ends_at_the_timeout() -> None:
    async with known(lambda asked, number: b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n") as (_, target):
        async with Connections(target, timeout_s=0.05) as client:
            with pytest.raises(BrokenError, match=r"no answer in 0\.05 s"):
                await client.post("/", b"x")


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix"),
    [
        ("http://localhost:8000", "localhost", 8000, ""),
        ("http://example.org/a/b/", "example.org", 80, "/a/b"),
        ("localhost:9", "localhost", 9, ""),
        ("http://[::1]:9/", "::1", 9, ""),
    ],
)
def test_urls_are_read(url: str, host: str, port: int, prefix: str) -> None:
    target = Target.parse(url)
    assert (target.host, target.port, target.prefix) == (host, port, prefix)
    assert Target.parse(str(target)) == target


# --- loads


async def test_an_open_loop_sends_all_in_turn_however_late_it_is() -> None:
    requests = [Request("/classify?r=8", b"one"), Request("/classify?r=0", b"two")]
    watched: list[Reply] = []
    async with known(ok) as (server, target), Connections(target) as client:
        run = await open_loop(client, requests, [-1.0] * 5, watch=watched.append)  # all were due a second ago
    assert sorted((asked.query["r"], asked.body) for asked in server.asked) == (
        [(["0"], b"two")] * 2 + [(["8"], b"one")] * 3
    )
    assert [reply.status for reply in run.replies] == [200] * 5 and watched == run.replies
    assert all(reply.seconds >= reply.late_s >= 1 for reply in run.replies)  # from the due time
    assert row_of(run, 8, per_s=5).lagged


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    all_asked = 0

    async def answer_when_all_are_there(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal all_asked
        await reader.readuntil(b"\r\n\r\nx")
        all_asked += 1
        while all_asked < 20:
            await asyncio.sleep(0.001)
        writer.write(OK)
        writer.close()

    listening = await asyncio.start_server(answer_when_all_are_there, "127.0.0.1", 0)
    async with listening, Connections(Target("127.0.0.1", listening.sockets[0].getsockname()[1])) as client:
        run = await open_loop(client, [Request("/", b"x")], [0.001 * number for number in range(20)])
    assert [reply.status for reply in run.replies] == [200] * 20


async def test_a_closed_loop_has_one_request_a_client_in_flight() -> None:
    async with known(ok) as (server, target), Connections(target) as client:
        run = await closed_loop(client, [Request("/", b"x")], 3, 0.2)
    assert server.connections == 3
    assert len(run.replies) == len(server.asked) > 3
    assert {reply.said for reply in run.replies} == {8.0}


async def test_nobody_there_is_counted() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = Target(*free.getsockname())
        async with Connections(target) as client:
            run = await open_loop(client, [Request("/", b"x")], [0.0, 0.0])
    row = row_of(run, None, per_s=2)
    assert (row.sent, row.failed, row.refused, row.goodput, row.p50_ms) == (2, 2, 0, 0, None)
    assert list(row.problems) == ["no answer"]


def test_poisson_times_rise_at_the_rate() -> None:
    due = list(poisson(1000, 10, seed=1))
    assert due == sorted(due) and 0 < due[0] and due[-1] < 10
    assert len(due) == pytest.approx(10_000, rel=0.05)
    gaps = [after - before for before, after in zip(due, due[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert math.sqrt(variance) == pytest.approx(mean, rel=0.05)  # as of an exponential distribution
    assert due == list(poisson(1000, 10, seed=1)) != list(poisson(1000, 10, seed=2))


# --- rows


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.001, 1))
def test_a_percentile_is_the_least_value_that_covers_its_share(values: list[float], share: float) -> None:
    found = percentile(sorted(values), share)
    assert found in values and found is not None
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values) + 1e-9


def test_percentiles_of_a_hundred_and_of_none() -> None:
    assert [percentile(list(range(1, 101)), share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert percentile([], 0.5) is None


def replies_of(statuses: Sequence[int], seconds: float = 0.1) -> list[Reply]:
    return [Reply(0, status, seconds, 0.0, 4.0 if status == 200 else f"says {status}") for status in statuses]


@given(st.lists(st.sampled_from([0, 200, 429, 500, 503, 504]), min_size=1), st.booleans())
def test_every_request_is_counted_once(statuses: list[int], in_time: bool) -> None:
    run = Run(replies_of(statuses), 2.0, [0.0])
    row = row_of(run, 4, clients=3, deadline_s=0.2 if in_time else 0.05)
    good = round(row.goodput * 2)
    assert good == (statuses.count(200) if in_time else 0)
    assert good + row.late + row.refused + row.failed == row.sent == len(statuses)
    assert row.refused == statuses.count(429) + statuses.count(503)
    assert row.failed == statuses.count(500) + statuses.count(0)
    assert row.throughput == statuses.count(200) / 2
    assert row.goodput_share == good / len(statuses)
    assert row.problems.keys() == {str(status or "no answer") for status in set(statuses) - {200}}


def test_only_a_sender_that_was_late_has_lagged() -> None:
    replies = replies_of([200] * 10, seconds=0.1)
    assert not row_of(Run(replies, 1.0, [0.009] * 10), 0, clients=1).lagged  # less than a tenth of 100 ms
    assert row_of(Run(replies, 1.0, [0.011] * 10), 0, clients=1).lagged


# --- the highest rate


@given(st.floats(0.5, 500), st.floats(0.1, 8))
def test_the_highest_rate_is_found_to_3_percent(capacity: float, start: float) -> None:
    tried: list[float] = []

    def probe(per_s: float) -> Probe:
        tried.append(per_s)
        return Probe(500, 0 if per_s <= capacity else 50, 0)

    found = find_rate(probe, start * capacity, lambda per_s, seen: None)
    assert found.per_s <= capacity < found.fails_at <= found.per_s / (1 - TOLERANCE) * 1.0001
    assert found.sure and {found.per_s, found.fails_at} <= set(tried)


def test_no_rate_is_an_answer_too() -> None:
    heard: list[tuple[float, bool]] = []
    found = find_rate(lambda per_s: Probe(100, 100, 0), 64, lambda per_s, seen: heard.append((per_s, seen.passed)))
    assert (found.per_s, found.passed, found.fails_at) == (0.0, None, 2.0)
    assert heard == [(64, False), (32, False), (16, False), (8, False), (4, False), (2, False)]


def test_one_failure_is_too_many() -> None:
    assert not Probe(100_000, 0, 1).passed and Probe(100_000, 0, 1).sure
    assert Probe(100_000, 1000, 0).passed and not Probe(100_000, 1001, 0).passed


@pytest.mark.parametrize(("each", "runs"), [((100, 0), 4), ((1000, 9), 3), ((1000, 0), 1), ((100, 50), 1)])
def test_a_near_thing_is_tried_again(each: tuple[int, int], runs: int) -> None:
    tried: list[float] = []

    def probe(per_s: float) -> Probe:
        tried.append(per_s)
        return Probe(*each, unanswered=0) if per_s <= 10 else Probe(100, 100, 0)

    find_rate(probe, 10, lambda per_s, seen: None)
    assert tried.count(10) == runs


@given(st.integers(1, 5000), st.data())
def test_a_sure_verdict_is_that_of_the_share(sent: int, data: st.DataObject) -> None:
    over = data.draw(st.integers(0, sent))
    seen = Probe(sent, over, 0)
    low, high = seen.interval
    assert low - 1e-9 <= over / sent <= high + 1e-9
    if seen.sure:
        assert seen.passed == (high < ALLOWED)


# --- the command


def last_json(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    shown = capsys.readouterr()
    assert shown.err == ""  # no terminal looks on
    lines = shown.out.splitlines()
    return lines, json.loads(lines[-1])


def test_the_command_counts_what_each_r_and_rate_came_to(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def by_r(asked: Asked, number: int) -> bytes:
        (r,) = asked.query["r"]
        refuses = r == "13" and any(before.query["r"] == ["13"] for before in server.asked[:-1])
        return BUSY if refuses else OK.replace(b"x-r: 8", b"x-r: 2,4" if r == "auto" else f"x-r: {r}".encode())

    command = (
        "--r 0 13 auto 8,4 --rate 40 80 --duration 0.25 --warmup 0 --deadline-ms 60000 --model mine --api-key secret"
    )
    with apart(by_r) as (server, url):
        assert main(["bench", "--url", url, "--images", str(photos), *command.split()]) == 0
    lines, result = last_json(capsys)
    rows = result["rows"]
    assert [(row["r"], row["per_s"]) for row in rows] == [
        (r, rate) for r in (0, 13, "auto", [8, 4]) for rate in (40, 80)
    ]
    assert sum(row["sent"] for row in rows) == len(server.asked) - 4  # and each r was asked for once before
    for row in rows:
        refused = row["sent"] if row["r"] == 13 else 0
        assert (row["refused"], row["failed"], row["late"]) == (refused, 0, 0)
        assert row["goodput_share"] == (0 if refused else 1)
        assert row["mean_r"] == {"0": 0, "13": None, "auto": 3, "[8, 4]": 6}[str(row["r"])]
        assert (row["p99_ms"] is None) == bool(refused)
    assert "429, for example: not now" in lines
    for asked in server.asked:
        assert (asked.path, asked.query["model"], asked.query["deadline_ms"]) == ("/classify", ["mine"], ["60000"])
        assert asked.headers["x-api-key"] == "secret"
    assert {asked.body for asked in server.asked} == {file.read_bytes() for file in photos.iterdir()}


def test_the_command_counts_what_clients_that_wait_came_to(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with apart(ok) as (server, url):
        command = ["--concurrency", "1", "3", "--duration", "0.2", "--warmup", "0"]
        assert main(["bench", "--url", url, "--images", str(photos), *command]) == 0
    _, result = last_json(capsys)
    assert [(row["r"], row["clients"], row["goodput_share"]) for row in result["rows"]] == [(None, 1, 1), (None, 3, 1)]
    assert sum(row["sent"] for row in result["rows"]) == len(server.asked) - 1
    assert all("r" not in asked.query for asked in server.asked)


def test_the_command_draws(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "bench.svg"
    with apart(ok) as (_, url):
        command = ["--r", "0", "8", "--rate", "50", "--duration", "0.1", "--warmup", "0", "--plot", str(file)]
        assert main(["bench", "--url", url, "--images", str(photos), *command]) == 0
    capsys.readouterr()
    assert "<svg" in file.read_text()


def test_the_command_finds_a_rate(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.bench.session import Session

    def at_rate(session: Session, r: object, per_s: float, seconds: float) -> Run:
        return Run(replies_of([200] * 1000, 0.01 if per_s <= 50 else 0.5), 1.0, [0.0])

    def with_clients(session: Session, r: object, clients: int, seconds: float) -> Run:
        return Run(replies_of([200] * 80, 0.01 if r == 8 else 0.3), 1.0, [0.0])

    monkeypatch.setattr(Session, "at_rate", at_rate)
    monkeypatch.setattr(Session, "with_clients", with_clients)
    with apart(ok) as (_, url):
        command = ["--r", "8", "0", "--find-rate", "--p99-ms", "40"]
        assert main(["bench", "--url", url, "--images", str(photos), *command]) == 0
    lines, result = last_json(capsys)
    found, none = result["rates"]
    assert 48 < found["per_s"] <= 50 < found["fails_at"] < 52 and found["sure"]
    assert found["probes"][0] == {
        "per_s": 80, "passed": False, "sure": True, "sent": 1000, "over": 1000, "unanswered": 0, "lagged": False,
    }  # fmt: skip
    assert none["per_s"] == 0 and none["lone_p50_ms"] == pytest.approx(300)
    assert lines[2] == "r=0: no rate: a lone client's requests take 300.0 ms (median)"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--url https://localhost", "without TLS"),
        ("--url http://user@localhost", "must have the form http://HOST"),
        ("--url http://localhost:port", "--url"),
        ("--r 0 fast", "'fast'"),
        ("--rate 0", "'0'"),
        ("--rate ten", "'ten'"),
        ("--concurrency 1.5", "'1.5'"),
        ("--duration 0", "--duration is 0"),
        ("--duration nan", "--duration is nan"),
        ("--warmup -1", "--warmup is -1"),
        ("--deadline-ms -5", "--deadline-ms is -5"),
        ("--find-rate", "go together"),
        ("--p99-ms 40", "go together"),
        ("--find-rate --p99-ms 40 --plot x.png", "--plot"),
        ("--plot missing/x.png", "--plot is missing/x.png: there is no folder missing"),
        ("--images .", "0 images"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: str,
    named: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photos if "." not in arguments.split() else tmp_path_of(tmp_path))
    assert main(["bench", "--images", str(photos), *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("tome-server: ") and named in shown.err and shown.out == ""


def tmp_path_of(tmp_path: Path) -> Path:
    empty = tmp_path / "empty"
    empty.mkdir()
    return empty


def test_the_command_says_what_the_server_says(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with apart(lambda asked, number: BUSY) as (_, url):
        assert main(["bench", "--url", url, "--images", str(photos), "--r", "8"]) == 2
    assert f"tome-server: {url} at r=8: 429 not now" in capsys.readouterr().err


def test_the_command_says_that_nobody_listens(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert main(["bench", "--url", url, "--images", str(photos)]) == 2
    assert capsys.readouterr().err.startswith(f"tome-server: {url}: ")


def test_a_plot_without_matplotlib_says_so(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "--images", str(photos), "--plot", "x.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
