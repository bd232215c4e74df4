"""When the client asks again: a server that is told what to answer, and a clock that moves when somebody sleeps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.client import (
    AsyncClient,
    Client,
    CutOffError,
    ForeignError,
    LateError,
    NoAnswerError,
    Retries,
    UnreachableError,
    clients,
)
from server.client.retries import retry_after_s
from server.errors import DeadlineError, QueueFullError, ServerError, TooLargeError, UnavailableError
from tests.server.conftest import grey_png

PNG = grey_png()
MODELS = httpx.Response(200, json={"models": []})
ANSWER = {
    "model": "tiny",
    "r": 4,
    "r_source": "request",
    "auto": None,
    "tokens": 5,
    "batch_size": 1,
    "config_version": 1,
    "results": [{"filename": None, "top_k": [{"label": "cat", "index": 3, "score": 0.5}]}],
    "timings_ms": {"decode": 1, "queue": 1, "inference": 1, "total": 3},
}
REFUSED, DROPPED = httpx.ConnectError("refused"), httpx.RemoteProtocolError("hung up")
Answers = Sequence[httpx.Response | Exception]


def error(status: int, after: str | None = None) -> httpx.Response:
    """An error in the server's form."""
    kind = next(kind for kind in ServerError.__subclasses__() if kind.status == status)
    body = {"error": {"code": kind.code, "message": "no", "details": {"a": 1}}}
    return httpx.Response(status, json=body, headers={} if after is None else {"retry-after": after})


