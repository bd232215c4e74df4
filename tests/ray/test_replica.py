"""A replica without a cluster: what it takes from `user_config`, and when it refuses."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.dial import AutoR
from server.errors import InvalidError, NotFoundError, ServerError, SettingsError
from server.ray_app import Replica, build, read_user_config
from server.settings import Settings
from tests.server.conftest import model_info

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="this test needs the package ray[serve]")
of_ray = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing ray.serve gives some

CATALOG = {"tiny": model_info(), "other": model_info("other")}


@pytest.fixture
def own_logger() -> Iterator[None]:
    """A replica sends our log where Serve's goes; other tests want theirs back."""
    ours = logging.getLogger("server")
    before = ours.level, ours.propagate, ours.handlers[:]
    yield
    ours.level, ours.propagate, ours.handlers[:] = before


@pytest.fixture
async def replica(own_logger: None) -> AsyncIterator[Replica]:
    """The bundled model, not yet served."""
    replica = Replica(Settings.model_validate({"backend": "torch", "threads": 1, "r": 4, "state_dir": None}))
    app = replica.__serve_build_asgi_app__()
    async with app.router.lifespan_context(app):
        yield replica


async def shown(replica: Replica) -> Any:
    """The default model as clients see it."""
    app = replica.__serve_build_asgi_app__()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return (await client.get("/v1/models")).json()["models"][0]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, {}),
        ({"r": 8}, {"tiny": 8}),
        ({"r": "4,2"}, {"tiny": (4, 2, 0)}),
        ({"r": 4, "inflect": -1}, {"tiny": (8, 4, 0)}),
        ({"models": {"other": {"r": "auto", "max_r": 6}}}, {"other": AutoR(6)}),
        ({"r": 1, "models": {"other": {"r": 5}}}, {"tiny": 1, "other": 5}),
    ],
)
def test_user_config_says_what_patch_would(said: Any, wanted: dict[str, Any]) -> None:
    assert read_user_config(said, CATALOG) == wanted


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        (8, InvalidError, "user_config is 8; it must be a mapping"),
        ({"r": 9}, InvalidError, "each r must lie between 0 and 8"),
        ({"rr": 8}, InvalidError, "no parameter 'rr'"),
        ({"models": {"another": {"r": 1}}}, NotFoundError, "there is no model 'another'"),
        ({"models": {"other": 1}}, InvalidError, "models.other is 1"),
    ],
)
def test_what_user_config_cannot_mean_is_named(said: Any, error: type[ServerError], message: str) -> None:
    with pytest.raises(error, match=message):
        read_user_config(said, CATALOG)


@needs_ray
@of_ray
async def test_a_replica_that_starts_fails_by_what_one_that_serves_refuses(replica: Replica) -> None:
    with pytest.raises(InvalidError, match="each r must lie between 0 and 128"):
        await replica.reconfigure({"r": 1000})
    await replica.reconfigure({"r": 8})
    await replica.check_health()
    await replica.reconfigure({"r": 1000})
    assert (await shown(replica))["r"] == 8
    await replica.reconfigure({})
    assert (await shown(replica))["r"] == 4


@needs_ray
@of_ray
async def test_a_replica_that_serves_goes_on_whatever_reading_raises(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    await replica.check_health()
    with monkeypatch.context() as patch:
        patch.setattr("server.ray_app.read_user_config", lambda *args: 1 / 0)
        await replica.reconfigure({"r": 8})
    assert (await shown(replica))["r"] == 4
    await replica.reconfigure({"r": 8})
    assert (await shown(replica))["r"] == 8


@needs_ray
@of_ray
async def test_the_version_grows_with_changes_alone(replica: Replica) -> None:
    versions = []
    for r in (4, 8, 8, 4):  # Ray says the same again when it renumbers replicas
        await replica.reconfigure({"r": r})
        versions.append((await shown(replica))["config_version"])
    assert versions == [2, 3, 3, 4]


@needs_ray
@of_ray
async def test_a_shared_configuration_holds_instead_of_user_config(own_logger: None, tmp_path: Path) -> None:
    (tmp_path / "shared.yaml").write_text("models: {tome-vit-tiny-64: {r: 6}}")
    said = {"backend": "torch", "threads": 1, "state_dir": None, "shared_config": str(tmp_path / "shared.yaml")}
    replica = Replica(Settings.model_validate(said))
    await replica.reconfigure({})
    with pytest.raises(InvalidError, match="user_config must not name it"):
        await replica.reconfigure({"r": 8})
    assert (await shown(replica))["r"] == 6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"port": 9000, "http_workers": 2}, "Ray Serve decides about http_workers, port"),
        ({"drain_delay_s": 5}, "Ray Serve decides about drain_delay_s"),
        ({"device": "cuda:0,cuda:1"}, "a replica has one"),
        ({"grpc_port": 8001}, "a replica of Ray Serve has no port of its own"),
        ({"batch": 8}, "there is no setting 'batch'"),
    ],
)
def test_settings_that_cannot_be_stop_the_deployment(args: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build(args)
