"""benchmarks.serving: the servers that it starts, its goals and sums, what it reads of /proc and of answers."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from array import array
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks import serving
from benchmarks.serving_parts.generators import Generators, Order, Share, shared, sum_of
from benchmarks.serving_parts.goals import GOALS, busiest, least, lines_of, rows_of
from benchmarks.serving_parts.parts import PARTS
from benchmarks.serving_parts.peers import FASTAPI, FREE, IMAGE, PEERS
from benchmarks.serving_parts.processes import TICKS_PER_S, connections, cpu_of_stat, cpu_s, established, named
from benchmarks.serving_parts.servers import NotStartedError, running
from server.bench.answer import read
from server.bench.client import BrokenError, Connections, HttpAnswer, Target
from server.bench.load import Request
from tests.server.conftest import grey_png

TARGET = Target("127.0.0.1", 1)


def ask(target: Target, request: Request) -> HttpAnswer:
    async def send() -> HttpAnswer:
        async with Connections(target, headers=IMAGE) as client:
            return await client.post(request.path, request.body)

    return asyncio.run(send())


# --- servers


@pytest.mark.slow
def test_generators_load_a_server_and_are_summed_up() -> None:
    request = Request("/classify", b"12345")
    done: list[float] = []
    with running(FASTAPI, {}, request, IMAGE) as server, Generators(2) as generators:
        assert json.loads(ask(server.target, request).body) == {"bytes": 5}
        order = Order(server.target, [request], IMAGE, clients=3, per_s=0.0, warmup_s=0.1, seconds=0.3)
        load = generators.run(order, [(0.1, lambda: done.append(0.1)), (0.2, lambda: done.append(0.2))])
        assert load.answered > 0 and load.others == 0 and load.statuses == {200: load.answered}
        assert load.p50_ms and load.p99_ms and load.p50_ms <= load.p99_ms and load.generator_us > 0
        assert done == [0.1, 0.2]
        order = Order(server.target, [request], IMAGE, clients=0, per_s=200.0, warmup_s=0.0, seconds=0.5)
        assert generators.run(order).answered == pytest.approx(100, abs=60)
    with pytest.raises(BrokenError):
        ask(server.target, request)


@pytest.mark.slow
@pytest.mark.parametrize("decodes", ["0", "1"])
def test_our_server_around_a_free_model_answers_and_ends(decodes: str) -> None:
    request = Request("/classify?top_k=1&r=8", grey_png())
    with running(FREE, {"PEER_HTTP": "2", "PEER_DECODES": decodes}, request, IMAGE, "/readyz") as server:
        answer = ask(server.target, request)
        assert answer.headers["x-r"] == "8"
        assert json.loads(answer.body)["results"][0]["top_k"] == [{"label": "0", "index": 0, "score": 1.0}]
        assert set(server.processes("http")) == {"http-0", "http-1"}
        assert all(cpu_s(pid) > 0 for pid in server.processes("engine").values())
    with pytest.raises(BrokenError):
        ask(server.target, request)


@pytest.mark.parametrize("ready", [None, "/readyz"])
def test_a_server_that_ends_is_said_with_its_last_words(ready: str | None, tmp_path: Path) -> None:
    command = (sys.executable, "-c", "print('no such luck'); raise SystemExit(3)")
    with (
        pytest.raises(NotStartedError, match="no such luck"),
        running(command, {}, Request("/", b""), IMAGE, ready, tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_peers_get_images_as_they_take_them() -> None:
    (raw,) = PEERS["ray"].requests([b"photo"])
    (in_json,) = PEERS["litserve"].requests([b"photo"])
    assert (raw.body, json.loads(in_json.body)) == (b"photo", {"image": "cGhvdG8="})


# --- goals


def test_a_figure_stands_beside_its_goal() -> None:
    figures = {"images_per_s": 9_999.0, "p99_ms": 40.0, "spread": 1.25, "of_loop_0": 0.7}
    rows = {row["key"]: row for row in rows_of(figures, {"agreement": "weights are random"}, "cuda")}
    assert [rows[key]["met"] for key in ("images_per_s", "p99_ms", "spread", "agreement")] == [False, True, True, None]
    assert rows["agreement"]["note"] == "weights are random"
    assert (rows["of_loop_0"]["goal"], rows["of_loop_0"]["met"]) == (None, None)  # measured, but a goal of a CPU
    assert "mixed" not in rows
    table = "\n".join(lines_of(iter(rows.values())))
    assert ">= 10,000     9,999  NOT MET" in table and "<= 40.0      40.0  met" in table


def test_every_goal_of_a_device_has_a_row() -> None:
    for device in ("cuda", "cpu"):
        keys = [row["key"] for row in rows_of({}, {}, device)]
        assert keys == [goal.key for goal in GOALS if goal.device in (None, device)]


def test_the_least_bound_is_named_once_all_are_known() -> None:
    assert least({"forward": 9.0, "HTTP": 7.0}) == ("HTTP", 7.0)
    assert least({"forward": 9.0, "HTTP": None}) is None


@pytest.mark.parametrize(
    ("counts", "over"), [({"a": 30, "b": 10, "c": 20}, 1.5), ({"a": 5, "b": 5}, 1.0), ({"a": 0, "b": 0}, None)]
)
def test_the_busiest_is_over_the_mean(counts: Mapping[str, int], over: float | None) -> None:
    assert busiest(counts) == over


# --- loads


def test_an_order_is_shared_by_clients_and_rate() -> None:
    requests = [Request("/", bytes([number])) for number in range(4)]
    parts = shared(Order(TARGET, requests, {}, clients=5, per_s=30.0, warmup_s=0, seconds=1), 2)
    assert [(part.clients, part.per_s) for part in parts] == [(3, 15.0), (2, 15.0)]
    assert [part.requests[0].body for part in parts] == [b"\0", b"\2"]
    assert all(sorted(r.body for r in part.requests) == [r.body for r in requests] for part in parts)


def test_the_sum_is_of_all_generators() -> None:
    shares = [
        Share(array("d", [0.1] * 60), Counter({200: 60}), {}, 0.001, 50.0),
        Share(array("d", [0.3] * 40), Counter({200: 40, 503: 2, 0: 1}), {503: "not now", 0: "gone"}, 0.005, 70.0),
    ]
    load = sum_of(shares, 2.0)
    assert (load.per_s, load.answered, load.others) == (50.0, 100, 3)
    assert load.p50_ms == pytest.approx(100) and load.p99_ms == pytest.approx(300)
    assert load.statuses == {200: 100, 503: 2, 0: 1} and load.problems == {503: "not now", 0: "gone"}
    assert (load.lateness_ms, load.generator_us, load.lagged) == (5.0, 60.0, False)
    assert sum_of(shares[:1], 2.0).lateness_ms == 1.0


# --- /proc


def test_processes_are_known_by_the_log_of_their_supervisor() -> None:
    log = (
        "12:00 INFO server.supervisor: engine-0 is process 11\n12:00 INFO: http-10 is process 12\n"
        "12:01 WARNING: process engine-0 (11) ended with status -9\n12:01 INFO: engine-0 is process 31\n"
        "photo is process 9\n"
    )
    assert named(log) == {"engine-0": 31, "http-10": 12}
    assert named("engine is process 5") == {"engine": 5}


def test_cpu_time_is_of_user_and_system() -> None:
    stat = "7 (a (b) c) S " + " ".join(str(number) for number in range(4, 53))
    assert cpu_of_stat(stat) == (14 + 15) / TICKS_PER_S  # fields 14 and 15 of proc(5), counted from 1
    assert cpu_s(os.getpid(), main_thread=True) > 0
    assert cpu_s(os.getpid()) > 0


def test_connections_are_those_of_the_servers_side() -> None:
    lines = [
        "0: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000 1000 0 111 1",
        "1: 0100007F:C350 0100007F:1F90 01 00000000:00000000 00:00000000 00000000 1000 0 222 1",  # the client's side
        "2: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 1000 0 333 1",  # listens
        "3: 0100007F:1F90 0100007F:C351 06 00000000:00000000 00:00000000 00000000 1000 0 0 1",  # has ended
    ]
    assert established(8080, lines) == {"111"}


def test_our_own_connections_are_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        accepted = [listener.accept()[0] for _ in clients]
        assert connections(port, {"us": os.getpid()}) == {"us": 3}
        for each in (*clients, *accepted):
            each.close()


# --- answers


@pytest.mark.parametrize(
    ("said", "body", "keeps"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", True),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\nsum: 1\r\n\r\n",
            b"hello",
            True,
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 1\r\n\r\nx", b"x", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\nx", b"x", False),
    ],
)
def test_an_answer_is_read_once_all_of_it_is_there(said: bytes, body: bytes, keeps: bool) -> None:
    for end in range(len(said)):
        needed = read(said[:end])
        assert isinstance(needed, int) and end < needed <= len(said)
    found = read(said)
    assert not isinstance(found, int)
    assert (found[0].status, found[0].body, found[1]) == (200, body, keeps)


def test_without_a_length_an_answer_ends_with_its_connection() -> None:
    said = b"HTTP/1.1 200 OK\r\nX-R: 8,8\r\n\r\nhel"
    assert isinstance(read(said), int)
    found = read(said, ended=True)
    assert not isinstance(found, int)
    assert (found[0].body, found[0].header(b"x-r"), found[0].header(b"x-s"), found[1]) == (b"hel", "8,8", "", False)


# --- arguments and parts


def test_defaults_go_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "gpus", lambda: 2)
    args = serving.read_arguments(["--images", "x"])
    assert (args.device, args.precision, args.ladder, args.r) == ("cuda", "bf16", [13], 13)
    assert args.two_devices == "cuda:0,cuda:1" and args.max_queue_size == 1280 and "two" in args.parts
    args = serving.read_arguments(["--images", "x", "--device", "cpu", "--r", "0", "8", "--part", "kill,ready"])
    assert (args.ladder, args.r, args.two_devices, args.parts) == ([0, 8], 8, "cpu,cpu", ["kill", "ready"])
    assert all(set(parts.split(",")) <= set(PARTS) for parts in serving.DEFAULT_PARTS.values())


def test_a_part_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving.read_arguments(["--images", "x", "--device", "cpu", "--part", "ready,tea"])
    assert "no part 'tea'" in capsys.readouterr().err