class World:
    """A server that gives prepared answers, the last one for ever, and the only clock that there is."""

    def __init__(self, answers: Answers) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.now = 100.0
        self.slept: list[float] = []
        self.takes_s = 0.0

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.now += self.takes_s
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Calls a method of either client in a world."""

    def asked(world: World, method: str, *said: Any, options: dict[str, Any] | None = None, **more: Any) -> Any:
        monkeypatch.setattr(clients, "monotonic", lambda: world.now)
        monkeypatch.setattr(clients, "sleep", world.sleep)
        monkeypatch.setattr(clients, "sleep_async", world.sleep_async)
        transport = httpx.MockTransport(world.answer)
        if request.param == "sync":
            with Client("http://test/under", transport=transport, **options or {}) as client:
                return getattr(client, method)(*said, **more)

        async def run() -> Any:
            async with AsyncClient("http://test/under", transport=transport, **options or {}) as client:
                return await getattr(client, method)(*said, **more)

        return asyncio.run(run())

    return asked


@pytest.mark.parametrize("first", [error(429, "1"), error(503, "1"), httpx.Response(502), REFUSED, DROPPED])
@pytest.mark.parametrize("count", [1, 3])
def test_a_server_that_is_full_or_away_is_asked_again(ask: Ask, first: httpx.Response | Exception, count: int) -> None:
    world = World([*[first] * count, httpx.Response(200, json=ANSWER)])
    assert ask(world, "classify", PNG, r=4).label == "cat"
    assert len(world.requests) == count + 1 and len(world.slept) == count
    sent = {(request.method, request.url, request.content) for request in world.requests}
    assert sent == {("POST", httpx.URL("http://test/under/classify?r=4"), PNG)}


def test_several_images_are_sent_again_in_full(ask: Ask) -> None:
    twice = ANSWER | {"results": [*ANSWER["results"]] * 2}  # type: ignore[misc]
    world = World([error(429), httpx.Response(200, json=twice)])
    assert [each.label for each in ask(world, "classify_all", [PNG, PNG])] == ["cat", "cat"]
    assert [request.content.count(PNG) for request in world.requests] == [2, 2]


def test_retry_after_is_honoured_and_spread(ask: Ask) -> None:
    world = World([error(429, "3"), error(503, "7"), MODELS])
    assert ask(world, "models") == []
    first, second = world.slept
    assert 3 <= first <= 3.1 and 7 <= second <= 7.2
    again = World([error(429, "3"), error(503, "7"), MODELS])
    ask(again, "models")
    assert again.slept != world.slept


def test_the_tries_are_counted(ask: Ask) -> None:
    for count in (0, 2):
        world = World([error(503, "1")])
        with pytest.raises(UnavailableError) as raised:
            ask(world, "models", options={"retries": Retries(count=count)})
        assert len(world.requests) == count + 1
        assert (raised.value.retry_after_s, raised.value.details) == (1, {"a": 1})


def test_no_try_begins_after_the_budget(ask: Ask) -> None:
    world = World([error(429, "4")])
    with pytest.raises(QueueFullError):
        ask(world, "models", options={"retries": Retries(count=100, budget_s=10)})
    assert len(world.requests) == 3 and world.now < 110
    slow = World([error(429, "1")])
    slow.takes_s = 6
    with pytest.raises(QueueFullError):
        ask(slow, "models", options={"retries": Retries(count=100, budget_s=10)})
    assert len(slow.requests) == 2 and slow.now == pytest.approx(113, abs=0.1)


def test_a_wait_that_the_budget_has_no_room_for_is_not_begun(ask: Ask) -> None:
    world = World([error(429, "60")])
    with pytest.raises(QueueFullError):
        ask(world, "models")
    assert world.slept == []


def test_a_deadline_counts_from_the_first_try(ask: Ask) -> None:
    world = World([error(429, "1"), error(429, "1"), httpx.Response(200, json=ANSWER)])
    world.takes_s = 0.5
    ask(world, "classify", PNG, deadline_ms=9000)
    left = [float(request.url.params["deadline_ms"]) for request in world.requests]
    assert left[0] == 9000
    assert left[1:] == pytest.approx([7500, 6000], abs=350)
    late = World([error(429, "1")])
    with pytest.raises(QueueFullError):
        ask(late, "classify", PNG, deadline_ms=900)
    assert late.slept == []


FINAL = [
    (error(504), DeadlineError),
    (error(500), ServerError),
    (error(413), TooLargeError),
    (httpx.ReadTimeout("slow"), LateError),
    (httpx.WriteTimeout("slow"), LateError),
]


@pytest.mark.parametrize(("outcome", "kind"), FINAL)
def test_what_another_try_would_not_change_is_raised_at_once(
    ask: Ask, outcome: httpx.Response | Exception, kind: type[Exception]
) -> None:
    world = World([outcome])
    with pytest.raises(kind):
        ask(world, "classify", PNG)
    assert len(world.requests) == 1


MODEL = httpx.Response(404)
CHANGE_TRIES = [
    (REFUSED, 2, 2),
    (httpx.ConnectTimeout(""), 2, 2),
    (error(429), 2, 2),
    (error(503), 2, 1),
    (DROPPED, 2, 1),
    (httpx.ReadError(""), 2, 1),
]


@pytest.mark.parametrize(("outcome", "plain", "guarded"), CHANGE_TRIES)
def test_a_guarded_change_is_repeated_only_where_it_was_surely_not_made(
    ask: Ask, outcome: httpx.Response | Exception, plain: int, guarded: int
) -> None:
    for if_version, tries in ((None, plain), (7, guarded)):
        world = World([outcome, error(404)])
        with pytest.raises((ServerError, NoAnswerError)):
            ask(world, "set_r", "tiny", [8, 4], if_version=if_version)
        assert len(world.requests) == tries
        assert {request.headers.get("if-match") for request in world.requests} == {if_version and '"7"'}
        assert json.loads(world.requests[0].content) == {"r": "[8,4]"}


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (REFUSED, UnreachableError),
        (DROPPED, CutOffError),
        (httpx.ReadError(""), CutOffError),
        (httpx.ReadTimeout(""), LateError),
        (httpx.Response(200, text="<html>hello</html>"), ForeignError),
        (httpx.Response(200, json=[1]), ForeignError),
        (httpx.Response(200, json={"models": [{"name": "tiny"}]}), ForeignError),
        (httpx.Response(200, json={"models": 3}), ForeignError),
        (httpx.Response(204), ForeignError),
    ],
)
def test_where_no_answer_came_it_is_said_why(
    ask: Ask, outcome: httpx.Response | Exception, kind: type[NoAnswerError]
) -> None:
    with pytest.raises(kind, match="http://test/under") as raised:
        ask(World([outcome]), "models", options={"retries": Retries(count=0)})
    assert isinstance(raised.value, ConnectionError) and str(raised.value)[-1] not in " :"


@pytest.mark.parametrize("kind", ServerError.__subclasses__())
def test_every_error_of_the_server_has_its_kind(ask: Ask, kind: type[ServerError]) -> None:
    with pytest.raises(kind, match="^no$") as raised:
        ask(World([error(kind.status)]), "models", options={"retries": Retries(count=0)})
    assert (type(raised.value), raised.value.details) == (kind, {"a": 1})


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (httpx.Response(503, text="<html>", headers={"retry-after": "2"}), UnavailableError),
        (httpx.Response(502, text="<html>"), UnavailableError),
        (httpx.Response(429), QueueFullError),
        (httpx.Response(413, text="<html>"), TooLargeError),
        (httpx.Response(418, json={"error": "tea"}), ServerError),
        (httpx.Response(500, json=["x"]), ServerError),
        (httpx.Response(301, headers={"location": "https://test"}), ServerError),
        (httpx.Response(500, json={"error": {"code": "internal", "message": "m", "details": {}}}), ServerError),
        (httpx.Response(400, json={"error": {"code": "c", "message": "m", "details": {"message": 1}}}), ServerError),
        (httpx.Response(418, content=b"\xff" * 10_000), ServerError),
    ],
)
def test_the_errors_of_others_are_errors_too(ask: Ask, answer: httpx.Response, kind: type[ServerError]) -> None:
    with pytest.raises(ServerError) as raised:
        ask(World([answer]), "models", options={"retries": Retries(count=0)})
    assert isinstance(raised.value, kind)
    assert raised.value.message == "m" or str(answer.status_code) in raised.value.message
    assert len(raised.value.message) < 300
    assert raised.value.retry_after_s == (2 if "retry-after" in answer.headers else None)


@given(st.integers(1, 1000), st.floats(0, 100), st.none() | st.floats(0, 100), st.floats(0, 1))
def test_a_wait_is_within_its_bounds(tries: int, elapsed_s: float, asked_s: float | None, chance: float) -> None:
    wait_s = Retries(count=50, budget_s=60).wait_s(tries, elapsed_s, asked_s, chance)
    if wait_s is None:
        assert tries > 50 or elapsed_s + (asked_s or 0) + 6.4 >= 60
    else:
        assert tries <= 50 and elapsed_s + wait_s < 60
        assert (asked_s or 0) <= wait_s <= (asked_s or 0) + 6.4


def test_waits_double() -> None:
    waits = [Retries(count=9).wait_s(tries, 0.0, None, 1.0) for tries in range(1, 11)]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 6.4, 6.4, None])


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("0", 0),
        (" 12 ", 12),
        ("Sun, 22 Nov 2026 12:00:30 GMT", 30),
        ("Sun, 22 Nov 2026 11:00:00 GMT", 0),
        (None, None),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("\u0662", None),
        ("9" * 400, float("inf")),
    ],
)
def test_retry_after_is_read(said: str | None, seconds: float | None) -> None:
    noon = 1795348800.0  # 2026-11-22 12:00:00 UTC
    assert retry_after_s(said, noon) == seconds
