"""Health, the API's description, and the one shape of every error."""

from __future__ import annotations

from contextlib import closing

import pytest

from server.errors import ServerError
from server.ipc.client import RemoteEngine
from server.ipc.door import Door
from tests.server.conftest import (
    assert_is_error,
    grey_png,
    serving,
)

PNG = grey_png(100)
FORM = [("image", ("a.png", PNG))]


async def test_a_ready_service_says_so() -> None:
    async with serving() as service:
        assert (await service.client.get("/livez")).status_code == 200
        for path in ("/readyz", "/healthz"):
            assert (await service.client.get(path)).json() == {"status": "ready", "models": ["tiny"]}


async def test_without_an_engine_the_service_lives_and_is_not_ready() -> None:
    with closing(Door()) as door:
        remote = RemoteEngine(door)
    async with serving(engine=remote) as service:
        assert (await service.client.get("/livez")).status_code == 200
        answers = [await service.client.get(path) for path in ("/readyz", "/healthz", "/v1/models", "/v1/models/tiny")]
        answers.append(await service.classify(PNG, status=503))
        for answer in answers:
            assert_is_error(answer, 503, "unavailable")
            assert int(answer.headers["retry-after"]) >= 1


async def test_an_unknown_path_and_a_wrong_method_have_the_one_error_shape() -> None:
    async with serving() as service:
        assert_is_error(await service.client.get("/nothing"), 404, "not_found")
        wrong = await service.client.get("/classify")
        assert_is_error(wrong, 405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"


async def test_an_unforeseen_exception_is_a_500_of_the_one_shape_that_tells_nothing_inside(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as service:

        async def explode(model: str) -> None:
            raise ZeroDivisionError("secret inner detail")

        monkeypatch.setattr(service.app.state.service.engine, "configuration", explode)
        response = await service.client.get("/v1/models/tiny")
        assert "secret" not in assert_is_error(response, 500, "internal")
        logged = [record for record in caplog.records if response.headers["x-request-id"] in record.getMessage()]
        assert logged and logged[0].exc_info
        await service.classify(PNG)


@pytest.mark.parametrize("header", ["Bearer secret", "bearer secret", "BEARER  secret"])
async def test_the_scheme_of_a_key_is_read_in_any_case(header: str) -> None:
    async with serving(api_key="secret") as service:
        response = await service.client.get("/v1/models", headers={"authorization": header})
        assert response.status_code == 200


def test_the_error_table_is_that_of_the_architecture_page() -> None:
    table = {kind.code: kind.status for kind in ServerError.__subclasses__()}
    assert table == {
        "undecodable": 400,
        "unauthorized": 401,
        "forbidden": 403,
        "not_found": 404,
        "too_slow": 408,
        "conflict": 409,
        "too_large": 413,
        "unsupported_format": 415,
        "invalid_parameter": 422,
        "queue_full": 429,
        "client_gone": 499,
        "engine_error": 500,
        "unavailable": 503,
        "deadline_exceeded": 504,
    }
